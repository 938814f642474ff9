"""The products that are timed are those of training, and their rates count every row."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsjax.__main__ import main
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear
from dsjax.numerics.recipe import recipe
from dsjax.training import cluster
from dsjax.training import product_bench as products

N, K = 48, 160


@pytest.fixture
def few(monkeypatch):
    for name, value in {"DENSE": ((N, K),), "GROUPED": ((K, N),), "ROUNDS": 1, "MIN_SECONDS": 1e-9}.items():
        monkeypatch.setattr(products, name, value)


def test_every_shape_is_timed_in_every_form(few, capsys):
    figures = products.product_bench((32, 16))
    cases = [(one["product"], one["experts"], one["tokens"], one["n"], one["k"]) for one in figures["shapes"]]
    shapes = [(None, 32, N, K), (None, 16, N, K), (4, 32, K, N), (8, 16, K, N)]
    assert cases == [(product, *shape) for shape in shapes for product in ("Fprop", "Wgrad")]
    for one in figures["shapes"]:
        assert all(one[name] > 0 for name in products.RATES)
        assert one["fp8_over_bf16"] == pytest.approx(one["fp8"] / one["bf16"], rel=2e-3)
        whole = one["fp8_from_inputs"] / one["bf16_from_inputs"]
        assert one["fp8_over_bf16_from_inputs"] == pytest.approx(whole, rel=2e-3)
    assert figures["rows"] == "not as published"
    assert figures["products"] == {"bf16": "bf16", "fp8": "emulated: FP32 products of dequantised operands"}
    assert capsys.readouterr().err.count("\n") == len(cases)  # progress

    lines = products.table(figures).splitlines()
    assert "rows not as published; bf16 bf16; fp8 emulated" in lines[0]
    assert len(lines) == 4 + len(cases) and len({line.count("|") for line in lines[2:]}) == 1
    assert lines[4].startswith(f"| Fprop | dense | 32 | {N} | {K} |")


def test_rates_count_the_rows_of_all_experts(few, monkeypatch):
    monkeypatch.setattr(products, "_best_seconds", lambda runs: dict.fromkeys(runs, 1e-6))
    for one in products.product_bench((16,))["shapes"]:
        assert one["fp8"] == pytest.approx(2 * (64 if one["experts"] else 16) * N * K / 1e6, rel=1e-3)


def arrays(experts):
    x, dy, w = products._arrays(experts, 16, N, K)
    groups = experts and Groups(jnp.full((experts,), 16, jnp.int32), 16)
    return x, dy, w, groups


@pytest.mark.parametrize("experts", [None, 4])
@pytest.mark.parametrize("name", products.PRECISIONS.values())
def test_what_is_timed_is_the_product_of_training(name, experts):
    x, dy, w, groups = arrays(experts)
    y, pull = jax.vjp(lambda x, w: linear(x, w, recipe(name), groups), x, w)
    kept_exactly = dataclasses.replace(recipe(name), cached=None)
    dw = jax.vjp(lambda w: linear(x, w, kept_exactly, groups), w)[1](dy)[0]
    for run in products._fprop(x, w, groups, recipe(name)):
        np.testing.assert_array_equal(np.asarray(run(), np.float32), np.asarray(y, np.float32))
    for run in products._wgrad(x, dy, groups, recipe(name)):
        np.testing.assert_allclose(run(), dw, rtol=1e-5, atol=1e-5)
    assert np.abs(dw).max() > 1


@pytest.mark.parametrize("experts", [None, 4])
def test_kernels_are_given_operands_as_they_read_them(experts):
    # Traced only: what they compute is for test_kernels.
    x, dy, w, groups = arrays(experts)
    native = dataclasses.replace(recipe("fp8_deepseek"), native="triton", mesh=small.mesh())
    at_hand, whole = products._fprop(x, w, groups, native)
    operands = at_hand.args[:2]
    assert [operand.values.dtype for operand in operands] == [jnp.float8_e4m3fn] * 2
    assert operands[1].values.shape[-2:] == (N, K)
    for run in (at_hand, whole):
        assert jax.eval_shape(run).shape == dy.shape
    for run in products._wgrad(x, dy, groups, native):
        assert jax.eval_shape(run).shape == w.shape


def test_the_best_of_several_rounds_counts_and_short_products_are_repeated(monkeypatch):
    monkeypatch.setattr(products, "MIN_SECONDS", 8.0)
    clock, calls = iter([4.0, 9.0, 6.0, 12.0, 12.0, 8.0]), {"short": 0, "long": 0}

    def seconds(run):
        run()
        return next(clock)

    monkeypatch.setattr(products, "seconds", seconds)

    def counted(name):
        calls[name] += 1
        return jnp.zeros(())

    runs = {name: lambda name=name: counted(name) for name in calls}
    # 4 seconds a call are repeated twice, 3 seconds thrice; 9 not at all.
    assert products._best_seconds(runs) == {"short": 3.0, "long": 8.0}
    assert calls == {"short": 2 + 2 + 3, "long": 4}


def test_command_prints_json_and_writes_the_table(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(products, "product_bench", lambda tokens: asked.append(tokens) or {"rows": "cut down"})
    monkeypatch.setattr(products, "table", lambda figures: f"rows {figures['rows']}")
    assert main(["bench", "--products", "--tokens", "32,16", "--table", str(tmp_path / "table.md")]) == 0
    assert main(["bench", "--products"]) == 0
    assert asked == [(32, 16), None]
    assert json.loads(capsys.readouterr().out.split("}")[0] + "}") == {"rows": "cut down"}
    assert (tmp_path / "table.md").read_text() == "rows cut down"


@pytest.mark.parametrize(
    "words, told",
    [
        ("--products --tokens 17", "--tokens is 17, but must be multiples of 16"),
        ("--products --tokens 0", "--tokens is 0"),
        ("--products --tokens 16,", "--tokens is 16,,"),
        ("--products --steps 12", "--steps is for a model"),
        ("--products --baseline bf16", "--baseline is for a model"),
        ("--products --decode", "--decode is for a model, and --products times products alone"),
        ("--products --table tests", "--table: tests is a directory; name a file"),
        ("--products --config.training.seed=1", "reads no config file"),
        ("--products --config configs/tiny.py", "not allowed with"),
        ("", "one of the arguments --config --products is required"),
        ("--config configs/tiny.py --tokens 16", "--tokens is for --products"),
        ("--config configs/tiny.py --decode --checkpoint", "--checkpoint is for a train step"),
        ("--config configs/tiny.py --decode --distributed", "--distributed is for a train step"),
        (
            "--config configs/tiny.py --decode --coordinator h:1 --processes 2 --process 0",
            "--coordinator is for a train",
        ),
    ],
)
def test_options_without_effect_are_told(words, told, capsys, monkeypatch, repository):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(cluster, "find", lambda *_: None)
    monkeypatch.setattr(cluster, "join", lambda _: None)
    assert main(["bench", *words.split()]) == 2
    assert told in capsys.readouterr().err
