"""Content-addressed cache of adapter files: a folder of `{sha256}.safetensors` for the workers.

A job stores the hashes of its adapters instead of their paths, so that a LoRA may be renamed,
replaced or deleted while the job waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from fidelora.adapter_file import AdapterFile, file_version
from fidelora.adapters.tensor_names import modules_of
from fidelora.atomic import (
    make_folder,
    output_error,
    remove_stale_temporaries,
    temporary_name,
    write_atomically,
)
from fidelora.embedding_file import embedding_word
from fidelora.errors import AdapterNotFoundError
from fidelora.loras.shared import SharedAdapters
from fidelora.recipe import AdapterRef, file_sha256
from fidelora.safetensors_header import read_file_header, read_header

_MAX_HASHES = 10_000  # each entry takes a few hundred bytes
_SETTLED_S = 2.0
"""Minimum age of a file, in seconds, before its hash is cached: two writes within one tick of the
clock have the same time, so the second one could be missed."""


class AdapterCache:
    """Folder of adapter files named by their sha256. Thread-safe.

    Args:
        folder: created if it does not exist.
        budget_bytes: disk space for adapters without another hard link, such as downloads; see
            `trim`.
        shared: adapters of all machines; None for one machine, or for a shared folder.

    Raises:
        OutputError: the folder is not writable.
    """

    def __init__(
        self, folder: Path, budget_bytes: int, shared: SharedAdapters | None = None
    ) -> None:
        make_folder(folder)
        self.folder = folder
        self._shared = shared
        self._budget_bytes = budget_bytes
        self._hashes: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._lock = threading.Lock()
        remove_stale_temporaries(folder)

    def path(self, sha256: str) -> Path:
        """Return the path for this hash; the file need not exist."""
        return self.folder / f"{sha256}.safetensors"

    def find(self, sha256: str) -> AdapterRef | None:
        """Return the adapter with this hash, or None if it is missing or its file has changed.

        Raises:
            AdapterChangedError: the object in the bucket has another hash.
            StorageError: the object store cannot be used.
        """
        path = self.path(sha256)
        if not path.is_file() and self._shared is not None:
            self._shared.fetch(sha256, path)
        if not path.is_file() or self.sha256_of(path) != sha256:
            return None
        self._touch(path)
        return AdapterRef(sha256, path=path)

    def publish(self, sha256: str) -> None:
        """Make an adapter of the cache available to the workers on other machines.

        Raises:
            StorageError: the object store cannot be used.
        """
        if self._shared is not None:
            self._shared.publish(sha256, self.path(sha256))

    def ref(self, sha256: str, name: str) -> AdapterRef:
        """Return a reference to an adapter in the cache.

        Args:
            name: name of the adapter's file. If an embedding has no word in its metadata, this name
                is its word in prompts.

        Raises:
            WeightsFileError: the file cannot be read.
        """
        path = self.path(sha256)
        word = embedding_word(read_file_header(path), name)
        return AdapterRef(sha256, name=PurePosixPath(name).stem, path=path, word=word)

    def sha256_of(self, path: Path) -> str:
        """Return the sha256 of a file, cached until the file changes.

        Raises:
            WeightsFileError: the file cannot be read.
        """
        try:
            version = file_version(path.stat())
        except OSError:
            return file_sha256(path)  # raises the error
        if (known := self._remembered_hash(version)) is not None:
            return known
        sha256 = file_sha256(path)
        self._remember_hash(version, sha256)
        return sha256

    def add(self, path: Path, name: str) -> AdapterRef:
        """Add the file at `path` under its hash, as a hard link where the disk allows it.

        A file that is not in the cache is opened once for its header and its hash.

        Raises:
            AdapterNotFoundError: the file does not exist.
            WeightsFileError, AdapterFormatError: according to its header, it is not an adapter.
            OutputError: it could not be added.
        """
        if not path.is_file():
            raise AdapterNotFoundError(f"The adapter file {name} does not exist; check the name.")
        known = self._remembered_hash(file_version(path.stat()))
        if known is None or not self.find(known):
            file = AdapterFile.open(path, check=partial(modules_of, name=path.name), keep="never")
            self._remember_hash(file.version, file.sha256)
            known = file.sha256
            if not self.find(known):
                return self._link(path, name, file)
        return self.ref(known, name)

    def adopt(self, temporary: Path, sha256: str, name: str) -> AdapterRef:
        """Check the header of a finished download and move it to the path of its hash.

        Raises:
            WeightsFileError, AdapterFormatError: according to its header, it is not an adapter.
        """
        with temporary.open("rb") as file:
            modules_of(read_header(file, name), name)
        target = self.path(sha256)
        temporary.replace(target)
        self._touch(target)
        return self.ref(sha256, name)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Yield a path in this folder for an unfinished file; delete the file if not moved."""
        path = self.folder / temporary_name()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def remembered_url(self, url: str) -> tuple[str, str] | None:
        """Return ETag and hash of the last download from this URL, if it is still in the cache."""
        try:
            known = json.loads(self._url_file(url).read_text())
            etag, sha256 = str(known["etag"]), str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (etag, sha256) if self.find(sha256) else None

    def remember_url(self, url: str, etag: str, sha256: str) -> None:
        """Store the result of a download. Only a hash of the URL is kept, as URLs may be secret."""
        write_atomically(self._url_file(url), json.dumps({"etag": etag, "sha256": sha256}).encode())

    def trim(self, in_use: Callable[[str], bool]) -> list[str]:
        """Remove the least recently used adapters until the rest fits into the budget.

        Files with another hard link are neither counted nor removed, because removing them would
        free no space.

        Args:
            in_use: returns True if a job that has not ended needs the adapter with this hash. Such
                adapters are not removed.

        Returns:
            hashes of the removed adapters.
        """
        own = []
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except OSError:  # removed in the meantime, or a broken link
                continue
            if status.st_nlink == 1:
                own.append((status.st_mtime_ns, status.st_size, path))
        total, removed = sum(size for _, size, _ in own), []
        for _, size, path in sorted(own):
            if total <= self._budget_bytes:
                break
            if not in_use(path.stem):
                path.unlink(missing_ok=True)
                removed.append(path.stem)
                total -= size
        return removed

    def trim_shared(self, in_use: Callable[[str], bool]) -> list[str]:
        """Remove unused adapters from the object store; see `SharedAdapters.trim`."""
        return [] if self._shared is None else self._shared.trim(in_use)

    def _remembered_hash(self, version: tuple[int, ...]) -> str | None:
        with self._lock:
            if version in self._hashes:
                self._hashes.move_to_end(version)
            return self._hashes.get(version)

    def _remember_hash(self, version: tuple[int, ...], sha256: str) -> None:
        modified_s = version[-1] / 1e9
        if time.time() - modified_s > _SETTLED_S:
            with self._lock:
                self._hashes[version] = sha256
                while len(self._hashes) > _MAX_HASHES:
                    self._hashes.popitem(last=False)

    def _link(self, path: Path, name: str, file: AdapterFile) -> AdapterRef:
        """Link or copy the file to the path of its hash.

        The result is hashed again if it is a copy, or if the file changed after `file` was opened.
        """
        with self.temporary() as temporary:
            try:
                try:
                    os.link(path, temporary)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(path, temporary)
                is_same = file_version(temporary.stat()) == file.version
                sha256 = file.sha256 if is_same else self.sha256_of(temporary)
                temporary.replace(self.path(sha256))
            except OSError as error:
                raise output_error(
                    f"{name} could not be added to the adapter cache", error
                ) from error
        return self.ref(sha256, name)

    def _touch(self, path: Path) -> None:
        """Set the time of last use, unless the file has another hard link outside of the cache."""
        if path.stat().st_nlink == 1:
            os.utime(path)

    def _url_file(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()}.url.json"
