"""The folder of adapters that requests name, and uploads into it."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fidelora.adapters.tensor_names import modules_of
from fidelora.atomic import make_folder, temporary_name
from fidelora.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterPlaceError,
    OutputError,
    UploadNotFoundError,
    some,
)
from fidelora.recipe import file_sha256
from fidelora.safetensors_header import read_header

UPLOADS = "uploads"
"""The part of the folder that clients write to and delete from; everything else belongs to whoever runs the server."""

_SUFFIX = ".safetensors"
_UPLOAD_NAME = re.compile(r"[\w][\w .()+-]{0,150}\.safetensors")


def adapter_path(root: Path, name: str) -> Path:
    """Return the adapter file `name` under `root`, refusing everything outside.

    Names come from requests. A name with `..`, an absolute path that is not under `root`, and a symbolic link that leads out of it
    are refused alike, with words that say nothing of what is outside.

    Args:
        root: the folder of all adapters.
        name: a path relative to `root`, or an absolute one under it.

    Returns:
        the file itself, all links followed.

    Raises:
        AdapterPlaceError: it would be outside of `root`, or is no .safetensors file.
        AdapterNotFoundError: it would be inside, and is not there.
    """
    if not name or "\0" in name or ".." in Path(name).parts:
        raise AdapterPlaceError(
            f"{name!r} is no name of an adapter: give its path below the folder of adapters, without '..'."
        )
    if not name.lower().endswith(".safetensors"):
        raise AdapterPlaceError(
            f"{name!r} is no .safetensors file; give the full name of the file."
        )
    inside = root.resolve()
    path = (inside / name).resolve()  # an absolute name stands for itself here
    if not path.is_relative_to(inside):
        raise AdapterPlaceError(f"{name!r} is outside of the folder of adapters.")
    try:
        found = path.is_file()
    except OSError:  # a name that no file can have
        found = False
    if not found:
        raise AdapterNotFoundError(
            f"There is no adapter {name!r} in the folder of adapters; check its name."
        )
    return path


def adapter_names(root: Path) -> list[str]:
    """Return the names of all adapter files under `root`, sorted, in the form that requests use.

    Links to files are followed, links to folders are not.
    """
    found = []
    for folder, _, files in os.walk(root):
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if file.lower().endswith(_SUFFIX) and _is_text(name) and _is_inside(root, name):
                found.append(name)
    return sorted(found)


def names_in_prompts(root: Path) -> dict[str, str]:
    """Map the names that prompts use to those that requests use.

    A prompt's name has no folder and no suffix, unless several files share it.

    Returns:
        by that name, what requests call the file.
    """
    names = adapter_names(root)
    files = Counter(PurePosixPath(name).stem for name in names)

    def called(name: str) -> str:
        stem = PurePosixPath(name).stem
        return stem if files[stem] == 1 else name[: -len(_SUFFIX)]

    return {called(name): name for name in names}


def adapter_named_in_prompt(root: Path, name: str) -> str:
    """Return the adapter file that a prompt calls `name`, in the form that requests use.

    Only files under `root` are found.

    Raises:
        AdapterNotFoundError: there is none.
        AdapterPlaceError: there are several.
    """
    names = adapter_names(root)
    exact = [path for path in names if path[: -len(_SUFFIX)] == name]
    found = exact or [path for path in names if PurePosixPath(path).stem == name]
    if not found:
        raise AdapterNotFoundError(
            f"There is no adapter {name!r:.100} in the folder of adapters; check its name."
        )
    if len(found) > 1:
        raise AdapterPlaceError(
            f"There are several adapters {name!r}: name one of {some([one[: -len(_SUFFIX)] for one in found])}."
        )
    return found[0]


def adapter_with_hash(
    root: Path, sha256: str, name: str, sha256_of: Callable[[Path], str]
) -> str | None:
    """Return the adapter file with this sha256 under `root`, in the form that requests use, or
    None.

    Args:
        name: what it was called; files of this name are looked at first, because every other one costs a reading.
        sha256_of: gives the hash of a file.

    Raises:
        what `sha256_of` raises.
    """
    names = adapter_names(root)
    names.sort(key=lambda path: PurePosixPath(path).stem != name)
    return next((path for path in names if sha256_of(adapter_path(root, path)) == sha256), None)


def add_upload(root: Path, file: BinaryIO, name: str) -> tuple[str, bool]:
    """Store the bytes of `file` under `root` as an upload of this name.

    Returns:
        what requests call it, and whether it is new; it is not if the same bytes were there under this name.

    Raises:
        AdapterPlaceError: the name is none that an upload can have.
        AdapterExistsError: other bytes have this name.
        WeightsFileError, AdapterFormatError: it is no adapter, as far as its header tells.
        OutputError: it could not be written.
    """
    target = _upload(root, name)
    make_folder(target.parent)
    temporary = target.parent / temporary_name()
    try:
        try:
            with temporary.open("xb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
                copy.flush()
                os.fsync(copy.fileno())
            with temporary.open("rb") as written:
                modules_of(read_header(written, name), name)
            os.link(temporary, target)  # unlike a rename, it never replaces what is there
        except FileExistsError:
            if file_sha256(temporary) != file_sha256(target):
                raise AdapterExistsError(
                    f"There is another LoRA called {name}; delete it first, or choose another name."
                ) from None
            return f"{UPLOADS}/{name}", False
        except OSError as error:
            raise OutputError(f"{name} could not be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return f"{UPLOADS}/{name}", True


def upload_path(root: Path, name: str) -> Path:
    """Return the file of an upload.

    Raises:
        UploadNotFoundError: there is none of this name.
    """
    try:
        path = _upload(root, name)
    except AdapterPlaceError:
        raise UploadNotFoundError from None
    if not path.is_file():
        raise UploadNotFoundError
    return path


def _upload(root: Path, name: str) -> Path:
    if not _UPLOAD_NAME.fullmatch(name):
        raise AdapterPlaceError(
            f"{name!r} is no name for an upload: use up to 150 letters, digits, spaces and . _ - + ( ), and end it in {_SUFFIX}."
        )
    return root / UPLOADS / name


def _is_inside(root: Path, name: str) -> bool:
    try:
        adapter_path(root, name)
    except (AdapterPlaceError, AdapterNotFoundError):
        return False
    return True


def _is_text(name: str) -> bool:
    """True if JSON can hold the name; file names may be any bytes."""
    return name.encode("utf-8", "ignore").decode() == name
