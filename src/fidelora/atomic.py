"""Atomic writing of files: a file is either complete or absent."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from fidelora.errors import OutputError

_PREFIX, _SUFFIX = ".fidelora-", ".part"
_STALE_S = 24 * 3600.0  # seconds; no write takes that long


def make_folder(folder: Path) -> None:
    """Create an output folder and its parents, and check that files can be written there.

    Raises:
        OutputError: the folder cannot be created, or is not writable.
    """
    probe = folder / temporary_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OutputError(f"The folder {folder} is not writable: {_reason(error)}.") from error


def remove_stale_temporaries(folder: Path) -> None:
    """Remove the unfinished files of killed processes.

    Only files older than a day are removed, because another process may still write a newer one.
    """
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if time.time() - path.stat().st_mtime > _STALE_S:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> bool:
    """Remove a folder with all its contents; return False if that is not possible.

    Some files may not be removable, and folders may be nested too deeply for Python. This raises no
    error, because the program can continue without the space.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return True
    except (OSError, RecursionError):
        return False
    return True


def temporary_name() -> str:
    """Return a name for an unfinished file that `remove_stale_temporaries` recognises."""
    return f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that the file is never incomplete, even after a crash.

    Raises:
        OutputError: the file cannot be written (no such folder, no permission, disk full); no
            unfinished file is left behind.
    """
    temporary = path.parent / temporary_name()
    try:
        # `tempfile` would restrict the file to its owner; this file gets the usual permissions.
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
            f"{path} could not be written: {_reason(error)}. No unfinished file was left."
        ) from error
    except BaseException:  # an interrupt
        _remove(temporary)
        raise
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} was written, but its folder could not be synced to disk: {_reason(error)}."
        ) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (OSError, ValueError):
        return  # the caller raises the error of the write


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a new file name survives a crash; not done on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
