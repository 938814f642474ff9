"""Progress of long work: one updating line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

PLAIN_SECONDS = 15.0  # between lines where there is no terminal

Item = TypeVar("Item")


def shown(
    items: Iterable[Item], position: Callable[[Item], int], total: int, unit: str, title: str, progress: bool
) -> Iterator[Item]:
    """The same items, with how far they are shown on standard error, rate and time left included.

    `position(item)` of `total`, both in `unit`, is how far the work is when the item has been used.
    """
    live = progress and sys.stderr.isatty()
    start = told = time.monotonic()
    with tqdm(total=total, unit=unit, unit_scale=True, desc=title, disable=not live, leave=False) as bar:
        for item in items:
            yield item
            bar.update(position(item) - bar.n)
            if progress and not live and time.monotonic() - told > PLAIN_SECONDS:
                told = time.monotonic()
                share = position(item) / max(1, total)
                left = (told - start) * (1 / max(share, 1e-9) - 1)
                print(f"{title}: {share:.0%}, {left:.0f} s left", file=sys.stderr, flush=True)
