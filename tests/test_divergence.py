"""Losses that are no numbers are skipped, spikes are gone back from, and what does not help ends the run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from tiny_runs import STEPS, T, change, exact, quick_runs, tiny_run

from dsjax.config import Config, DivergenceConfig
from dsjax.data.loader import Loader
from dsjax.data.prepare import prepare
from dsjax.training import checkpoint, loop
from dsjax.training.divergence import Halt, Spike, Watch, leave_out, place
from dsjax.training.loop import train
from dsjax.training.monitor import read_rows
from dsjax.training.objective import language_model_loss
from dsjax.training.state import build_network
from dsjax.training.step import make_train_step, pretrain_step
from dsjax.training.workdir import CHECKPOINTS, METRICS

RULE = DivergenceConfig(window=8, spike_std=3.0, spike_rise=0.5, max_skipped=2)


def judge(losses, rule=RULE, past=()):
    watch = Watch(rule, past)
    skipped = [loss is None for loss in losses]
    rows = [
        {"step": step, "loss": np.float32(np.nan if loss is None else loss), "update_skipped": skip}
        for step, (loss, skip) in enumerate(zip(losses, skipped, strict=True), 1)
    ]
    return [watch.judge(row) for row in rows], watch


def test_a_loss_far_above_the_ones_before_is_a_spike():
    *before, last = judge([2.0, 2.1, 1.9, 2.0, 9.0])[0]
    assert before == [None] * 4
    assert last.step == 5 and last.loss == 9.0
    np.testing.assert_allclose([last.mean, last.std], [2.0, np.std([2.0, 2.1, 1.9, 2.0])], rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "rule"),
    [
        ([2.0, 2.0, 2.0, 9.0], RULE),  # half of the window is not there
        ([2.0, 2.0, 2.0, 2.0, 2.5], RULE),  # no rise of more than 0.5
        ([1.0, 3.0, 1.0, 3.0, 4.9], RULE),  # within 3 standard deviations
        ([5.0, 4.0, 3.0, 2.0, 1.0], RULE),
        ([2.0, 2.0, 2.0, 2.0, 9.0], dataclasses.replace(RULE, spike_std=None)),
    ],
)
def test_other_losses_are_none(losses, rule):
    assert judge(losses, rule)[0] == [None] * len(losses)


def test_a_spike_does_not_become_part_of_the_past_and_the_past_survives_a_restart():
    found, watch = judge([2.0, 2.0, None, 2.0, 2.0, 9.0])
    assert found[-1] == Spike(6, 9.0, 2.0, 0.0)
    assert watch.losses == [2.0, 2.0, None, 2.0, 2.0]
    assert judge([9.0], past=json.loads(json.dumps(watch.losses)))[0] == [Spike(1, 9.0, 2.0, 0.0)]


def test_too_many_skipped_steps_are_told():
    with pytest.raises(Halt, match="3 of the last 5 steps .* more than divergence.max_skipped = 2") as told:
        judge([2.0, None, None, 2.0, None])
    assert told.value.step == 5
    judge([None, None, *[2.0] * 7, None])  # the first is out of sight
    blind = dataclasses.replace(RULE, window=2)
    with pytest.raises(Halt, match="2 of the last 2 steps .* all that divergence.window sees"):
        judge([None, None], rule=blind)


def test_what_is_left_out_of_the_data_order():
    """Against a list from which the sequences are really removed."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        order, skips = list(range(400)), ()
        for _ in range(4):
            first = int(rng.integers(0, 100))
            end = first + int(rng.integers(1, 20))
            # What came later than `first` has not been trained on any more: earlier removals after it are undone.
            end_place = order[end]
            skips = leave_out(first, end, skips)
            order = order[:first] + list(range(end_place, 600))
            assert [place(i, skips) for i in range(150)] == order[:150]


@pytest.fixture(scope="module")
def poisoned():
    """(state, compiled step) of which a batch with the token 49 at its beginning gives the factor 0 * inf."""
    config, mesh = small.config(small.ONE_LAYER), small.mesh()
    plain = language_model_loss(build_network(config, mesh), config)

    def loss_fn(params, bias, tokens, hyperparameters):
        total, metrics = plain(params, bias, tokens, hyperparameters)
        poison = jnp.where(tokens[0, 0] == 49, jnp.nan, 1.0)
        return total * poison, metrics  # only the gradient is not finite: the reported loss is

    return (lambda: small.state(config, mesh)), make_train_step(loss_fn, config, mesh), pretrain_step(config, mesh)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poisoned):
    make, step, plain = poisoned
    rates = {"learning_rate": 0.01, "bias_update_speed": 0.125, "mtp_loss_weight": 0.3}
    good, bad = small.tokens(2, 8, 10, vocab_size=48), small.tokens(2, 8, 10, vocab_size=48)
    bad[1, 0, 0] = 49
    before = jax.tree.map(np.array, make())
    after, metrics = step(make(), jnp.asarray(bad), 2, rates)
    assert metrics["update_skipped"] and np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert int(after.step) == 1
    for name in ("params", "router_bias", "opt_state"):
        for a, b in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    # The batch after it does what it would have done without it.
    after, metrics = step(after, jnp.asarray(good), 2, rates)
    wanted, wanted_metrics = plain(make(), jnp.asarray(good), 2, rates)
    assert not metrics["update_skipped"] and float(metrics["loss"]) == float(wanted_metrics["loss"])
    small.assert_trees_close(after.params, jax.tree.map(np.array, wanted.params), 1e-6)
    assert int(after.step) == 2


def test_skipping_can_be_turned_off(poisoned):
    config, mesh = small.config(small.ONE_LAYER), small.mesh()
    config = dataclasses.replace(config, divergence=DivergenceConfig(skip_nonfinite=False))
    state, metrics = pretrain_step(config, mesh)(
        jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, poisoned[0]()),
        jnp.asarray(small.tokens(1, 8, 10)),
        1,
        {"learning_rate": 0.01, "bias_update_speed": 0.125, "mtp_loss_weight": 0.3},
    )
    assert "update_skipped" not in metrics and np.isnan(float(metrics["loss"]))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    config = tiny_run(tmp_path_factory.mktemp("run"))
    config = change(config, "mesh", data=8, expert=1)
    config = change(config, "checkpoint", every_steps=3)
    config = dataclasses.replace(
        config, divergence=DivergenceConfig(window=4, spike_std=3.0, spike_rise=3.0, skip_steps=1, max_skipped=1)
    )
    return change(config, "training", initial_batch_size=None, batch_ramp_tokens=0, batch_size=8)


def rows_of(config, indices):
    return Loader(prepare(config.data, progress=False), config.data, config.training.seed).rows(indices)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_runs():
        yield


@pytest.fixture
def inject(monkeypatch):
    """inject(bad batches, spoil): what the step makes of one of them, `spoil` changes."""

    def wrap(bad, spoil):
        def compile_step(*arguments, original=loop.compile_step):
            compiled = original(*arguments)

            def step(state, tokens, *rest):
                state, metrics = compiled(state, tokens, *rest)
                host = np.asarray(tokens).reshape(-1, T + 1)
                if any((host == batch).all() for batch in bad):
                    state, metrics = spoil(state, metrics)
                return state, metrics

            return step

        monkeypatch.setattr(loop, "compile_step", compile_step)

    return wrap


def spike(state, metrics):
    return dataclasses.replace(state, params=jax.tree.map(lambda p: p * 3, state.params)), metrics | {
        "loss": metrics["loss"] + 50
    }


def test_a_spike_is_gone_back_from_and_its_batch_is_left_out(config, tmp_path, inject, capsys):
    bad = rows_of(config, range(32, 40))  # of step 5
    inject([bad], spike)
    summary = train(config, tmp_path / "run")
    assert summary.exit_code == 0 and summary.step == STEPS
    told = capsys.readouterr().out
    assert "WARNING: the loss of step 5 is " in told
    assert "going back to step 3; sequences 32 to 39 of the data order are left out" in told
    rows = read_rows(tmp_path / "run" / METRICS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [len(row.get("rollbacks", ())) for row in rows] == [0, 0, 0, 1, 0, 0]
    assert rows[3]["rollbacks"][0]["step"] == 5 and rows[3]["rollbacks"][0]["left_out"] == [32, 40]

    # The same as a run whose data never had that batch.
    monkeypatch = pytest.MonkeyPatch()
    original = Loader.rows

    def without(self, indices):
        return original(self, [index + 8 * (index >= 32) for index in indices])

    monkeypatch.setattr(Loader, "rows", without)
    train(config, tmp_path / "clean")
    monkeypatch.undo()
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_rows(tmp_path / "clean" / METRICS)]
    # What is left out stays so after a restart.
    train(change(config, "training", total_steps=STEPS + 2), tmp_path / "run")
    longer = read_rows(tmp_path / "run" / METRICS)
    assert [row["step"] for row in longer] == list(range(1, STEPS + 3))
    assert checkpoint.read_meta(tmp_path / "run" / CHECKPOINTS, STEPS + 2)["skips"] == [[32, 8]]


def test_a_run_killed_after_going_back_comes_to_the_same_end(config, tmp_path, inject, monkeypatch):
    inject([rows_of(config, range(32, 40))], spike)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "should_stop", lambda interrupt, done: done == 4)
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    whole, stopped = exact(tmp_path / "whole"), exact(tmp_path / "stopped")
    assert [row["loss"] for row in whole] == [row["loss"] for row in stopped]


def test_spikes_that_come_back_end_the_run_and_leave_the_batch(config, tmp_path, inject, capsys):
    everything = [rows_of(config, range(first, first + 8)) for first in range(32, 400, 8)]
    inject(everything, spike)
    summary = train(config, tmp_path)
    assert summary.exit_code == 2
    told = capsys.readouterr().out
    assert "stopped: the loss of step 5 is" in told and "going back to step 3 has not helped 3 times" in told
    kept = np.load(tmp_path / "batch-5.npz", allow_pickle=False)
    assert kept["step"] == 5 and kept["indices"].tolist() == list(range(56, 64))
    np.testing.assert_array_equal(kept["tokens"], rows_of(config, range(56, 64)))
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [3]


def test_spikes_can_be_left_alone(config, tmp_path, inject):
    inject([rows_of(config, range(32, 40))], spike)
    summary = train(change(config, "divergence", spike_std=None), tmp_path)
    rows = read_rows(tmp_path / METRICS)
    assert summary.step == STEPS and rows[4]["loss"] > 50 and not any("rollbacks" in row for row in rows)


def test_steps_that_are_not_finite_are_counted_and_too_many_end_the_run(config, tmp_path, inject, capsys):
    def skipped(state, metrics):
        return state, metrics | {"loss": jnp.float32(jnp.nan), "update_skipped": jnp.bool_(True)}

    bad = [rows_of(config, range(first, first + 8)) for first in (8, 24)]  # of steps 2 and 4
    inject(bad, skipped)
    summary = train(config, tmp_path)
    assert summary.exit_code == 2 and summary.step == 4
    rows = read_rows(tmp_path / METRICS)
    assert [row["update_skipped"] for row in rows] == [False, True, False, True]
    assert [row["loss"] is None for row in rows] == [False, True, False, True]
    told = capsys.readouterr().out
    assert "WARNING: loss or gradient of step 2 is not finite: its update is left out" in told
    assert "stopped: 2 of the last 4 steps had a loss or gradient that is not finite" in told
    np.testing.assert_array_equal(np.load(tmp_path / "batch-4.npz")["tokens"], rows_of(config, range(24, 32)))
