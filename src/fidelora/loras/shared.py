"""LoRAs that several machines share through a bucket.

The bucket has two groups of objects: `adapters/{sha256}.safetensors`, the files that jobs need, and
`loras/...`, the adapter folder with the names that requests use.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

from fidelora.atomic import make_folder, output_error, temporary_name, write_atomically
from fidelora.errors import AdapterChangedError
from fidelora.loras.folder import is_text
from fidelora.storage.bucket import Bucket, StoredObject

log = logging.getLogger(__name__)

_ADAPTERS, _LORAS = "adapters", "loras"
_MAX_NAME_BYTES = 255  # limit of file systems for one part of a path; object stores allow 1,024
_SUFFIX = ".safetensors"
_STATE_FILE = ".object-store.json"


class SharedAdapters:
    """Adapter files by hash, which servers put into a bucket and workers fetch. Thread-safe.

    All methods raise `StorageError` if the object store cannot be used.

    Args:
        keep: objects that no job needs are removed after this time. If a job needs an object that
            is older than half of this time, it is stored again, so that it is not removed.
    """

    def __init__(self, bucket: Bucket, keep: timedelta = timedelta(days=7)) -> None:
        self._bucket = bucket
        self._keep = keep

    def publish(self, sha256: str, path: Path) -> None:
        """Put the file with this hash into the bucket, unless it is there already."""
        known = self._bucket.head(_key(sha256))
        if known is None or datetime.now(UTC) - known.modified > self._keep / 2:
            self._bucket.put_file(_key(sha256), path)

    def fetch(self, sha256: str, path: Path) -> bool:
        """Write the adapter with this hash to `path`, unless the file exists.

        Other processes of this machine that need the same file wait for it.

        Returns:
            False if the bucket has no such adapter.

        Raises:
            AdapterChangedError: the sha256 of the object differs from the one in its name.
            StorageError: also if the file cannot be written.
        """
        with _locked(path.parent, sha256):
            if path.is_file():
                return True
            temporary = path.parent / temporary_name()
            try:
                found = self._bucket.download(_key(sha256), temporary)
                if found is None:
                    return False
                if found != sha256:
                    raise AdapterChangedError(
                        f"The object {_key(sha256)} in the bucket has the sha256 {found}. Delete "
                        "it; the server stores it again with the next request."
                    )
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        log.info("adapter fetched from the object store", extra={"sha256": sha256})
        return True

    def trim(self, in_use: Callable[[str], bool]) -> list[str]:
        """Remove the adapters that no job has needed for a long time; return their hashes.

        Args:
            in_use: returns True if a job that has not ended needs the adapter with this hash.
        """
        before = datetime.now(UTC) - self._keep
        old = [one for one in self._bucket.list(_ADAPTERS) if one.modified < before]
        unused = [one for one in old if not in_use(PurePosixPath(one.key).stem)]
        self._bucket.delete([one.key for one in unused])
        return [PurePosixPath(one.key).stem for one in unused]


class SharedLoras:
    """The adapter folder as a copy of `loras/` in a bucket. Thread-safe.

    Files that are only in the folder are left alone. So are objects whose names are not those of
    adapter files.

    Args:
        root: adapter folder; a hidden file in it records which files are copies.
    """

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self._bucket = bucket
        self._root = root
        self._lock = threading.Lock()
        self._without_place: set[str] = set()

    def refresh(self) -> None:
        """Download new and changed objects, and delete the copies of deleted ones.

        Raises:
            StorageError: the object store or the folder cannot be used.
        """
        with self._lock:
            copies = self._copies()
            objects = {
                name: one
                for one in self._bucket.list(_LORAS)
                if (name := _name_of(one)) is not None
            }
            for name, one in objects.items():
                if not self._has_place(name):
                    continue
                if copies.get(name) != one.tag or not (self._root / name).is_file():
                    self._download(name, one)
                    self._record({**self._copies(), name: one.tag})
            for name in copies.keys() - objects.keys():
                (self._root / name).unlink(missing_ok=True)
                self._record({key: tag for key, tag in self._copies().items() if key != name})

    def publish(self, name: str) -> bool:
        """Put a new file of the folder into the bucket.

        Args:
            name: path relative to the folder.

        Returns:
            False if the bucket has an object with this name already, which is kept.

        Raises:
            StorageError: the object store cannot be used.
        """
        with self._lock:
            key = f"{_LORAS}/{name}"
            if not self._bucket.put_file(key, self._root / name, replace=False):
                return False
            if (stored := self._bucket.head(key)) is not None:
                self._record({**self._copies(), name: stored.tag})
            return True

    def remove(self, name: str) -> None:
        """Remove a file from the bucket; the copy of this machine remains."""
        with self._lock:
            self._bucket.delete([f"{_LORAS}/{name}"])
            self._record({key: tag for key, tag in self._copies().items() if key != name})

    def _has_place(self, name: str) -> bool:
        """True unless a file and a folder would have the same name; logs each such name once.

        Object stores allow `a.safetensors` beside `a.safetensors/b.safetensors`.
        """
        target = self._root / name
        folders = [parent for parent in target.parents if parent.is_relative_to(self._root)]
        if target.is_dir() or any(folder.is_file() for folder in folders):
            if name not in self._without_place:
                self._without_place.add(name)
                log.warning("not copied: %r is a file and a folder in the bucket", name)
            return False
        return True

    def _download(self, name: str, one: StoredObject) -> None:
        target = self._root / name
        make_folder(target.parent)
        temporary = target.parent / temporary_name()
        try:
            if self._bucket.download(one.key, temporary) is not None:
                temporary.replace(target)
        except OSError as error:
            raise output_error(f"{target} could not be written", error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _copies(self) -> dict[str, str]:
        """Return the tag of each copy, by its path relative to the folder."""
        try:
            known = json.loads((self._root / _STATE_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return {str(name): str(tag) for name, tag in known.items()}

    def _record(self, copies: dict[str, str]) -> None:
        write_atomically(self._root / _STATE_FILE, json.dumps(copies, indent=1).encode())


def _key(sha256: str) -> str:
    return f"{_ADAPTERS}/{sha256}{_SUFFIX}"


def _name_of(one: StoredObject) -> str | None:
    """Return the path of an object's copy in the adapter folder; None for other files."""
    name = one.key.removeprefix(f"{_LORAS}/")
    parts = name.split("/")
    is_safe = all(
        part
        and not part.startswith(".")
        and "\0" not in part
        and len(part.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
        for part in parts
    )
    return name if is_safe and is_text(name) and name.lower().endswith(_SUFFIX) else None


@contextmanager
def _locked(folder: Path, sha256: str) -> Iterator[None]:
    """Hold the lock of this machine for adapters whose hashes begin with the same digit."""
    with (folder / f".fetch-{sha256[0]}.lock").open("w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
