"""Identify a base model by the content of its weight files.

Hashing gigabytes takes seconds, so hashes are cached by path, size and modification time in
`hashes.json` in the user's cache folder. That file also stores where each base model was last
found, so that the base model of an image can be located although its recipe contains no path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fidelora.atomic import write_atomically
from fidelora.errors import OutputError
from fidelora.recipe import LOCATIONS, file_sha256
from fidelora.weights.files import BaseFiles

_SETTLED_NS = 2_000_000_000
"""Minimum age of a file, in nanoseconds, before its hash is cached. A file that changed less than
2 s ago may change again and keep its modification time, whose resolution is limited."""

Location = dict[str, str]
"""Values of the recipe fields `LOCATIONS`, by field name."""


class ContentHashes:
    """Cache of the content hashes of base models, shared by all processes of the user.

    If the cache file is damaged or cannot be written, the hashes are computed again.

    Args:
        path: the cache file; by default `fidelora/hashes.json` in the user's cache folder
            (https://specifications.freedesktop.org/basedir-spec/).
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_path()
        self._lock = threading.Lock()

    def cached_sha256_of(self, files: BaseFiles) -> str | None:
        """Return `sha256_of(files)` if the hashes of all files are cached, else None."""
        remembered = self._read()["files"]
        hashes = [_lookup(remembered, path) for _, path in contents(files)]
        return None if None in hashes else _combine(files, [str(one) for one in hashes])

    def sha256_of(self, files: BaseFiles) -> str:
        """Return the sha256 in hex that identifies a base model.

        For a single-file checkpoint, it is the sha256 of the file, which model sites publish. In
        other cases (a folder, another VAE, given configurations), it is the sha256 of a text with
        the line `NAME SHA256` for each file of `contents(files)`.

        Raises:
            WeightsFileError: a file cannot be read.
        """
        remembered = self._read()["files"]
        hashes, new = [], {}
        for _, path in contents(files):
            known = _lookup(remembered, path)
            if known is None:
                before = _stamp_of(path)
                known = file_sha256(path)
                settled = before is not None and time.time_ns() - before[1] > _SETTLED_NS
                if before is not None and settled and before == _stamp_of(path):
                    new[str(path.absolute())] = [*before, known]
            hashes.append(known)
        if new:
            self._remember("files", new)
        return _combine(files, hashes)

    def remember_location(self, sha256: str, location: Location) -> None:
        """Store the location where the base model with this hash was found."""
        absolute = {
            name: str(Path(value).absolute()) if value and Path(value).exists() else value
            for name, value in location.items()
        }
        if self._read()["bases"].get(sha256) != absolute:
            self._remember("bases", {sha256: absolute})

    def location(self, sha256: str) -> Location | None:
        """Return the location where the base model with this hash was last found, or None."""
        found = self._read()["bases"].get(sha256)
        if not isinstance(found, dict) or found.keys() != set(LOCATIONS):
            return None
        return {name: str(value) for name, value in found.items()}

    def _remember(self, section: str, entries: Mapping[str, Any]) -> None:
        with self._lock:
            document = self._read()
            files = document["files"]
            document["files"] = {name: files[name] for name in files if Path(name).exists()}
            document[section] |= entries
            if self._path is not None:
                with contextlib.suppress(OSError, OutputError):
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(self._path, json.dumps(document, indent=1).encode())

    def _read(self) -> dict[str, dict[str, Any]]:
        document: Any = None
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError):
                document = json.loads(self._path.read_bytes())
        if not isinstance(document, dict):
            document = {}
        sections = {name: document.get(name) for name in ("files", "bases")}
        return {
            name: section if isinstance(section, dict) else {} for name, section in sections.items()
        }


def contents(files: BaseFiles) -> list[tuple[str, Path]]:
    """Return name and path of each file whose content identifies a base model, in order.

    These are the weight files and, for a single-file checkpoint, the configurations that the caller
    gave. The configurations of a diffusers folder are not included, because other programs rewrite
    them.
    """
    checkpoint = [("checkpoint", files.source)] if files.is_checkpoint else []
    parts = [part.name for part in files.family.parts]
    weights = [(name, path) for name in parts for path in files.weights.get(name, ())]
    configs = [(f"{name}/config.json", path) for name, path in files.given_configs.items()]
    return [*checkpoint, *weights, *configs]


def _combine(files: BaseFiles, hashes: list[str]) -> str:
    names = [name for name, _ in contents(files)]
    if names == ["checkpoint"]:
        return hashes[0]
    lines = [f"{name} {sha256}\n" for name, sha256 in zip(names, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _lookup(remembered: Mapping[str, Any], path: Path) -> str | None:
    """Return the cached sha256 of a file; None if it is not cached or the file has changed."""
    entry = remembered.get(str(path.absolute()))
    stamp = _stamp_of(path)
    if not isinstance(entry, list) or len(entry) != 3 or stamp is None:
        return None
    return str(entry[2]) if tuple(entry[:2]) == stamp else None


def _stamp_of(path: Path) -> tuple[int, int] | None:
    """Return size in bytes and modification time in ns; None if the file cannot be accessed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def default_path() -> Path | None:
    """Return the default path of the cache file; None for a user without a home folder."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(cache) / "fidelora" / "hashes.json"
