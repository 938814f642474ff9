"""Which checkpoints stay: the last, every Kth, the best by validation. No JAX."""

from collections.abc import Collection, Mapping


def kept(
    steps: Collection[int],
    losses: Mapping[int, float | None],
    *,
    keep_last: int,
    keep_every: int | None = None,
    keep_best: int | None = None,
) -> set[int]:
    """The steps that stay of `steps`.

    Args:
      steps: those of all checkpoints.
      losses: validation losses; a step without one is never among the best.
      keep_last: the newest stay.
      keep_every: so do multiples of it.
      keep_best: and as many with the lowest losses; of equal ones the later.
    """
    newest = set(sorted(steps)[-keep_last:])
    milestones = {step for step in steps if keep_every and step % keep_every == 0}
    measured = [(loss, -step) for step in steps if (loss := losses.get(step)) is not None]
    return newest | milestones | {-step for _, step in sorted(measured)[: keep_best or 0]}
