"""Files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from fidelora.errors import OutputError

_PREFIX, _SUFFIX = ".fidelora-", ".part"
_LEFT_OVER_S = 24 * 3600.0


def make_folder(folder: Path) -> None:
    """Make a folder for output, with its parents, and see that files can be written there.

    Raises:
        OutputError: they cannot.
    """
    probe = folder / temporary_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OutputError(
            f"Nothing can be written to the folder {folder}: {_reason(error)}."
        ) from error


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what processes that were killed left half written, if it is old enough that nobody can be at it still."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
            path.unlink(missing_ok=True)


def temporary_name() -> str:
    """A name for a file that is not finished; `remove_stale_temporaries` knows it."""
    return f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that no reader, and no crash, ever sees a part of it.

    Raises:
        OutputError: it cannot be written (no such folder, no permission, disk full); nothing is left behind then.
    """
    temporary = path.parent / temporary_name()
    try:
        # Not `tempfile`: its files are for their owner alone, and this one is to be as any other that the user makes.
        with os.fdopen(
            os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb"
        ) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        _remove(temporary)
        raise OutputError(
            f"{path} could not be written: {_reason(error)}. Nothing was left there."
        ) from error
    except BaseException:  # an interrupt
        _remove(temporary)
        raise
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} was written, but its folder could not be made durable: {_reason(error)}."
        ) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (OSError, ValueError):
        return  # where it could not be made, it cannot be removed; the caller has the reason


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where folders can be opened for that (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
