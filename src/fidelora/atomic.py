"""Atomic writing of files: a file is either complete or absent."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from pathlib import Path

from fidelora.errors import OutputError, StorageError, StorageFullError

_PREFIX, _SUFFIX = ".fidelora-", ".part"
_STALE_S = 24 * 3600.0  # seconds; no write takes that long


def make_folder(folder: Path) -> None:
    """Create an output folder and its parents, and check that files can be written there.

    Raises:
        StorageError: the folder cannot be created, or is not writable.
        OutputError: the folder's name is not valid.
    """
    probe = folder / temporary_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise output_error(f"The folder {folder} is not writable", error) from error


def remove_stale_temporaries(folder: Path) -> None:
    """Remove the unfinished files of killed processes.

    Only files older than a day are removed, because another process may still write a newer one.
    """
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if time.time() - path.stat().st_mtime > _STALE_S:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> bool:
    """Remove a folder with all its contents; return False if that is not possible.

    This fails if a file cannot be removed or folders are nested too deeply for Python. No error is
    raised, because the program can continue with less disk space.
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
        StorageError: the file cannot be written (no such folder, no permission, disk full), and no
            unfinished file is left behind; or the complete file was written, but its folder cannot
            be synced to disk.
        OutputError: the file's name is not valid.
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
        rest = "No unfinished file was left."
        raise output_error(f"{path} could not be written", error, rest) from error
    except BaseException:  # an interrupt
        _remove(temporary)
        raise
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise output_error(
            f"{path} was written, but its folder could not be synced to disk", error
        ) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (OSError, ValueError):
        return  # the caller raises the error of the write


def is_full(error: OSError) -> bool:
    """True if a write failed because the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def output_error(what: str, error: OSError | ValueError, rest: str = "") -> OutputError:
    """Return the error to raise for a failed write.

    Args:
        what: what could not be done, without a full stop.
        error: error of the write; a ValueError means that the name contains a NUL.
        rest: further sentences.
    """
    reason, kind = str(error), OutputError
    if isinstance(error, OSError):
        reason = error.strerror or reason
        kind = StorageFullError if is_full(error) else StorageError
    return kind(f"{what}: {reason}. {rest}".rstrip())


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a new file name survives a crash; not done on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
