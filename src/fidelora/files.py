"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fidelora.errors import OutputError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that no reader, and no crash, ever sees a part of it.

    Raises:
        OutputError: it cannot be written (no such folder, no permission, disk full); nothing is left behind then.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".fidelora-", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files for their owner alone
        temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{path} could not be written: {reason}. Nothing was left there.") from error
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path} was written, but its folder could not be made durable: {error.strerror or error}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where folders can be opened for that (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
