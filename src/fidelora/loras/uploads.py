"""Uploads: adapter files that clients add to and delete from the adapter folder.

Uploads of an API key are in a folder of their own, `uploads/key-ID`.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from fidelora.adapters.tensor_names import modules_of
from fidelora.atomic import make_folder, output_error, temporary_name
from fidelora.errors import (
    AdapterExistsError,
    UploadNameError,
    UploadNotFoundError,
    UploadQuotaError,
)
from fidelora.loras.folder import KEY_FOLDER, UPLOADS, is_text
from fidelora.recipe import file_sha256
from fidelora.safetensors_header import read_header
from fidelora.texts import plain_message, printable

_SUFFIX = ".safetensors"
_UPLOAD_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]+\.safetensors", re.IGNORECASE)
_MAX_NAME_BYTES = 200  # in UTF-8; file systems allow 255, and a temporary name can be longer


class UploadQuota:
    """Disk space for uploads, in total and for each API key. Thread-safe.

    The space of an upload is reserved before its file is written, so that uploads at the same time
    cannot exceed the quota together. Only one process may write uploads to a folder.

    Args:
        root: adapter folder.
        total_bytes: space for the uploads of all keys.
        key_bytes: space for the uploads of each key; None for no limit.
    """

    def __init__(self, root: Path, total_bytes: int, key_bytes: int | None = None) -> None:
        self._root = root
        self._total_bytes = total_bytes
        self._key_bytes = key_bytes
        self._lock = threading.Lock()
        self._reserved: dict[str, int] = {}

    @contextmanager
    def reserve(self, size: int, owner: str) -> Iterator[None]:
        """Reserve space while an upload of `size` bytes is written.

        Raises:
            UploadQuotaError: there is not enough space.
        """
        with self._lock:
            own = self._root / _folder_of(owner)
            if owner and self._key_bytes is not None:
                used = _size_of([own]) + self._reserved.get(owner, 0)
                _require("this API key", used, size, self._key_bytes, "UPLOADS_PER_KEY_GB")
            used = _size_of(upload_folders(self._root)) + sum(self._reserved.values())
            _require("this server", used, size, self._total_bytes, "UPLOADS_GB")
            self._reserved[owner] = self._reserved.get(owner, 0) + size
        try:
            yield
        finally:
            with self._lock:
                self._reserved[owner] -= size
                if not self._reserved[owner]:
                    del self._reserved[owner]


def _require(whose: str, used: int, size: int, limit: int, setting: str) -> None:
    if used + size > limit:
        raise UploadQuotaError(
            f"The file has {size / 2**20:,.1f} MiB, but the uploads of {whose} have "
            f"{used / 2**20:,.1f} of {limit / 2**20:,.1f} MiB already. Delete uploads that are not "
            f"needed; the server's operator can raise the limit with FIDELORA_{setting}."
        )


def _size_of(folders: Iterable[Path]) -> int:
    """Return the total size in bytes of the finished uploads in these folders."""
    total = 0
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # removed in the meantime
            continue
    return total


def add_upload(
    root: Path, file: BinaryIO, name: str, owner: str = "", quota: UploadQuota | None = None
) -> tuple[str, bool]:
    """Store the contents of `file` under `root` as an upload with this name.

    Args:
        file: the contents; it must be seekable.
        owner: id of the API key whose upload it is; empty without keys.
        quota: disk space for uploads; None for no limit.

    Returns:
        The name for requests, and True if the file is new; False if an upload with this name and
        the same contents exists.

    Raises:
        UploadNameError: the name is not valid for an upload.
        AdapterExistsError: an upload with this name has other contents.
        WeightsFileError, AdapterFormatError: according to its header, the file is not an adapter.
        UploadQuotaError: the uploads would exceed their quota.
        OutputError: the file could not be written.
    """
    folder = _folder_of(owner)
    target = _upload(root, folder, name)
    # `_upload` does not check this, so that older uploads with such names can be deleted.
    if printable(name) != name:
        raise UploadNameError(
            f"{plain_message(name)} is not a valid name for an upload: it contains control "
            "characters or characters that change the direction of text. Rename the file."
        )
    make_folder(target.parent)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    # Repeating an upload does not take space.
    counted = nullcontext() if quota is None or target.exists() else quota.reserve(size, owner)
    with counted:
        is_new = _store(file, target, name)
    return f"{folder}/{name}", is_new


def _store(file: BinaryIO, target: Path, name: str) -> bool:
    """Write the contents to a new file; return False if the target has the same contents."""
    temporary = target.parent / temporary_name()
    try:
        try:
            with temporary.open("xb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
                copy.flush()
                os.fsync(copy.fileno())
            with temporary.open("rb") as written:
                modules_of(read_header(written, name), name)
            os.link(temporary, target)  # unlike a rename, this never replaces a file
        except FileExistsError:
            if file_sha256(temporary) != file_sha256(target):
                raise AdapterExistsError(
                    f"Another LoRA is called {name}; delete it first, or choose another name."
                ) from None
            return False
        except OSError as error:
            raise output_error(f"{name} could not be written", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def upload_path(root: Path, name: str, owner: str = "", *, is_admin: bool = True) -> Path:
    """Return the file of an upload that a caller may delete.

    Args:
        name: path of the upload in requests, with or without `uploads/`. A name without a folder
            is looked up in the caller's own uploads, and then, if the caller is an admin, in the
            uploads that were made without a key.
        owner: id of the caller's API key; empty without keys.
        is_admin: True if the caller may also delete the uploads of other keys, and those that were
            made without a key.

    Raises:
        UploadNotFoundError: the upload does not exist.
    """
    own = _folder_of(owner)
    below, _, file = name.removeprefix(f"{UPLOADS}/").rpartition("/")
    folders = [own, UPLOADS]
    if below:
        folders = [f"{UPLOADS}/{below}"] if KEY_FOLDER.fullmatch(below) else []
    for folder in folders:
        if not is_admin and folder != own:
            continue
        try:
            path = _upload(root, folder, file)
        except UploadNameError:
            raise UploadNotFoundError from None
        if path.is_file():
            return path
    raise UploadNotFoundError


def is_foreign_upload(root: Path, copy: Path, owner: str, sha256_of: Callable[[Path], str]) -> bool:
    """True if a file has the same contents as an upload of another API key.

    Args:
        copy: an existing file, such as one in the adapter cache.
        sha256_of: returns the hash of a file.
    """
    size = copy.stat().st_size
    for folder in _key_folders(root):
        if folder.name == f"key-{owner}":
            continue
        for file in folder.iterdir():
            # Only files of the same size are hashed.
            if (
                file.is_file()
                and file.stat().st_size == size
                and sha256_of(file) == sha256_of(copy)
            ):
                return True
    return False


def upload_folders(root: Path) -> list[Path]:
    """Return the existing folders of uploads."""
    return [folder for folder in (root / UPLOADS, *_key_folders(root)) if folder.is_dir()]


def _folder_of(owner: str) -> str:
    return f"{UPLOADS}/key-{owner}" if owner else UPLOADS


def _key_folders(root: Path) -> list[Path]:
    try:
        entries = list((root / UPLOADS).iterdir())
    except OSError:  # the folder does not exist
        return []
    return [entry for entry in entries if KEY_FOLDER.fullmatch(entry.name) and entry.is_dir()]


def _upload(root: Path, folder: str, name: str) -> Path:
    size = len(name.encode("utf-8", "replace"))
    if not (_UPLOAD_NAME.fullmatch(name) and is_text(name) and size <= _MAX_NAME_BYTES):
        raise UploadNameError(
            f"{name!r:.200} is not a valid name for an upload: it must end with {_SUFFIX}, must "
            "not begin with a dot or contain a slash, backslash or control character, and may have "
            f"at most {_MAX_NAME_BYTES} bytes in UTF-8."
        )
    return root / folder / name
