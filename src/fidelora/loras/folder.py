"""The adapter folder: names of adapters in requests and prompts.

Uploads of API keys are in folders of their own, `uploads/key-ID`. Functions that read the folder
take the `owner` for whom they read: the id of an API key, or an empty string for no key. They treat
uploads of other keys as absent. With None, they read the uploads of all keys.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath, PurePosixPath

from fidelora.errors import AdapterNameError, AdapterNotFoundError, WeightsFileError
from fidelora.safetensors_header import read_file_header
from fidelora.texts import listed

UPLOADS = "uploads"
"""Subfolder that clients may write to and delete from; the operator manages all other files."""

KEY_FOLDER = re.compile(r"key-([0-9a-f]{16})")
"""Name of the subfolder of `UPLOADS` for one API key; the group is the id of the key."""
_SUFFIX = ".safetensors"
_HASH = re.compile(r"[0-9a-fA-F]{10,64}")
_NOT_IN_TAGS = re.compile(r"[<>:]")
"""Characters that cannot be part of the name in `<lora:name:multiplier>`; `_` replaces them."""


def adapter_path(root: Path, name: str, *, owner: str | None = None) -> Path:
    """Return the adapter file `name`, which must be inside `root`.

    Names come from requests. Names with `..`, absolute paths outside `root` and symbolic links that
    lead out of `root` are refused, with messages that reveal nothing about files outside.

    Args:
        root: adapter folder.
        name: path relative to `root`, or absolute path inside it.

    Returns:
        The path of the file with all links resolved.

    Raises:
        AdapterNameError: the path is outside `root`, or not a .safetensors file.
        AdapterNotFoundError: the path is inside `root`, but the file does not exist for this owner.
    """
    if not name or "\0" in name or ".." in Path(name).parts:
        raise AdapterNameError(
            f"{name!r} is not a valid adapter name; "
            "use a path relative to the adapter folder, without '..'."
        )
    if not name.lower().endswith(".safetensors"):
        raise AdapterNameError(
            f"{name!r} is not a .safetensors file; use the full name of the file."
        )
    inside = root.resolve()
    try:
        path = (inside / name).resolve()  # `/` keeps an absolute name as it is
        found = path.is_file()
    except (OSError, RuntimeError):  # a name that no file can have, or a link to itself
        path, found = inside, False
    if not path.is_relative_to(inside):
        raise AdapterNameError(f"{name!r} is outside of the adapter folder; use a path inside it.")
    if not found or not _is_visible(inside, path, owner):
        raise AdapterNotFoundError(
            f"The adapter {name!r} is not in the adapter folder; check its name."
        )
    return path


def request_name(root: Path, name: str, *, owner: str | None = None) -> str:
    """Return the name of an adapter file in requests, which has its folder.

    If there is no file `name`, and `name` has no folder, it is the file of this name in any folder.

    Raises:
        AdapterNameError: `adapter_path` refuses the name, or several folders have such a file.
        AdapterNotFoundError: no folder has such a file.
    """
    try:
        adapter_path(root, name, owner=owner)
        return name
    except AdapterNotFoundError:
        found = [one for one in adapter_names(root, owner=owner) if PurePosixPath(one).name == name]
        if not found:
            raise
    if len(found) > 1:
        raise AdapterNameError(
            f"Several adapters are called {name!r:.200}; use one of the paths {listed(found)}."
        )
    return found[0]


def adapter_names(root: Path, *, owner: str | None = None) -> list[str]:
    """Return the sorted names of all adapter files under `root`, in the form used by requests.

    Links to files are followed, links to folders are not.
    """
    found = []
    for folder, _, files in os.walk(root):
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if file.lower().endswith(_SUFFIX) and is_text(name) and _is_inside(root, name, owner):
                found.append(name)
    return sorted(found)


def names_in_prompts(root: Path, *, owner: str | None = None) -> dict[str, str]:
    """Map the name that prompts use for each adapter file to the name that requests use.

    In prompts, a file is named without folder and suffix, and with `_` for characters that have a
    meaning in tags. If several files would have the same name in this way, they are named with
    their folders.
    """
    names = adapter_names(root, owner=owner)
    files = Counter(_in_tag(PurePosixPath(name).stem) for name in names)

    def called(name: str) -> str:
        stem = _in_tag(PurePosixPath(name).stem)
        return stem if files[stem] == 1 else _in_tag(name[: -len(_SUFFIX)])

    return {called(name): name for name in names}


def adapter_named_in_prompt(
    root: Path,
    name: str,
    sha256_of: Callable[[Path], str] | None = None,
    *,
    owner: str | None = None,
) -> str:
    """Return the request name of the adapter file that a prompt calls `name`.

    `name` is compared, in this order, with:

    1. the name of each file, with or without its folder;
    2. the name in its metadata (`ss_output_name`), which does not change if the file is renamed;
    3. its sha256, of which at least the first ten digits are required.

    Only names from `adapter_names` are returned, so nothing outside `root` is found.

    Args:
        sha256_of: returns the hash of a file; None to skip the comparison of hashes.

    Raises:
        AdapterNotFoundError: the file does not exist.
        AdapterNameError: several files have this name.
    """
    names = adapter_names(root, owner=owner)
    exact = [
        path for path in names if name in (path[: -len(_SUFFIX)], _in_tag(path[: -len(_SUFFIX)]))
    ]
    found = exact or [path for path in names if name in _stems(path)]
    if name and not found:
        found = [path for path in names if alias_of(root / path) == name]
    if not found and sha256_of is not None and _HASH.fullmatch(name):
        hashes = {path: _hash_of(root / path, sha256_of) for path in names}
        found = [path for path, sha256 in hashes.items() if sha256.startswith(name.lower())]
        if len({hashes[path] for path in found}) == 1:
            found = found[:1]  # copies of the same file
    if not found:
        raise AdapterNotFoundError(
            f"The adapter {name!r:.100} is not in the adapter folder; check its name."
        )
    if len(found) > 1:
        raise AdapterNameError(
            f"Several adapters are called {name!r}; use one of the names "
            f"{listed([one[: -len(_SUFFIX)] for one in found])}."
        )
    return found[0]


def alias_of(path: Path) -> str:
    """Return the name in a file's metadata (`ss_output_name`); empty if it has none."""
    try:
        return read_file_header(path).metadata.get("ss_output_name", "")
    except WeightsFileError:
        return ""


def _hash_of(path: Path, sha256_of: Callable[[Path], str]) -> str:
    """Return the hash of a file; empty if it cannot be read."""
    try:
        return sha256_of(path)
    except WeightsFileError:
        return ""


def _stems(path: str) -> tuple[str, str]:
    stem = PurePosixPath(path).stem
    return stem, _in_tag(stem)


def _in_tag(name: str) -> str:
    return _NOT_IN_TAGS.sub("_", name)


def adapter_with_hash(
    root: Path,
    sha256: str,
    name: str,
    sha256_of: Callable[[Path], str],
    *,
    owner: str | None = None,
) -> str | None:
    """Return the request name of the adapter file with this hash, or None if none has it.

    Args:
        name: former name of the file; files of this name are checked first, because hashing a file
            means reading it.
        sha256_of: returns the hash of a file; its errors are not caught.
    """
    names = adapter_names(root, owner=owner)
    names.sort(key=lambda path: PurePosixPath(path).stem != name)
    return next((path for path in names if sha256_of(adapter_path(root, path)) == sha256), None)


def _owner_of(path: PurePath) -> str | None:
    """Return the owner of an upload; None for all other files, which every owner may use.

    Args:
        path: relative to the adapter folder, without links.
    """
    # Some file systems ignore the case of names.
    parts = [part.casefold() for part in path.parts]
    if len(parts) < 3 or parts[0] != UPLOADS:
        return None
    match = KEY_FOLDER.fullmatch(parts[1])
    return match[1] if match else None


def _is_visible(inside: Path, path: Path, owner: str | None) -> bool:
    return owner is None or _owner_of(path.relative_to(inside)) in (None, owner)


def _is_inside(root: Path, name: str, owner: str | None) -> bool:
    try:
        adapter_path(root, name, owner=owner)
    except (AdapterNameError, AdapterNotFoundError):
        return False
    return True


def is_text(name: str) -> bool:
    """True if JSON can represent the name; file names can be arbitrary bytes."""
    return name.encode("utf-8", "ignore").decode() == name
