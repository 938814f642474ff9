"""SIGINT and SIGTERM are normal events: finish the step, save, leave."""

import os
import signal
import sys
import threading
from types import TracebackType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}  # a scheduler's SIGTERM, obeyed, is no failure


class Interrupt:
    """Context in which the first SIGINT or SIGTERM is noted in `requested`, and a second one leaves at once.

    Until `has_begun` is set the first one leaves at once, too: there is nothing to save. Python runs signal handlers
    between bytecodes of the main thread, which may sit in the compiler for minutes, so a thread of its own reads the
    signals from a pipe. Only the main thread can install handlers; in any other, and with `enabled=False`, this
    context does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.requested: signal.Signals | None = None
        self.has_begun = False
        self._installed = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupt":
        if self._installed:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._old_handlers = {number: signal.signal(number, _ignore) for number in EXIT_CODES}
            self._old_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="interrupt", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._installed:
            signal.set_wakeup_fd(self._old_descriptor)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)

    def _watch(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] in EXIT_CODES:
                self._receive(signal.Signals(byte[0]))

    def _receive(self, received: signal.Signals) -> None:
        if not self.has_begun:
            _leave(f"{received.name} before the first step: nothing to save", EXIT_CODES[received])
        if self.requested:
            _leave(f"{received.name} again: leaving without saving; the last checkpoint stands", 128 + received)
        self.requested = received
        _tell(f"{received.name}: finishing this step, then saving; once more to leave at once")


def _ignore(number: int, frame: object) -> None:
    """A handler of our own, so that the signal reaches the pipe instead of ending the process."""


def _tell(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")  # in one piece: the main thread may be printing, too
    sys.stderr.flush()


def _leave(text: str, code: int) -> None:
    _tell(text)
    sys.stdout.flush()
    os._exit(code)  # the main thread may be deep in compiled code, which no exception reaches
