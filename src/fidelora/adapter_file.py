"""Adapter files that are opened and hashed only once.

Header, sha256 and tensors therefore come from the same bytes. Does not import torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal
from weakref import WeakSet

from fidelora.errors import AdapterChangedError, AdapterNotFoundError, WeightsFileError
from fidelora.safetensors_header import Header, read_header_bytes, refuse_pickle

MAX_KEPT_BYTES = 2**30
"""Limit of the memory for the contents of all files opened with `keep="within_budget"`: enough for
several LoRAs of usual size. Files that exceed it are read again when their tensors are needed."""

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
"""sha256 of an empty file. Older versions of AI Toolkit and some other programs store it by mistake
instead of the hash of the tensors."""

_CHUNK_BYTES = 2**20  # bytes read at a time while hashing

Keep = Literal["always", "within_budget", "never"]


class AdapterFile:
    """An adapter file as it was when it was opened.

    The header is parsed from the bytes that are hashed, and `take_content` returns those bytes. If
    the file is replaced or overwritten later, this has no effect while the content is kept;
    afterwards, the change is detected by the hash when the file is read again. Pickling or copying
    an `AdapterFile` gives None, because the bytes stay in the process that read them.

    Attributes:
        path: absolute path with links resolved.
        name: file name as the caller spelled it, for error messages.
        header: checked header.
        sha256: sha256 of the whole file in hex.
        version: device, inode, size and modification time (ns) of the file when it was opened.
        tensors_sha256: sha256 of the bytes after the header, in hex; empty until `take_content`.
            AUTOMATIC1111's web UI and Civitai identify LoRAs by this hash. As in the web UI, a
            valid hash in the metadata has precedence.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        header: Header,
        sha256: str,
        version: tuple[int, int, int, int],
        content: bytes | None,
    ) -> None:
        self.path = path
        self.name = name
        self.header = header
        self.sha256 = sha256
        self.version = version
        self.tensors_sha256 = ""
        self._content = content

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        check: Callable[[Header], object] | None = None,
        keep: Keep = "always",
    ) -> AdapterFile:
        """Check the header of the file at `path` and hash the file.

        Args:
            check: called with the header before the rest of the file is read; may raise.
            keep: when to keep the content in memory for `take_content`. `within_budget` keeps it if
                all contents kept with this value take at most `MAX_KEPT_BYTES` together.

        Raises:
            AdapterNotFoundError: the file does not exist, or `path` is a folder or a device.
            WeightsFileError: it is not a valid .safetensors file, or cannot be read.
            PickleRefusedError: it is a pickle.
        """
        if path.is_dir():
            raise AdapterNotFoundError(
                f"{path} is a folder, not an adapter file; give the path of a .safetensors file."
            )
        if not path.is_file():  # excludes devices and pipes: reading one may never end
            raise AdapterNotFoundError(f"The adapter file {path} does not exist; check the path.")
        refuse_pickle(path)
        try:
            with path.open("rb") as file:
                version = file_version(os.fstat(file.fileno()))
                header, header_bytes = read_header_bytes(file, path.name)
                if check is not None:
                    check(header)
                if keep == "always" or (
                    keep == "within_budget" and _fits_budget(header.file_bytes)
                ):
                    content = _whole(file, header, header_bytes, path.name)
                    sha256 = hashlib.sha256(content).hexdigest()
                else:
                    content, sha256 = None, _hash_rest(file, header, header_bytes, path.name)
        except FileNotFoundError:
            raise AdapterNotFoundError(
                f"The adapter file {path} does not exist; check the path."
            ) from None
        except OSError as error:
            raise WeightsFileError(f"{path} cannot be read: {error.strerror or error}.") from error
        opened = cls(path.resolve(), path.name, header, sha256, version, content)
        if keep == "within_budget" and content is not None:
            with _kept_lock:
                _kept.add(opened)
        return opened

    @property
    def keeps_content(self) -> bool:
        """True if `take_content` returns without opening the file."""
        return self._content is not None

    def take_content(self) -> bytes:
        """Return the bytes that were hashed, and do not keep them any longer.

        If they are not kept when this is called, the file is opened and hashed again.

        Raises:
            AdapterChangedError: the file's content has changed.
            AdapterNotFoundError, WeightsFileError: see `open`.
        """
        content, self._content = self._content, None
        if content is None:
            again = AdapterFile.open(self.path)
            if again.sha256 != self.sha256:
                raise changed_error(self.name, again.sha256, self.sha256)
            content = again.take_content()
        self.tensors_sha256 = self.tensors_sha256 or _web_ui_sha256(content, self.header)
        return content

    def drop_content(self) -> None:
        """Free the memory of the content, for example because the tensors are already loaded."""
        self._content = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def file_version(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return device, inode, size and modification time (ns), which identify a state of a file.

    Two writes within one tick of the clock can have the same version.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def changed_error(name: str, found: str, expected: str) -> AdapterChangedError:
    """Return the error for a file whose sha256 is not the one of the recipe."""
    return AdapterChangedError(
        f"{name} has changed: its sha256 is {found[:12]}..., but the recipe refers to "
        f"{expected[:12]}...; make a new recipe from the file, or restore the old file."
    )


_kept: WeakSet[AdapterFile] = WeakSet()
_kept_lock = threading.Lock()


def _fits_budget(size_bytes: int) -> bool:
    with _kept_lock:
        kept_bytes = sum(file.header.file_bytes for file in _kept if file.keeps_content)
    return kept_bytes + size_bytes <= MAX_KEPT_BYTES


def _whole(file: BinaryIO, header: Header, header_bytes: bytes, name: str) -> bytes:
    file.seek(0)
    content = file.read()
    if len(content) != header.file_bytes or not content.startswith(header_bytes):
        raise _changed_while_read(name)
    return content


def _web_ui_sha256(content: bytes, header: Header) -> str:
    """Return the hash by which AUTOMATIC1111's web UI identifies the file.

    This is the hash in the metadata if it is valid, else the sha256 of the bytes after the header.
    """
    stored = header.metadata.get("sshs_model_hash", "").lower()
    if re.fullmatch("[0-9a-f]{64}", stored) and stored != EMPTY_SHA256:
        return stored
    start = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[start:]).hexdigest()


def _hash_rest(file: BinaryIO, header: Header, header_bytes: bytes, name: str) -> str:
    """Return the sha256 of the whole file; the position of `file` is just after the header."""
    digest, size_bytes = hashlib.sha256(header_bytes), len(header_bytes)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    if size_bytes != header.file_bytes:
        raise _changed_while_read(name)
    return digest.hexdigest()


def _changed_while_read(name: str) -> WeightsFileError:
    return WeightsFileError(
        f"{name} changed while it was read; try again when the file is complete."
    )
