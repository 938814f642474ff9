"""One run in one directory at a time. No JAX."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dsjax.config import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds `workdir` until the end of the context, or of the process, however that ends: the kernel lets go of it.

    Raises:
      ConfigError: another process holds it, and which; or it cannot be locked.
    """
    try:
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{workdir} cannot be written to ({error.strerror}); choose another --workdir") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"{workdir} is in use by {holder}; stop it, or choose another directory for this run"
            ) from error
        except OSError as error:  # some file systems of clusters know no locks
            raise ConfigError(
                f"{workdir} cannot be locked ({error.strerror}), so two runs could write to it; choose a --workdir on"
                " a file system with flock"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # the file stays: removed, it could be locked twice
