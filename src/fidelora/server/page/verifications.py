"""Training runs on the server: finding, unpacking and checking them.

A run is a folder below FIDELORA_JOBS_PATH or an uploaded zip. The metadata of a zip is not trusted:
only the file types of a run are unpacked, the unpacked bytes are counted, and all paths are below
one new folder. Does not import Gradio.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path, PurePosixPath

from fidelora.atomic import make_folder, remove_folder
from fidelora.errors import SettingsError, TrainingRunError
from fidelora.families import get_family
from fidelora.server.context import ServerContext
from fidelora.training.config_file import CONFIG_NAMES, MAX_CONFIG_BYTES
from fidelora.training.run_folder import TrainingRun, read_run

_FILE_TYPES = {".yaml", ".json", ".safetensors", ".png", ".jpg", ".jpeg", ".webp"}
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
"""Compression methods that need little memory; a file can make LZMA use up to 4 GiB."""
_MAX_FILES = 20_000
_MAX_READ_BYTES = _MAX_FILES * 256
"""Largest single read from a zip, in bytes. Only the central directory is read in one call; its
entry for a file takes about 50 bytes plus the file's name."""
_MAX_EXPANSION = 4
"""Largest ratio of unpacked to packed bytes. Weights and images hardly compress; a zip that expands
further is not a training run."""
_MAX_DEPTH = 4  # folder levels to search for runs
_MAX_PARTS = 12  # maximum depth of a path in a zip; the trainer's folders are less deep
_MAX_NAME_BYTES = 200  # maximum length of a name in such a path; file systems allow 255 bytes
_MAX_LISTED_RUNS = 2000


def list_runs(root: Path | None) -> list[str]:
    """Return the sorted names of the training runs below a folder, for use with `find_run`."""
    if root is None or not root.is_dir():
        return []
    found: list[str] = []
    for folder, below, files in os.walk(root):
        name = Path(folder).relative_to(root)
        if any(config in files for config in CONFIG_NAMES):
            found.append(name.as_posix())
        if len(name.parts) >= _MAX_DEPTH or len(found) >= _MAX_LISTED_RUNS:
            below.clear()
    return sorted(name for name in found if name.encode("utf-8", "ignore").decode() == name)


def find_run(root: Path | None, name: str) -> Path:
    """Return the folder of a training run; it is always below `root`.

    Raises:
        SettingsError: the server has no folder of training runs.
        TrainingRunError: the folder does not exist or is outside of `root`.
    """
    if root is None:
        raise SettingsError(
            "The server has no folder of training runs. Upload a zip, or set FIDELORA_JOBS_PATH on "
            "the server."
        )
    inside = root.resolve()
    try:
        path = (inside / name).resolve()
        found = bool(name) and path.is_relative_to(inside) and path.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that no folder can have
        found = False
    if not found:
        raise TrainingRunError(
            f"The training run {name!r:.200} is not on this server; check its name."
        )
    return path


def unpack_run(archive: Path, target: Path, max_bytes: int) -> tuple[Path, int]:
    """Unpack the files of a zip that a verification needs.

    Args:
        target: a new folder; it is removed again on any error.
        max_bytes: size limit of the zip; the unpacked files may be four times as large.

    Returns:
        the run's folder below `target`, and the number of files left out because of their type.

    Raises:
        TrainingRunError: the zip is damaged or too large, or does not contain exactly one run.
    """
    make_folder(target)
    try:
        with _LimitedReads(archive) as file, zipfile.ZipFile(file) as packed:
            left_out = _unpack_files(packed, target, max_bytes * _MAX_EXPANSION)
    except TrainingRunError:
        remove_folder(target)
        raise
    except Exception as error:  # damaged files make `zipfile` raise errors of many types
        remove_folder(target)
        # The text of an OSError has the path of a folder on the server.
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise TrainingRunError(
            f"The zip cannot be unpacked: {reason or type(error).__name__:.200}."
        ) from error
    runs = list_runs(target)
    if len(runs) != 1:
        remove_folder(target)
        if not runs:
            raise TrainingRunError(
                "The zip contains no training run: none of its folders has a config.yaml."
            )
        raise TrainingRunError(f"The zip contains {len(runs)} training runs; pack only one.")
    return target / runs[0], left_out


class _LimitedReads(io.FileIO):
    """File that limits the size of a single read, such as that of a zip's central directory.

    `zipfile` reads the whole directory in one call and creates an object per entry.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        if min(left, left if size is None or size < 0 else size) > _MAX_READ_BYTES:
            raise TrainingRunError(
                f"The zip's list of files has more than {_MAX_READ_BYTES:,} bytes; "
                f"at most {_MAX_FILES:,} files are allowed."
            )
        return super().read(size)


def _unpack_files(packed: zipfile.ZipFile, target: Path, max_bytes: int) -> int:
    entries = packed.infolist()
    if len(entries) > _MAX_FILES:
        raise TrainingRunError(
            f"The zip contains {len(entries):,} files; at most {_MAX_FILES:,} are allowed."
        )
    for entry in entries:  # all of them, before anything is written
        _check_path(entry.filename)
    if sum(entry.file_size for entry in entries) > max_bytes:
        raise TrainingRunError(f"The zip contains more than {max_bytes:,} bytes.")
    written = left_out = 0
    for entry in entries:
        if entry.is_dir():
            continue
        name, shown = PurePosixPath(entry.filename), f"{entry.filename!r:.200}"
        if name.suffix.lower() not in _FILE_TYPES or "__MACOSX" in name.parts:
            left_out += 1
            continue
        if entry.compress_type not in _COMPRESSIONS:
            raise TrainingRunError(
                f"The compression method of {shown} in the zip is not supported; use Deflate."
            )
        path = target / name
        size, max_size = 0, MAX_CONFIG_BYTES if name.name in CONFIG_NAMES else max_bytes
        make_folder(path.parent)
        # Mode "x" never overwrites another entry. Symbolic links become plain files.
        with packed.open(entry) as source, path.open("xb") as file:
            while part := source.read(2**20):
                written += len(part)
                size += len(part)
                if size > max_size:
                    raise TrainingRunError(
                        f"The file {shown} in the zip has more than {max_size:,} bytes."
                    )
                if written > max_bytes:
                    raise TrainingRunError(f"The zip contains more than {max_bytes:,} bytes.")
                file.write(part)
    return left_out


def _check_path(filename: str) -> None:
    """Check the path of an entry.

    Raises:
        TrainingRunError: the path leads outside of the zip, is too deep, or has too long a name.
    """
    if not filename:
        raise TrainingRunError("The zip contains a file without a name; pack the folder again.")
    path, shown = PurePosixPath(filename), f"{filename!r:.200}"
    if path.is_absolute() or ".." in path.parts or "\\" in filename or ":" in filename:
        raise TrainingRunError(f"The zip contains a path that leads outside of it: {shown}.")
    if len(path.parts) > _MAX_PARTS:
        raise TrainingRunError(
            f"The zip contains a path of {len(path.parts):,} parts: {shown}; at most {_MAX_PARTS} "
            "are allowed."
        )
    if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.parts):
        raise TrainingRunError(
            f"The zip contains a name of more than {_MAX_NAME_BYTES} bytes: {shown}."
        )


def read_contained_run(folder: Path, context: ServerContext) -> TrainingRun:
    """Read a training run and check that all its files, with links resolved, are in its folder.

    Raises:
        TrainingRunError: a file is outside, the folder is not a training run, the run has its own
            VAE, which could be any local or hub file, or its checkpoints are base models.
    """
    run = read_run(folder)
    inside = folder.resolve()
    files = (
        *run.checkpoints.values(),
        *(path for paths in run.stage_checkpoints.values() for path in paths.values()),
        *run.images.values(),
        *(run.first_round.images.values() if run.first_round else ()),
        *(folder / name for name in CONFIG_NAMES),
    )
    if not all(file.resolve().is_relative_to(inside) for file in files):
        raise TrainingRunError(f"The training run {run.name} uses files outside of its folder.")
    if run.full_models:
        raise TrainingRunError(
            f"The checkpoints of the training run {run.name} are base models, but the server loads "
            "only its own base models. Use fidelora verify on the command line."
        )
    if run.vae and run.vae != server_base_model(run, context):
        raise TrainingRunError(
            f"The training run {run.name} has its own VAE (model.vae_path), but the server loads "
            "only its own models. Use fidelora verify on the command line."
        )
    return run


def server_base_model(run: TrainingRun, context: ServerContext) -> str:
    """Return this server's base model for a run's model family.

    The base model that the run names is ignored: it could be any file on this machine.
    """
    return str(
        context.server_defaults[run.model].get("base_model") or get_family(run.model).base_model
    )
