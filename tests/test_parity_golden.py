"""The network is DeepSeek's: small checkpoints run by Hugging Face transformers, reproduced from the same files.

The cases in tests/parity were written by transformers 5.23.0 (FP32, eager attention, random weights): a checkpoint in
published names, and logits, activations, routes, losses, gradients and text computed from it. Their own noise is 1e-5
on logits of std 2. What is compared, and how, is tests/parity.py.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import small

from dsjax.hub.safetensors import Writer, open_tensors

CASES = Path(__file__).parent / "parity"
NAMES = sorted(folder.name for folder in CASES.iterdir() if (folder / "config.json").exists())
MESHES = {"v3_yarn_groups": (1, 2, 4), "v2_lite_greedy": (2, 2, 2)}  # data, fsdp, expert
SLOW_MESHES = {
    "v3_mtp": (2, 1, 4),
    "v3_moonlight": (1, 4, 2),
    "v3_plain_interleaved": (1, 2, 4),
    "v3_odd_tied": (8, 1, 1),  # nothing in it can be cut
}


def check(rows: list[parity.Row]) -> None:
    for row in rows:
        print(row)  # seen with `pytest -s`, or when it fails
    assert [row.quantity for row in rows if not row.ok] == []
    worst = {row.quantity: row.worst for row in rows}
    assert worst["logits"] <= parity.LOGITS_AIM
    assert {"loss", "grad.*", "act.layers.*.out", "generate.ids"} <= worst.keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_number_equals_the_reference_on_one_device(name):
    check(parity.compare(CASES / name, small.mesh()))
    assert parity.not_compared(parity.read_golden(CASES / name)) == []


@pytest.mark.parametrize(
    "name, sizes",
    [*MESHES.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_MESHES.items())],
)
def test_every_number_equals_the_reference_on_eight_devices(name, sizes):
    check(parity.compare(CASES / name, small.mesh(*sizes)))


def copy_of(name: str, to: Path) -> Path:
    """A copy of a case that may be written to."""
    shutil.copytree(CASES / name, to, copy_function=shutil.copyfile)
    return to


def change(file: Path, names: list[str]) -> None:
    """Makes the first number of some tensors another one."""
    with open_tensors(file) as tensors:
        found = {name: (tensors.entries[name].offset, tensors.read(name)) for name in names}
    with file.open("r+b") as raw:
        for offset, array in found.values():
            array.reshape(-1)[0] += 1
            raw.seek(offset)
            raw.write(array.tobytes())


def test_each_wrong_number_fails_in_its_own_line_and_no_other(tmp_path):
    case = copy_of("v3_mtp", tmp_path / "case")
    wrong = {
        "logits": "logits",
        "loss": "loss",
        "act.embed": "act.embed",
        "act.layers.2.mlp_out": "act.layers.*.mlp_out",
        "act.layers.1.topk_weight": "act.layers.*.topk_weight",
        "grad.model.layers.2.mlp.experts.3.up_proj.weight": "grad.*",
        "generate.ids": "generate.ids",
        "generate.step_logits_last": "generate.step_logits_last",
        "mtp.prenorm.loss": "mtp.prenorm.loss",
        "mtp.postnorm.grad.eh_proj": "mtp.postnorm.grad.eh_proj",
    }
    change(case / "golden.safetensors", list(wrong))
    rows = {row.quantity: row for row in parity.compare(case, small.mesh())}
    assert {name for name, row in rows.items() if not row.ok} == set(wrong.values())
    assert rows["act.layers.*.mlp_out"].where == "layer 2"
    assert rows["grad.*"].where == "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "ours, agrees",
    [
        ([1.0, 2.00019], True),
        ([1.0, 2.00021], False),
        ([1.0, math.nan], False),
        ([1.0, 2.0, 3.0], False),
        ([[1.0, 2.0], [1.0, 2.0]], True),  # the batch of two devices, every copy right
        ([[1.0, 2.0], [1.1, 2.0]], False),
        (None, False),
    ],
)
def test_gradient_must_be_there_and_within_its_largest_number(ours, agrees):
    (row,) = parity.judge({"grad.a": ours}, {"grad.a": np.array([1.0, 2.0]), "labels": None}, parity.Tolerances())
    assert row.ok == agrees


def test_gradient_of_nothing_but_rounding_counts_as_zero():
    golden = {"grad.a": np.array([1.0]), "grad.b": np.array([1e-8]), "labels": None}
    for ours, agrees in ((0.0, True), (-1e-8, True), (1e-5, False)):
        (row,) = parity.judge({"grad.a": [1.0], "grad.b": [ours]}, golden, parity.Tolerances())
        assert row.ok == agrees


def cut(case: Path, keep: dict[str, Any]) -> None:
    """Leaves nothing but these tensors in a case's golden file."""
    folder = case / "new"
    folder.mkdir()
    with Writer(folder, {name: (value.dtype, value.shape) for name, value in keep.items()}) as writer:
        for name, value in keep.items():
            writer.add(name, value)
    (folder / "model.safetensors").replace(case / "golden.safetensors")


def test_padding_token_has_no_gradient_in_pytorch_and_is_told_instead_of_judged(tmp_path):
    case, name = copy_of("v2_lite_greedy", tmp_path / "case"), "grad.model.embed_tokens.weight"
    golden = parity.read_golden(case)
    pad = int(golden["input_ids"][0, 5])
    golden[name][pad] = 0
    cut(case, {key: golden[key] for key in ("input_ids", "labels", "loss", name)})
    assert {row.quantity for row in parity.compare(case, small.mesh()) if not row.ok} == {"grad.*"}
    config = json.loads((case / "config.json").read_text())
    (case / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    rows = {row.quantity: row for row in parity.compare(case, small.mesh())}
    assert all(row.ok for row in rows.values())
    assert rows[f"{name}[{pad}]"].worst > 0 and rows[f"{name}[{pad}]"].tolerance is None


@pytest.fixture
def brief(tmp_path) -> Path:
    """A case whose golden file holds logits, and a tensor that nobody knows."""
    case = copy_of("v2_lite_greedy", tmp_path / "brief")
    golden = parity.read_golden(case)
    cut(case, {"input_ids": golden["input_ids"], "logits": golden["logits"], "act.unheard": golden["logits"]})
    return case


def test_script_runs_anywhere_and_lists_what_it_does_not_know(brief, tmp_path, repository):
    command = [sys.executable, parity.__file__, str(brief), "--devices", "2", "--mesh", "fsdp=2"]
    # The compile cache of a user stays as it is.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "", "HOME": str(repository / ".cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 2 device(s): data 1 x fsdp 2 x expert 1" in done.stdout
    assert "not compared: act.unheard" in done.stdout and "ok; 1 tensors judged" in done.stdout


def test_wrong_weight_ends_with_status_one(brief, capsys):
    change(brief / "model.safetensors", ["model.norm.weight"])
    assert parity.main([str(brief)]) == 1
    assert "FAIL: logits" in capsys.readouterr().out
    assert parity.main([str(brief), "--tolerance", "activation=100"]) == 0


def test_unusable_case_or_command_ends_with_status_two_and_one_sentence(brief, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    other = copy_of("v2_lite_greedy", tmp_path / "other")
    (other / "config.json").write_text("{")
    short = copy_of("v2_lite_greedy", tmp_path / "short")
    os.truncate(short / "golden.safetensors", 5000)
    bare = copy_of("v2_lite_greedy", tmp_path / "bare")
    cut(bare, {"logits": np.zeros(3, np.float32)})
    foreign = copy_of("v2_lite_greedy", tmp_path / "foreign")
    cut(foreign, {"input_ids": np.full((2, 3), 96), "logits": np.zeros(3, np.float32)})
    cases = [tmp_path / "missing", tmp_path / "empty", other, short, bare, foreign]
    commands = [[str(case)] for case in cases]
    commands += [[str(brief), *words] for words in (["--mesh", "fspd=2"], ["--mesh", "fsdp=3"], ["--devices", "0"])]
    commands += [[str(brief), "--tolerance", words] for words in ("gradient=small", "routes=1")]
    commands += [[], [str(brief), "--devices", "two"]]
    for words in commands:
        assert parity.main(words) == 2, words
        out, err = capsys.readouterr()
        assert err.startswith("parity: ") and err.count("\n") == 1 and not out, err


def test_unusable_case_does_not_keep_the_others_from_being_compared(brief, tmp_path, capsys):
    assert parity.main([str(tmp_path / "missing"), str(brief)]) == 2
    assert "ok; 1 tensors judged" in capsys.readouterr().out
