"""Whatever is wrong in what a user gives: a sentence and an exit code, never a traceback, nothing overwritten."""

import ast
import json
import random
import shutil
import subprocess
import sys
import types

import jax
import pytest
from test_checkpoint import abstract, make_state, mesh, meta
from tiny_runs import tiny_run

from dsjax.__main__ import main
from dsjax.config import Config, ConfigError
from dsjax.data import tokenizer
from dsjax.data.loader import Loader
from dsjax.data.prepare import MANIFEST, prepare
from dsjax.sections import paths
from dsjax.training import checkpoint, integrity
from dsjax.training.changes import check_same_run
from dsjax.training.monitor import drop_rows_after, read_rows
from dsjax.training.resume import find_start
from dsjax.training.workdir import read_config

TEXTS = [
    "",
    "None",
    "nan",
    "-inf",
    "-1",
    "0",
    "1e400",
    "9" * 400,
    "1.5",
    "abc",
    "true",
    "1,,2",
    "[]",
    "\x00",
    "💥",
    "../x",
]
VALUES = [None, -1, 0, 1.5, 10**30, float("nan"), "", "x", True, [], [None], {}, {"a": {}}, ["../x"], "9" * 5000]


def sentence(capsys, code) -> None:
    """Asserts that a command has told one sentence and failed."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("dsjax: ") and error.count("\n") == 1 and len(error) < 2000, (code, error)


@pytest.fixture
def stubs(monkeypatch):
    """Commands whose arguments are right do nothing."""
    ended = types.SimpleNamespace(exit_code=0)
    for name, module, result in (
        ("train", "loop", ended),
        ("bench", "bench", {}),
        ("checkpoint_bench", "checkpoint_bench", {}),
    ):
        stand_in = types.SimpleNamespace(**{name: lambda *_, result=result: result})
        monkeypatch.setitem(sys.modules, f"dsjax.training.{module}", stand_in)


def test_any_text_for_any_field_is_taken_or_told(repository, stubs, capsys, tmp_path):
    told = 0
    for name in paths(Config):
        for text in TEXTS:
            words = ["--config", str(repository / "configs" / "tiny.py"), f"--config.{name}={text}"]
            if code := main(["train", *words, "--workdir", str(tmp_path / "w")]):
                sentence(capsys, code)
                told += 1
    assert told > 500
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"def get_config(:",
        b"\x00",
        b"get_config = 3",
        b"def get_config(): return None",
        b"def get_config(): return {}",
        b"def get_config(): raise SystemExit(0)",
        b"def get_config(): return get_config()",
        b"import not_there\ndef get_config(): pass",
        b"import dsjax.config as d\ndef get_config():\n    c = d.base_config()\n    c.model = 3\n    return c",
        b"(" * 300 + b")" * 300,
    ],
)
def test_any_config_file_is_told(stubs, capsys, tmp_path, content):
    (tmp_path / "c.py").write_bytes(content)
    sentence(capsys, main(["train", "--config", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "w")]))


def test_any_arguments_are_taken_or_told(repository, stubs, capsys, tmp_path):
    rng = random.Random(0)
    (tmp_path / "file").write_text("{")
    words = ["train", "report", "bench", "checkpoint", "list", "verify", "prune", "export", "--config", "--workdir"]
    words += ["--steps", "--keep-last", "--step", "--devices", "--config.training.seed", "--allow-change", "--against"]
    words += [
        str(repository / "configs" / "tiny.py"),
        str(tmp_path),
        str(tmp_path / "file"),
        "-1",
        "0",
        "",
        "3",
        "\udcff",
    ]
    words += ["--baseline", "--out", "--", "-", "=", "--=", "--config.", "--config.=", "-h3", "💥" * 50]
    for _ in range(1500):
        argv = [rng.choice(words[:5]), *rng.choices(words, k=rng.randint(0, 6))]
        try:
            code = main(argv)
        except SystemExit as ended:
            assert ended.code == 0, argv
            continue
        if code:
            sentence(capsys, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = tiny_run(tmp_path_factory.mktemp("run"))
    return config.data, prepare(config.data, progress=False)[0].directory


def changed(rng, value):
    """A copy of a JSON value in which one thing is missing or another."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if rng.random() < 0.2:
            del copy[key]
        else:
            copy[key] = changed(rng, copy[key])
        return copy
    return rng.choice(VALUES)


def broken(rng, text: bytes) -> bytes:
    """`text` cut, or with some bytes changed."""
    if rng.random() < 0.2:
        return text[: rng.randrange(len(text))]
    data = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def test_any_manifest_is_taken_or_told(prepared, tmp_path):
    data, directory = prepared
    good, rng, told = json.loads((directory / MANIFEST).read_text()), random.Random(0), 0
    try:
        for number in range(300):
            text = json.dumps(changed(rng, good)).encode()
            (directory / MANIFEST).write_bytes(text if number % 3 else broken(rng, text))
            try:
                for split in ("train", "validation"):
                    Loader(prepare(data, progress=False), data, 0, split).rows([0, 5])
            except ConfigError as error:
                told += 1
                assert "\n" not in str(error)
    finally:
        (directory / MANIFEST).write_text(json.dumps(good))
    assert told > 100


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b"])
def test_a_manifest_cannot_name_files_elsewhere(prepared, name):
    data, directory = prepared
    text = (directory / MANIFEST).read_text()
    manifest = json.loads(text)
    manifest["files"][name] = 1
    (directory / MANIFEST).write_text(json.dumps(manifest))
    try:
        with pytest.raises(ConfigError, match="is not a complete prepared source"):
            prepare(data, progress=False)
    finally:
        (directory / MANIFEST).write_text(text)


def test_prepared_data_names_no_code_to_run(prepared, tmp_path):
    data, directory = prepared
    features, manifest = directory / "features.json", directory / MANIFEST
    texts = features.read_text(), manifest.read_text()
    evil = texts[0].replace("tensorflow_datasets.core.features.tensor_feature.Tensor", "evil.module.Tensor")
    sizes = json.loads(texts[1])
    sizes["files"]["features.json"] = len(evil)
    try:
        features.write_text(evil)
        manifest.write_text(json.dumps(sizes))
        with pytest.raises(ConfigError, match="features.json names the class evil.module.Tensor"):
            Loader(prepare(data, progress=False), data, 0)
    finally:
        features.write_text(texts[0])
        manifest.write_text(texts[1])


def test_any_damage_to_a_dataset_is_taken_or_told(prepared):
    data, directory = prepared
    rng, told = random.Random(1), 0
    for path in sorted(directory.iterdir()):
        good = path.read_bytes()
        for _ in range(12):
            bad = bytearray(good)
            for _ in range(8):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            path.write_bytes(bytes(bad))
            try:
                Loader(prepare(data, progress=False), data, 0).rows(range(100))
            except ConfigError:
                told += 1
            finally:
                path.write_bytes(good)
    assert told > 20


def test_any_tokenizer_file_is_taken_or_told(tmp_path):
    tokenizer.load("bytes").write(tmp_path)
    path, rng, told = tmp_path / "tokenizer.json", random.Random(0), 0
    good = json.loads(path.read_text())
    for number in range(200):
        text = json.dumps(changed(rng, good)).encode()
        path.write_bytes(text if number % 2 else broken(rng, text))
        try:
            tokenizer.load(str(path)).encode("a text")
        except ConfigError as error:
            told += 1
            assert "\n" not in str(error)
    assert told > 50


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Something like a run with one checkpoint, whose config is that of `Config()`."""
    workdir = tmp_path_factory.mktemp("saved")
    saver = checkpoint.Saver(workdir / "checkpoints", 2)
    more = {"tokens": 28, "seconds": 1.0, "cost_usd": 0.5, "losses": [1.0, None], "skips": [[3, 8]]}
    assert saver.save(make_state(mesh(1, 1, 1)), meta(7) | more | {"validation_loss": 2.5}) is None
    assert saver.finish() is None
    return workdir


def test_any_meta_of_a_checkpoint_is_taken_or_told(saved, tmp_path):
    """Also where the digests agree, as someone would write them who changed the file."""
    rng, told = random.Random(0), 0
    target = abstract(make_state(mesh(1, 1, 1)))
    for number in range(200):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        path = workdir / "checkpoints" / "7"
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
            if rng.random() < 0.7:
                content = changed(rng, json.loads((path / name).read_text()))
                (path / name).write_text(json.dumps(content))
        (path / integrity.SUMS).unlink()
        integrity.seal(path, integrity.lines(path, integrity.share(path)))
        try:
            found = find_start(Config(), workdir, "abc")
            assert found.position.step == 7
            checkpoint.restore(workdir / "checkpoints", 7, target)
        except ConfigError as error:
            told += 1
            assert "\n" not in str(error)
    assert told > 60


def test_any_config_and_metrics_of_a_run_are_taken_or_told(tmp_path):
    rng, told = random.Random(0), 0
    good = meta(1)["config"]
    rows = [{"step": step, "loss": 1.0, "seconds": 1.0, "cost_usd": 0.0} for step in range(1, 4)]
    for number in range(300):
        text = json.dumps(changed(rng, good)).encode()
        (tmp_path / "config.json").write_bytes(text if number % 2 else broken(rng, text))
        try:
            read_config(tmp_path)
        except ConfigError:
            told += 1
        lines = b"".join(json.dumps(changed(rng, row)).encode() + b"\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_bytes(broken(rng, lines))
        drop_rows_after(tmp_path / "metrics.jsonl", 2)
        assert all(row.get("step", 0) <= 2 for row in read_rows(tmp_path / "metrics.jsonl"))
    assert told > 100


def test_a_meta_of_something_else_is_told():
    for config in ({}, {"model": 3}, {"model": {"hidden_size": "x"}}, {"training": {"seed": -1}}):
        try:
            check_same_run({"config": config}, Config(), "abc")
        except ConfigError as error:
            assert "\n" not in str(error)


FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch"}
# They run Python files that are named to be run: a configuration, a reward of the user's own.
RUN_FILES = {"config.py", "posttraining/worker.py"}


def test_nothing_is_loaded_that_could_be_code(repository):
    package = repository / "dsjax"
    for path in package.rglob("*.py"):
        runs_files = path.relative_to(package).as_posix() in RUN_FILES
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "yaml.load") and (called != "exec" or runs_files), path
                if called in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), path


def test_a_command_that_fails_leaves_nothing_half_written(saved, tmp_path):
    target = tmp_path / "out"
    words = ["checkpoint", "export", str(saved), str(target)]
    ran = subprocess.run([sys.executable, "-m", "dsjax", *words], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.startswith("dsjax: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert jax.device_count() == 8
