"""Where tokens travel: a layout puts every assignment of a rank into one row of one round, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import dispatch as travel
from dsjax.planning.buffers import make_buffer

# tokens, choices, experts of this rank, ranks, capacity factor
SHAPES = [(24, 3, 4, 2, 1.0), (24, 3, 1, 8, 1.0), (40, 2, 8, 1, 1.25), (7, 4, 2, 4, 1.5), (100, 6, 16, 4, 1.0)]


def routing(seed: int, tokens: int, choices: int, experts: int) -> np.ndarray:
    """Distinct experts for each token, some of them far more popular than others."""
    rng = np.random.default_rng(seed)
    popularity = rng.exponential(size=experts) ** (1 + seed % 4) + 1e-3
    chosen = [rng.choice(experts, choices, replace=False, p=popularity / popularity.sum()) for _ in range(tokens)]
    return np.array(chosen, np.int32)


def layouts(experts_MK: np.ndarray, shape: tuple, rank: int):
    """(buffer, the layouts of all its rounds) of one rank, as NumPy arrays."""
    tokens, choices, experts, ranks, capacity_factor = shape
    buffer = make_buffer(tokens, choices, experts, ranks, capacity_factor)
    by_expert = travel.sort_assignments(jnp.asarray(experts_MK), rank * experts, experts)
    rounds = int(travel.rounds_needed(by_expert, buffer))
    return buffer, [jax.tree.map(np.asarray, travel.lay_out(by_expert, buffer, r)) for r in range(rounds)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_every_own_assignment_has_exactly_one_row_in_one_round(shape, seed):
    tokens, choices, experts, ranks, _ = shape
    experts_MK = routing(seed, tokens, choices, experts * ranks)
    for rank in {0, ranks - 1}:
        buffer, rounds = layouts(experts_MK, shape, rank)
        own = {a for a, e in enumerate(experts_MK.reshape(-1)) if rank * experts <= e < (rank + 1) * experts}
        seen: list[int] = []
        for layout in rounds:
            ends = np.cumsum(layout.sizes_E)
            assert np.all(layout.sizes_E % buffer.block == 0) and ends[-1] <= buffer.rows
            for row, assignment in enumerate(layout.assignment_C):
                if assignment == tokens * choices:
                    assert layout.token_C[row] == tokens
                    continue
                seen.append(int(assignment))
                assert layout.token_C[row] == assignment // choices
                assert layout.row_MK.reshape(-1)[assignment] == row
                group = np.searchsorted(ends, row, side="right")
                assert rank * experts + group == experts_MK.reshape(-1)[assignment]
            here = {a for a, row in enumerate(layout.row_MK.reshape(-1)) if row != buffer.rows}
            assert here == set(layout.assignment_C.tolist()) - {tokens * choices}
            assert len(here) <= buffer.assignments
        assert sorted(seen) == sorted(own)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_worst_imbalance_takes_more_rounds_of_the_same_buffer(shape):
    tokens, choices, experts, ranks, capacity_factor = shape
    buffer, rounds = layouts(np.tile(np.arange(choices, dtype=np.int32), (tokens, 1)), shape, 0)
    mine = tokens * min(choices, experts)
    assert len(rounds) == -(-mine // buffer.assignments)
    if ranks > 1:
        assert buffer.assignments <= np.ceil(capacity_factor * tokens * choices / ranks)
        assert buffer.rows < buffer.assignments + (experts + 1) * buffer.block
    held = [int(np.sum(layout.assignment_C < tokens * choices)) for layout in rounds]
    assert sum(held) == mine and all(count == buffer.assignments for count in held[:-1])


def test_a_rank_without_assignments_has_one_empty_round():
    shape = (24, 3, 4, 2, 1.0)
    experts_MK = np.tile(np.arange(3, dtype=np.int32), (24, 1))
    buffer, rounds = layouts(experts_MK, shape, 1)
    assert len(rounds) == 1
    assert (
        np.all(rounds[0].sizes_E == 0) and np.all(rounds[0].token_C == 24) and np.all(rounds[0].row_MK == buffer.rows)
    )


def test_dispatch_and_combine_are_each_others_transpose():
    shape = (24, 3, 4, 2, 1.0)
    rng = np.random.default_rng(0)
    buffer, rounds = layouts(routing(1, 24, 3, 8), shape, 1)
    layout = jax.tree.map(jnp.asarray, rounds[0])
    x, rows = (jnp.asarray(rng.standard_normal((n, 5)), jnp.float32) for n in (24, buffer.rows))
    matrix = (np.arange(24)[None] == np.asarray(layout.token_C)[:, None]).astype(np.float32)  # [rows, tokens]
    sent, back = jax.vjp(lambda x: travel.dispatch(x, layout), x)
    np.testing.assert_allclose(sent, matrix @ x, atol=1e-6)
    np.testing.assert_allclose(back(rows)[0], matrix.T @ rows, atol=1e-5)
    summed, spread = jax.vjp(lambda rows: travel.combine(rows, layout), rows)
    np.testing.assert_allclose(summed, matrix.T @ rows, atol=1e-5)
    np.testing.assert_allclose(spread(x)[0], matrix @ x, atol=1e-6)
    weights = jnp.asarray(rng.standard_normal((24, 3)), jnp.float32)
    assigned = np.arange(72)[None] == np.asarray(layout.assignment_C)[:, None]
    of_rows, pull = jax.vjp(lambda w: travel.dispatch_weights(w, layout), weights)
    np.testing.assert_allclose(of_rows, assigned @ weights.reshape(-1), atol=1e-6)
    np.testing.assert_allclose(pull(rows[:, 0])[0].reshape(-1), assigned.T @ rows[:, 0], atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_add_up_with_their_gradients(rounds, recompute):
    scale = np.arange(1, 6, dtype=np.float32)
    x = np.linspace(0.5, 1, 4, dtype=np.float32)
    one_round = lambda x, scale, r: (jnp.sin(x * scale[r]), r)  # noqa: E731

    def run(x):
        return travel.in_rounds(one_round, x, jnp.asarray(scale), jnp.int32(rounds), recompute=recompute)

    y, pull, count = jax.vjp(run, x, has_aux=True)
    assert count == sum(range(rounds))
    each = x[None] * scale[:rounds, None]
    np.testing.assert_allclose(y, np.sin(each).sum(0), rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones(4))[0], (np.cos(each) * scale[:rounds, None]).sum(0), rtol=1e-5, atol=1e-5)
