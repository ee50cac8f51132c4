"""Hashes of large files, cached by path, size and modification time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from fidelora.atomic import write_atomically
from fidelora.errors import OutputError
from fidelora.recipe import file_sha256

_SETTLED_S = 2.0
"""Age in seconds from which a file's hash is cached: two writes within one clock tick of the file
system have the same time."""
_MAX_ENTRIES = 1000  # in the cache file; the oldest are dropped


def remembered_sha256(path: Path) -> str:
    """Return the sha256 of a file, from the user's cache if the file has not changed since.

    The cache is `fidelora/hashes.json` in `XDG_CACHE_HOME` (`~/.cache`). It can be deleted safely.

    Raises:
        WeightsFileError: the file cannot be read.
    """
    path = path.resolve()
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    known = _read_cache()
    match known.get(str(path)):
        case [size, changed, str(sha256)] if [size, changed] == stamp:
            return sha256
    sha256 = file_sha256(path)
    if time.time() - status.st_mtime > _SETTLED_S:
        # Read again: another process may have added entries meanwhile.
        entries = _read_cache() | {str(path): [*stamp, sha256]}
        _write_cache(dict(list(entries.items())[-_MAX_ENTRIES:]))
    return sha256


def _cache_file() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fidelora/hashes.json"
    )


def _read_cache() -> dict[str, object]:
    try:
        content = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(entries: dict[str, object]) -> None:
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_cache_file(), json.dumps(entries).encode())
    except (OSError, OutputError):
        return  # a read-only home; the hash is computed again next time
