"""Adapters by content: one folder with `{sha256}.safetensors`, where workers find the bytes that a job was accepted with.

A job keeps the hashes of its adapters and no paths, so a file may be renamed, replaced or deleted while the job waits.
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
from pathlib import Path, PurePosixPath

from fidelora.adapters.tensor_names import modules_of
from fidelora.atomic import make_folder, remove_stale_temporaries, temporary_name, write_atomically
from fidelora.errors import AdapterNotFoundError, OutputError
from fidelora.recipe import AdapterRef, file_sha256
from fidelora.safetensors_header import read_file_header, read_header

_REMEMBERED = 10_000
_SETTLED_S = 2.0
"""A file that changed more recently than this is hashed again: two writes within one tick of the clock look the same."""


class AdapterCache:
    """The folder of adapters by content. May be used from several threads.

    Args:
        folder: made if it is not there.
        budget_bytes: how much of the disk adapters may take that are nowhere else, such as downloads; see `trim`.

    Raises:
        OutputError: nothing can be written to the folder.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        make_folder(folder)
        self.folder = folder
        self._budget_bytes = budget_bytes
        self._hashes: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._lock = threading.Lock()
        remove_stale_temporaries(folder)

    def path(self, sha256: str) -> Path:
        """Where the adapter of this hash is, if it is here."""
        return self.folder / f"{sha256}.safetensors"

    def find(self, sha256: str) -> AdapterRef | None:
        """The adapter of this hash, if it is here and its bytes are still those."""
        path = self.path(sha256)
        if not path.is_file() or self.sha256_of(path) != sha256:
            return None
        self._was_used(path)
        return AdapterRef(sha256, path=path)

    def sha256_of(self, path: Path) -> str:
        """The hash of a file's bytes; remembered until the file changes.

        Raises:
            WeightsFileError: it cannot be read.
        """
        try:
            status = path.stat()
        except OSError:
            return file_sha256(path)  # which says what is wrong
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            if key in self._hashes:
                self._hashes.move_to_end(key)
                return self._hashes[key]
        sha256 = file_sha256(path)
        if time.time() - status.st_mtime > _SETTLED_S:
            with self._lock:
                self._hashes[key] = sha256
                while len(self._hashes) > _REMEMBERED:
                    self._hashes.popitem(last=False)
        return sha256

    def keep(self, path: Path, name: str) -> AdapterRef:
        """Put the file at `path` here under its hash, without a second copy where the disk allows it.

        Raises:
            AdapterNotFoundError: there is no such file.
            WeightsFileError, AdapterFormatError: it is no adapter, as far as its header tells.
            OutputError: it could not be put here.
        """
        if not path.is_file():
            raise AdapterNotFoundError(f"There is no adapter file {name}; check the name.")
        if ref := self.find(self.sha256_of(path)):  # it was looked at when it came
            return AdapterRef(ref.sha256, name=PurePosixPath(name).stem, path=ref.path)
        modules_of(read_file_header(path), path.name)
        return self._add(path, name)

    def adopt(self, temporary: Path, sha256: str, name: str) -> AdapterRef:
        """Take over a finished download: its header is checked, and it gets its name by content.

        Raises:
            WeightsFileError, AdapterFormatError: it is no adapter, as far as its header tells.
        """
        with temporary.open("rb") as file:
            modules_of(read_header(file, name), name)
        target = self.path(sha256)
        temporary.replace(target)
        self._was_used(target)
        return AdapterRef(sha256, name=PurePosixPath(name).stem, path=target)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path in this folder for a file that is not finished; what is left there afterwards is removed."""
        path = self.folder / temporary_name()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def remembered_url(self, url: str) -> tuple[str, str] | None:
        """Version mark (ETag) and hash of what this URL gave before, if that is still here."""
        try:
            known = json.loads(self._url_file(url).read_text())
            etag, sha256 = str(known["etag"]), str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (etag, sha256) if self.find(sha256) else None

    def remember_url(self, url: str, etag: str, sha256: str) -> None:
        """Note what a URL gave; the URL itself, which may carry a secret, is not written down."""
        write_atomically(self._url_file(url), json.dumps({"etag": etag, "sha256": sha256}).encode())

    def trim(self, in_use: Callable[[str], bool]) -> list[str]:
        """Remove adapters that are nowhere else, those used longest ago first, until the rest fits into the budget.

        Args:
            in_use: whether a job that has not ended needs the adapter of a hash; such a one stays.

        Returns:
            the hashes that are gone.
        """
        own = []
        for path in self.folder.glob("*.safetensors"):
            status = path.stat()
            if (
                status.st_nlink == 1
            ):  # another name of the same bytes means that removing this one frees nothing
                own.append((status.st_mtime_ns, status.st_size, path))
        total, gone = sum(size for _, size, _ in own), []
        for _, size, path in sorted(own):
            if total <= self._budget_bytes:
                break
            if not in_use(path.stem):
                path.unlink(missing_ok=True)
                gone.append(path.stem)
                total -= size
        return gone

    def _add(self, path: Path, name: str) -> AdapterRef:
        """The file under its hash: as a second name, or copied; hashed again, for it may have changed in the meantime."""
        with self.temporary() as temporary:
            try:
                try:
                    os.link(path, temporary)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(path, temporary)
                sha256 = self.sha256_of(temporary)
                temporary.replace(self.path(sha256))
            except OSError as error:
                raise OutputError(
                    f"{name} could not be put into the cache of adapters: {error.strerror or error}."
                ) from error
        return AdapterRef(sha256, name=PurePosixPath(name).stem, path=self.path(sha256))

    def _was_used(self, path: Path) -> None:
        if (
            path.stat().st_nlink == 1
        ):  # else it is somebody's file, whose time is not ours to change
            os.utime(path)

    def _url_file(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()}.url.json"
