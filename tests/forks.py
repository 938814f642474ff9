"""Runs in processes of their own that start quickly: forked from one that has imported everything and computed nothing.

python tests/forks.py    reads lines of JSON from standard input: [config, workdir, log file]
                         answers each with a line: the id of the process that trains
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax


class Forks:
    """Context that starts runs."""

    def __init__(self, devices: int, cache: str):
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "DSJAX_TEST_CACHE": cache}
        self._started: list[Run] = []
        self._parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: Any) -> None:
        for run in self._started:
            with contextlib.suppress(ProcessLookupError):
                if run.code() is None:
                    run.kill(signal.SIGKILL)
        self._parent.stdin.close()
        self._parent.wait()

    def start(self, config: dict[str, Any], workdir: Path, log: Path) -> "Run":
        self._parent.stdin.write(json.dumps([config, str(workdir), str(log)]) + "\n")
        self._parent.stdin.flush()
        self._started = [Run(int(self._parent.stdout.readline()), log)]  # one at a time: a log belongs to the last
        return self._started[0]


class Run:
    """A process that trains."""

    def __init__(self, process: int, log: Path):
        self.process, self._log = process, log

    def kill(self, number: int) -> None:
        os.kill(self.process, number)

    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        ended = Path(f"{self._log}.code")
        return int(ended.read_text() or 99) if ended.exists() else None

    def wait(self, seconds: float = 600.0) -> int:
        end = time.monotonic() + seconds
        while (code := self.code()) is None:
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)
        return code


def _serve() -> None:
    from dsjax.config import from_dict
    from dsjax.training.loop import train

    jax.config.update("jax_compilation_cache_dir", os.environ["DSJAX_TEST_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for line in sys.stdin:
        config, workdir, log = json.loads(line)
        Path(f"{log}.code").unlink(missing_ok=True)
        # Two forks: the first waits for the second and writes down how it ended.
        reader, writer = os.pipe()
        if os.fork() == 0:
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                code = 1
                try:
                    code = train(from_dict(config), workdir).exit_code
                except BaseException as error:
                    print(repr(error))
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.write(writer, f"{child}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            Path(f"{log}.code.tmp").write_text(str(code))
            os.replace(f"{log}.code.tmp", f"{log}.code")
            os._exit(0)
        print(os.read(reader, 100).decode().strip(), flush=True)
        os.close(reader)
        os.close(writer)


if __name__ == "__main__":
    _serve()
