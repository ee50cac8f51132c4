"""From what a request calls an adapter to a file on this machine."""

from __future__ import annotations

from pathlib import Path

from fidelora.errors import AdapterNotFoundError, AdapterPlaceError


def adapter_under(root: Path, name: str) -> Path:
    """The adapter file that `name` means under `root`, and nowhere else.

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
        raise AdapterPlaceError(f"{name!r} is no name of an adapter: give its path below the folder of adapters, without '..'.")
    if not name.lower().endswith(".safetensors"):
        raise AdapterPlaceError(f"{name!r} is no .safetensors file; give the full name of the file.")
    inside = root.resolve()
    path = (inside / name).resolve()  # an absolute name stands for itself here
    if not path.is_relative_to(inside):
        raise AdapterPlaceError(f"{name!r} is outside of the folder of adapters.")
    try:
        found = path.is_file()
    except OSError:  # a name that no file can have
        found = False
    if not found:
        raise AdapterNotFoundError(f"There is no adapter {name!r} in the folder of adapters; check its name.")
    return path
