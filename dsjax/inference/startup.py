"""How long it took until the first text, and how much of that was compiling: cold or warm."""

import time

import jax

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class Startup:
    """A clock that begins when it is made, and counts programs taken from the compile cache and programs compiled."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._counts = {HIT: 0, MISS: 0}
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: object) -> None:
        if event in self._counts:
            self._counts[event] += 1

    def told(self) -> str:
        """One line, from now."""
        seconds, hits, misses = time.perf_counter() - self._start, self._counts[HIT], self._counts[MISS]
        kind = "warm" if hits and not misses else "cold" if misses else "not cached"
        return f"{kind} start: {seconds:.1f} s; {hits} programs from the compile cache, {misses} compiled"
