"""The command line: help is light, mistakes are one sentence and exit 2, arguments reach the functions."""

import json
import os
import subprocess
import sys
import types

import pytest

from dsjax.__main__ import main

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "numpy", "ml_collections", "matplotlib"}


@pytest.fixture
def tiny(repository) -> str:
    return str(repository / "configs" / "tiny.py")


@pytest.fixture
def called(monkeypatch):
    """Stands in for the modules behind the commands; maps a function's name to the arguments it was given."""
    calls = {}

    def stand_in(module: str, function: str, result=None):
        def record(*args):
            calls[function] = args
            return result

        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function: record}))

    stand_in("dsjax.training.loop", "train", types.SimpleNamespace(exit_code=0))
    stand_in("dsjax.training.report", "report", "page.html")
    stand_in("dsjax.training.bench", "bench", {"mfu": 0.5})
    stand_in("dsjax.inference.generate", "generate", "a text")
    return calls


def imported_by(repository, code: str) -> set[str]:
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


def test_package_and_help_import_nothing_heavy(repository):
    assert imported_by(repository, "import dsjax") & HEAVY == set()
    code = "from dsjax.__main__ import main\nassert main([]) == 0\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert imported_by(repository, code) & HEAVY == set()


def test_configuration_is_checked_before_jax_is_imported(repository):
    code = (
        "from dsjax.__main__ import main\n"
        "assert main(['train', '--config', 'configs/tiny.py', '--workdir', 'x', '--config.mesh.expert=3']) == 2"
    )
    names = imported_by(repository, code)
    assert "ml_collections" in names and "jax" not in names


def test_module_and_script_are_the_same_program(repository):
    ran = subprocess.run([sys.executable, "-m", "dsjax"], cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == ""
    assert "dsjax train --config configs/tiny.py" in ran.stdout
    assert "dsjax = dsjax.__main__:main" in (repository / "setup.cfg").read_text()


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("trian", 'unknown command "trian"; did you mean train?'),
        ("train --confg x", "unknown flag --confg; did you mean --config?"),
        ("train --workdir x", "the following arguments are required: --config; see dsjax train --help"),
        ("train --config TINY --workdir x --seed 3", "unknown flag --seed; valid are"),
        ("train --config TINY --workdir x y", 'unexpected argument "y"; see dsjax train --help'),
        ("train --config TINY --workdir x --devices 0", "--devices is 0, but must be at least 1"),
        ("train --config TINY --workdir x --devices two", "argument --devices: invalid int value: 'two'"),
        ("train --config TINY --workdir x --processes 2 --process 1", "--coordinator missing: give --coordinator HOST"),
        ("train --config TINY --workdir x --distributed --process 1", "--distributed finds out what --coordinator"),
        ("train --config TINY --workdir x --process one", "argument --process: invalid int value: 'one'"),
        ("bench --config TINY --coordinator here", "--processes and --process missing: give --coordinator HOST:PORT"),
        ("train --config TINY --workdir x --config.model.hidden_sise=3", "did you mean model.hidden_size?"),
        ("train --config TINY --workdir x --config.training.seed", "--config.training.seed needs a value"),
        ("train --config TINY --workdir x --config.training.seed --devices 8", "--config.training.seed needs a value"),
        (
            "train --config TINY --workdir x --config.hardware.name=H80",
            'unknown hardware.name "H80"; did you mean H800?',
        ),
        ("train --config TINY --workdir x --allow-change optimizer.lr", "--allow-change: unknown field optimizer.lr"),
        ("train --config TINY --workdir x --allow-change optimizer", "optimizer is a section; name the field"),
        ("train --config TINY --workdir x --allow-change model.hidden_size", "cannot change within a run"),
        ("train --config none.py --workdir x", "cannot read the config file none.py: No such file or directory"),
        ("report x --config.training.seed=3", "reads no config file"),
        ("generate --checkpoint x --prompt y --max-new-tokens 0", "--max-new-tokens is 0"),
        ("generate --checkpoint x --prompt y --temperature -1", "--temperature is -1.0"),
        ("generate --checkpoint x --prompt y --temperature nan", "--temperature is nan"),
        ("generate --checkpoint x --prompt y --seed -1", "--seed is -1, but must be at least 0 and below 4294967296"),
        ("generate --checkpoint x --prompt \udcff", "--prompt is not UTF-8"),
        ("bench --config TINY --steps 3", "--steps is 3"),
        ("bench --config TINY --baseline sparse", "argument --baseline: invalid choice: 'sparse'"),
        ("--wat", "unknown flag --wat"),
        ("-x", "no command; valid are tokenizer, prepare, train,"),
    ],
)
def test_mistake_is_one_sentence_and_exits_2(capsys, called, tiny, line, sentence):
    assert main([tiny if word == "TINY" else word for word in line.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("dsjax: ") and message.count("\n") == 1
    assert sentence in message
    assert not called


def test_overrides_are_read_in_both_spellings(called, tiny):
    words = ["train", "--config.mesh.data", "-1", "--config", tiny, "--config.training.seed=7", "--workdir", "w"]
    assert main(words) == 0
    config, workdir, allowed = called["train"]
    assert (config.training.seed, config.mesh.data, workdir, allowed) == (7, -1, "w", ())


def test_tilde_is_the_home_directory_in_every_spelling(called, tiny, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert main(["train", "--config", tiny, "--workdir=~/run"]) == 0
    assert called["train"][1] == "/home/me/run"
    assert main(["report", "~/run", "--out=~/page"]) == 0
    assert called["report"] == ("/home/me/run", "/home/me/page")


def test_devices_are_simulated_through_the_environment(called, tiny, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert main(["train", "--config", tiny, "--workdir", "w", "--devices", "8"]) == 0
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["XLA_FLAGS"].startswith("--xla_dump_to=x --xla_force_host_platform_device_count=8 ")


def test_simulated_devices_are_there(repository):
    code = (
        "import argparse, dsjax.__main__ as m; m._set_environment(argparse.Namespace(devices=3))\n"
        "import jax; assert jax.device_count() == 3, jax.devices()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


def test_distributed_without_a_cluster_is_told(repository, tmp_path):
    words = ["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "run"), "--distributed"]
    ran = subprocess.run([sys.executable, "-m", "dsjax", *words], cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("dsjax: --distributed found no cluster to join") and ran.stderr.count("\n") == 1
    assert "or give --coordinator HOST:PORT" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_arguments_reach_generate_report_and_bench(called, tiny, capsys):
    assert main(["generate", "--checkpoint", "run", "--prompt", "a b", "--max-new-tokens", "5", "--seed", "2"]) == 0
    assert called["generate"] == ("run", "a b", 5, 0.8, 2, None)
    assert main(["report", "run", "--out", "there"]) == 0
    assert called["report"] == ("run", "there")
    assert capsys.readouterr().out == "a text\npage.html\n"
    assert main(["bench", "--config", tiny, "--baseline", "dense", "--steps", "12"]) == 0
    assert called["bench"][1:] == (("dense",), 12)
    assert json.loads(capsys.readouterr().out) == {"mfu": 0.5}


def test_a_directory_for_a_file_is_one_sentence(monkeypatch, tiny, tmp_path, capsys):
    writes = types.SimpleNamespace(train=lambda *_: tmp_path.write_text("x"))
    monkeypatch.setitem(sys.modules, "dsjax.training.loop", writes)
    assert main(["train", "--config", tiny, "--workdir", "w"]) == 2
    assert capsys.readouterr().err == f"dsjax: {tmp_path} cannot be used (Is a directory)\n"


def test_eval_and_collect_need_no_weights_of_their_config(monkeypatch, repository, tmp_path, capsys):
    """Those that count are of --checkpoint; the runs of this config are not there."""
    monkeypatch.chdir(tmp_path)
    asked = []
    evaluate = types.SimpleNamespace(evaluate_problems=lambda _, config, *rest: asked.append(config) or {})
    collect = types.SimpleNamespace(
        collect=lambda config, *_: asked.append(config) or types.SimpleNamespace(kept=1, drawn=1, problems=1)
    )
    monkeypatch.setitem(sys.modules, "dsjax.posttraining.evaluation", evaluate)
    monkeypatch.setitem(sys.modules, "dsjax.posttraining.collection", collect)
    config = str(repository / "configs" / "r1_tiny.py") + ":rl"
    assert main(["eval", "--checkpoint", "run", "--problems", "3", "--config", config]) == 0
    assert main(["collect", "--out", "set.jsonl", "--problems", "3", "--config", config]) == 0
    assert [one.init_from for one in asked] == ["runs/r1_tiny/cold_start"] * 2
    assert main(["sft", "--workdir", "w", "--config", config]) == 2
    assert "init_from" in capsys.readouterr().err


def test_exit_status_of_train_is_passed_on(monkeypatch, tiny):
    stopped = types.SimpleNamespace(train=lambda *_: types.SimpleNamespace(exit_code=130))
    monkeypatch.setitem(sys.modules, "dsjax.training.loop", stopped)
    assert main(["train", "--config", tiny, "--workdir", "w"]) == 130


def test_interrupt_is_one_line_and_exits_130(monkeypatch, tiny, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "dsjax.training.loop", types.SimpleNamespace(train=interrupted))
    assert main(["train", "--config", tiny, "--workdir", "w"]) == 130
    assert capsys.readouterr().err == "dsjax: interrupted\n"
