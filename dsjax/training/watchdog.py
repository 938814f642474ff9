"""A run that hangs ends itself, and says where it hung."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

STDERR = 2  # its descriptor, which is there whatever became of sys.stderr
STUCK = 1  # exit code: a failure after which the run can go on


class Watchdog:
    """Context that ends the process where `beat` is not called for `seconds`: with the stacks of all threads.

    Collectives wait for ever for a process that is alive and stuck. None of JAX's calls can be interrupted then, so
    the process exits at once, with code 1. Where even Python stands still, the system's timer does it a little later.

    seconds: None turns it off.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Says that the run is alive."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self.beat()
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._seconds is not None:
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._over.wait(min(self._seconds / 4, 5.0)):
            self._arm()
            if time.monotonic() - self._last > self._seconds:
                self._end()

    def _arm(self) -> None:
        # In C, and not in need of the interpreter's lock, which a stuck thread may hold.
        assert self._seconds is not None
        faulthandler.dump_traceback_later(2 * self._seconds + 5, exit=True, file=STDERR)

    def _end(self) -> None:
        told = (
            f"\ndsjax: no step has ended for {self._seconds:g} s (monitor.watchdog_seconds), so this process ends; "
            "start the run again, and it goes on from the newest checkpoint. Where each thread stood:\n"
        )
        sys.stdout.flush()
        os.write(STDERR, told.encode())
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        os._exit(STUCK)
