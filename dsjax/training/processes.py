"""Several processes that train as one: what they agree on, and how they end together."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsjax.config import ConfigError


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process; waits for all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))


def meet() -> None:
    """Waits for all processes, as long as it takes; for after compiling, which takes one of them longer than another.

    Gloo gives a new group 30 s to find each other. The group of all has met when the run began, so it waits here.
    """
    any_of(False)


@contextlib.contextmanager
def refused_by_all() -> Iterator[None]:
    """A ConfigError in here, raised by one process, becomes one in each: none is left waiting for the others.

    What is in here must not wait for other processes.
    """
    refused: ConfigError | None = None
    try:
        yield
    except ConfigError as error:
        refused = error
    if any_of(refused is not None):
        raise refused or ConfigError("another process cannot begin, and says why; this one is in order")
