"""The scripts parse, point to what exists, and pass their arguments on."""

import os
import re
import shutil
import subprocess

import pytest

SCRIPTS = [
    "launch/install.sh",
    "launch/quickstart.sh",
    "launch/simulate.sh",
    "launch/fp8_experiment.sh",
    "launch/slurm.sbatch",
    "launch/tpu_vm.sh",
    "tests/run.sh",
    ".ci/run",
]
FAKE_DSJAX = """#!/usr/bin/env bash
printf '%s\\n' "$0 $*" >> "$CALLS"
case $1 in
    train) echo "what came out" ;;
    generate) echo "a sample" ;;
esac
"""


@pytest.fixture
def sandbox(repository, tmp_path):
    """A copy of the scripts whose environment is installed already and whose `dsjax` writes down how it was called."""
    root = tmp_path / "copy"
    for name in ("launch", "tests"):
        shutil.copytree(repository / name, root / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(repository / name, root / name)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "dsjax").write_text(FAKE_DSJAX)
    (programs / "dsjax").chmod(0o755)
    for name in ("python", "pip"):
        (programs / name).symlink_to(shutil.which("python3"))
    stamp = (root / "setup.cfg").read_text() + (root / "pyproject.toml").read_text()
    for extra in ("plots", "tpu,tokenizer,plots"):
        (root / ".venv" / f"installed-{extra}").write_text(stamp)
    return root


def inherited() -> dict[str, str]:
    """The caller's environment without what steers the scripts."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHON", "DSJAX_VENV")}


def run(sandbox, script, *arguments, cwd="/", **environment):
    environment = {**inherited(), "CALLS": str(sandbox / "calls"), **environment}
    command = ["bash", str(sandbox / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def calls(sandbox) -> list[str]:
    return [line.partition("bin/dsjax ")[2] for line in (sandbox / "calls").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_stops_at_the_first_error(repository, script):
    subprocess.run(["bash", "-n", repository / script], check=True)
    if script != "launch/install.sh":  # sourced by the others
        text = (repository / script).read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
        assert os.access(repository / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_names_files_that_exist(repository, script):
    for name in re.findall(r"(?:configs|launch|tests)/\w+\.(?:py|sh|sbatch)", (repository / script).read_text()):
        assert (repository / name).exists(), name


def test_sbatch_directives_come_before_the_first_command(repository):
    lines = (repository / "launch" / "slurm.sbatch").read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(directives) < min(commands)
    for number in directives:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[number])


def test_simulate_passes_its_arguments_on(sandbox):
    ran = run(sandbox, "launch/simulate.sh", "4", "configs/tiny.py", "--config.training.total_steps=2")
    assert ran.returncode == 0, ran.stderr
    expected = "train --config configs/tiny.py --devices 4 --workdir runs/tiny-on-4 --config.training.total_steps=2"
    assert calls(sandbox) == [expected]


def test_simulate_finds_a_config_where_the_caller_stands(sandbox, tmp_path):
    (tmp_path / "mine.py").write_text("")
    ran = run(sandbox, "launch/simulate.sh", "2", "mine.py:form", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert calls(sandbox) == [f"train --config {tmp_path}/mine.py:form --devices 2 --workdir runs/mine-on-2"]


def test_simulate_without_arguments_tells_its_usage(sandbox):
    ran = run(sandbox, "launch/simulate.sh")
    assert ran.returncode == 2 and "usage:" in ran.stderr


def test_quickstart_trains_and_tells_what_came_out(sandbox):
    ran = run(sandbox, "launch/quickstart.sh", "--config.training.seed=3")
    assert ran.returncode == 0, ran.stderr
    train, generate = calls(sandbox)
    assert train == "train --config configs/tiny.py --devices 8 --workdir runs/quickstart --config.training.seed=3"
    assert generate.startswith("generate --checkpoint runs/quickstart --prompt")
    assert ran.stdout == "what came out\nsample:\na sample\n"


def test_fp8_experiment_trains_bf16_first_and_compares_each_with_it(sandbox):
    ran = run(sandbox, "launch/fp8_experiment.sh", "mxfp8", "fp8_deepseek")
    assert ran.returncode == 0, ran.stderr
    *trained, report = calls(sandbox)
    names = ["bf16", "mxfp8", "fp8_deepseek"]
    assert trained == [f"train --config configs/fp8_experiment.py:{name} --workdir runs/fp8/{name}" for name in names]
    assert report == "report runs/fp8/mxfp8 runs/fp8/fp8_deepseek --against runs/fp8/bf16 --out runs/fp8/report"


def test_tpu_script_prepares_once_and_trains_on_every_host(sandbox):
    for command in ("prepare", "train"):
        ran = run(sandbox, "launch/tpu_vm.sh", command, "--config.training.seed=3")
        assert ran.returncode == 0, ran.stderr
    prepared, trained = calls(sandbox)
    data = "--config.data.sources=text_files:/mnt/shared/corpus --config.data.tokenizer=/mnt/shared/tokenizer.json"
    assert prepared.startswith("prepare --config configs/") and data in prepared
    assert trained.startswith("train --distributed --workdir") and data in trained
    assert trained.endswith("--config.training.seed=3")
    assert run(sandbox, "launch/tpu_vm.sh").returncode == 2


def test_sbatch_prepares_in_one_task_and_trains_in_all(sandbox):
    srun = sandbox / ".venv" / "bin" / "srun"
    srun.write_text(
        '#!/usr/bin/env bash\necho "srun $*" >> "$CALLS.srun"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    srun.chmod(0o755)
    ran = run(sandbox, "launch/slurm.sbatch", SLURM_SUBMIT_DIR=str(sandbox), SLURM_CPUS_PER_TASK="8")
    assert ran.returncode == 0, ran.stderr
    prepared, trained = calls(sandbox)
    assert prepared.startswith("prepare --config configs/") and trained.startswith("train --distributed --config")
    assert (
        "--config.data.tokenizer=/shared/tokenizer.json" in prepared
        and prepared.split("--config.data")[1:] == trained.split("--config.data")[1:]
    )
    first, second = (sandbox / "calls.srun").read_text().splitlines()
    assert "--ntasks=1" in first and "--ntasks" not in second


def test_a_failed_installation_is_not_taken_for_done(sandbox):
    (sandbox / "setup.cfg").write_text("changed")
    for program in ("python", "pip"):
        (sandbox / ".venv" / "bin" / program).unlink()
        (sandbox / ".venv" / "bin" / program).write_text("#!/bin/sh\nexit 1\n")
        (sandbox / ".venv" / "bin" / program).chmod(0o755)
    before = (sandbox / ".venv" / "installed-plots").read_text()
    shell = ["bash", "-c", ". launch/install.sh plots"]
    assert subprocess.run(shell, cwd=sandbox, env=inherited(), capture_output=True, text=True).returncode == 1
    assert (sandbox / ".venv" / "installed-plots").read_text() == before


def test_unsuitable_python_is_refused_in_a_sentence(sandbox, tmp_path):
    shutil.rmtree(sandbox / ".venv")
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    ran = run(sandbox, "launch/quickstart.sh", PYTHON=str(old))
    assert ran.returncode == 2
    assert ran.stderr == f"dsjax: {old} is not Python 3.11, 3.12 or 3.13; name one with PYTHON=...\n"
