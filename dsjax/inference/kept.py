"""dsjax cache: what is kept on disk between calls. Whatever is deleted is made again when it is needed.

Compiled programs (XLA's persistent cache), prepared data, and latents of prompts, each in a directory of its own.
"""

import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsjax.config import ConfigError, MonitorConfig
from dsjax.data.prepare import DELETED, MANIFEST
from dsjax.inference.prefix import DIRECTORY as PREFIXES
from dsjax.inference.prefix import SUFFIX

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Entry:
    """One thing that can be deleted on its own."""

    kind: str
    path: Path
    bytes: int
    used: float  # seconds since the epoch, as far as the file system tells


def places() -> dict[str, Path]:
    """Where each kind is kept where no configuration says otherwise."""
    compiled = MonitorConfig().compile_cache or ""
    named = {"compiled": compiled, "data": "~/.cache/dsjax/data", "prefix": PREFIXES}
    return {kind: Path(place).expanduser() for kind, place in named.items()}


def entries(kind: str | None = None, directory: str | None = None) -> list[Entry]:
    """What is there, of one kind or of all, the least recently used first."""
    where = places() if kind is None else {kind: Path(directory).expanduser() if directory else places()[kind]}
    found = []
    for name, place in where.items():
        for path in place.iterdir() if place.is_dir() else ():
            if _belongs(name, path):
                found.append(_entry(name, path))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: (entry.used, entry.path))


def _belongs(kind: str, path: Path) -> bool:
    """Whether it is one of ours, and complete; what others put there is left alone."""
    if path.name.startswith("."):
        return False
    if kind == "data":
        return (path / MANIFEST).is_file()
    if kind == "prefix":
        return path.suffix == SUFFIX and path.is_file()
    return path.is_file() and path.name.endswith("-cache")


def _entry(kind: str, path: Path) -> Entry | None:
    try:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        stats = [file.stat() for file in files]
        used = max((max(s.st_mtime, s.st_atime) for s in stats), default=path.stat().st_mtime)
    except OSError:  # deleted meanwhile
        return None
    return Entry(kind, path, sum(s.st_size for s in stats), used)


def listed(found: Sequence[Entry]) -> list[str]:
    """A line for each: kind, size, days since it was used, place."""
    days = lambda entry: (time.time() - entry.used) / 86400  # noqa: E731
    return [f"{e.kind:8}  {human(e.bytes):>9}  {days(e):6.1f} days  {e.path}" for e in found] or ["nothing is kept"]


def sizes(found: Sequence[Entry]) -> list[str]:
    """A line for each kind, and one for all."""
    kinds = {kind: [e for e in found if e.kind == kind] for kind in dict.fromkeys(e.kind for e in found)}
    lines = [f"{kind:8}  {human(sum(e.bytes for e in some)):>9}  {len(some)} entries" for kind, some in kinds.items()]
    return [*lines, f"{'all':8}  {human(sum(e.bytes for e in found)):>9}  {len(found)} entries"]


def prune(found: Sequence[Entry], max_size: str | None, older_than: float | None) -> str:
    """Deletes what was not used for `older_than` days, then the least recently used until `max_size` is kept.

    Without either, everything. Raises ConfigError for a size that is none.
    """
    limit = None if max_size is None else parse_size(max_size)
    if older_than is not None and not older_than >= 0:
        raise ConfigError(f"--older-than is {older_than}, but must be a number of days")
    left, freed, deleted = sum(e.bytes for e in found), 0, 0
    for entry in found:
        is_old = older_than is not None and time.time() - entry.used > older_than * 86400
        is_over = limit is not None and left - freed > limit
        if is_old or is_over or (limit is None and older_than is None):
            _delete(entry)
            freed += entry.bytes
            deleted += 1
    return f"deleted {deleted} of {len(found)} entries, {human(freed)}; {human(left - freed)} are kept"


def _delete(entry: Entry) -> None:
    """A directory disappears at once, so that nobody finds half of it."""
    if entry.path.is_dir():
        hidden = entry.path.with_name(f".{entry.path.name}{DELETED}{os.getpid()}")
        try:
            os.rename(entry.path, hidden)
        except FileNotFoundError:
            return
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        entry.path.unlink(missing_ok=True)
        entry.path.with_name(entry.path.name.removesuffix("-cache") + "-atime").unlink(missing_ok=True)


def parse_size(text: str) -> int:
    """Bytes of "500M", "10G", "123456"; units are powers of 1,024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--max-size is {text!r}, but must be a size such as 500M or 10G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def human(size: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
