"""A user's reward in a process of its own, which is killed when a call takes too long.

A Python function cannot be stopped from outside: a thread that hangs stays, and a regular expression gone astray holds
the interpreter with it. Both ends of the process are here. It is begun as a new program, never as a fork of one with
JAX's threads, and runs this file as a script: then nothing of dsjax is imported, and starting takes as long as Python.
"""

import contextlib
import json
import math
import numbers
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Reward = Callable[[str, str, str], float]  # (prompt, completion, answer) -> reward

START_SECONDS = 60.0  # to load the user's file, and what it imports
GRACE_SECONDS = 5.0  # after a deadline; then a process whose parent has gone ends itself
LONGEST_SECONDS = 86_400.0  # what a socket and an interval timer take for sure
FAILED_STARTS = 3  # in a row; then it is not tried again
HEADER = struct.Struct(">Q")
TOLD = 200  # characters of an exception


class RewardError(Exception):
    """Why there is no reward, in a phrase."""


def load(source: str, file: str, name: str) -> Any:
    """What `name` is after running `source`, the text of `file`; None where it is nothing."""
    namespace: dict[str, Any] = {"__name__": "dsjax_reward", "__file__": file}
    exec(compile(source, file, "exec"), namespace)
    return namespace.get(name)


def score(reward: Reward, prompt: str, completion: str, answer: str) -> float:
    """The reward as a finite float. Raises RewardError for anything else that the call comes to."""
    try:
        value = reward(prompt, completion, answer)
        if not isinstance(value, numbers.Real):
            raise RewardError(f"returned {type(value).__name__}, not a number")
        number = float(value)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(tell(error)) from error
    if not math.isfinite(number):
        raise RewardError(f"returned {number}")
    return number


def tell(error: BaseException) -> str:
    """An exception on one short line; it may be a user's own, with texts of megabytes."""
    text = ""
    with contextlib.suppress(Exception):
        text = " ".join(str(error)[:TOLD].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Worker:
    """The process that computes one reward: started when first needed, and again after each time it was killed."""

    def __init__(self, source: str, file: str, name: str, timeout_seconds: float):
        self._hello = {"path": [str(place) for place in sys.path], "reward": [source, file, name]}
        self._seconds = min(timeout_seconds, LONGEST_SECONDS)
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._failed_starts = 0

    def score(self, prompt: str, completion: str, answer: str) -> float:
        """The reward, after at most timeout_seconds, and START_SECONDS where the process has to be started.

        Raises RewardError where there is none; the process is then gone unless the reward itself raised.
        """
        if self._running is None:
            self._start()
        reply = self._ask([prompt, completion, answer], self._seconds)
        if "error" in reply:
            raise RewardError(reply["error"])
        return reply["reward"]

    def close(self) -> None:
        """Kills the process, and those that it started."""
        if self._running is None:
            return
        process, ours = self._running
        self._running = None
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a dead file server stays
            process.wait(GRACE_SECONDS)

    def _start(self) -> None:
        if self._failed_starts >= FAILED_STARTS:
            raise RewardError(f"its process could not be started {FAILED_STARTS} times in a row")
        self._failed_starts += 1
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), str(self._seconds)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what it prints must not get into what a command prints
                start_new_session=True,  # one group to kill, and Ctrl-C stays with the run
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a reward that imports JAX must not take the run's chips
            )
        except OSError as error:
            ours.close()
            raise RewardError(f"its process could not be started ({tell(error)})") from error
        finally:
            theirs.close()
        self._running = process, ours
        reply = self._ask(self._hello, START_SECONDS)
        if "error" in reply:
            self.close()
            raise RewardError(f"its file could not be loaded again ({reply['error']})")
        self._failed_starts = 0

    def _ask(self, message: Any, seconds: float) -> dict[str, Any]:
        """The reply to a message. Raises RewardError, after killing the process, where none comes in time."""
        assert self._running is not None
        ours = self._running[1]
        try:
            deadline = time.monotonic() + seconds
            ours.settimeout(seconds)
            _send(ours, message)
            return _receive(ours, deadline)
        except TimeoutError:
            self.close()
            raise RewardError(f"took more than {seconds:g} s") from None
        except (OSError, EOFError, ValueError):
            self.close()
            raise RewardError("its process ended") from None
        except BaseException:  # interrupted: the reply, when it came, would be taken for that to the next message
            self.close()
            raise


def _send(end: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode("ascii")  # lone surrogates and null characters go as escapes
    end.sendall(HEADER.pack(len(data)) + data)


def _receive(end: socket.socket, deadline: float | None = None) -> Any:
    """The next message. Raises TimeoutError after the deadline (time.monotonic()), EOFError at a closed end."""
    (size,) = HEADER.unpack(_exactly(end, HEADER.size, deadline))
    return json.loads(_exactly(end, size, deadline))


def _exactly(end: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            end.settimeout(left)
        part = end.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main() -> None:
    """The process: loads the reward, then answers calls until the other end closes.

    The interval timer kills it from the kernel, whatever the interpreter is stuck in: nobody else would, once the
    parent has gone.
    """
    end, seconds = socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])
    hello = _receive(end)
    sys.path[:] = hello["path"]
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS + GRACE_SECONDS)
    try:
        reward = load(*hello["reward"])
    except BaseException as error:
        _send(end, {"error": tell(error)})
        return
    _send(end, {})
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        texts = _receive(end)
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
        try:
            reply: dict[str, Any] = {"reward": score(reward, *texts)}
        except RewardError as error:
            reply = {"error": str(error)}
        except BaseException as error:  # sys.exit() in a reward ends neither the run nor its process
            reply = {"error": tell(error)}
        _send(end, reply)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):  # the other end has closed
        main()
