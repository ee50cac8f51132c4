"""Training jobs that the page verifies: where they may come from, and the process that does it. Knows no Gradio.

A job comes from below one folder that whoever runs the server named, or as a zip from a browser. What a zip says of itself is not
believed: only files of a job's kinds are unpacked, each byte is counted, and names only choose among places below one new folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import secrets
import shutil
import signal
import sys
import zipfile
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fidelora.atomic import make_folder
from fidelora.errors import JobFolderError, SettingsError
from fidelora.families import get_family
from fidelora.server.context import ServerContext
from fidelora.settings import Settings
from fidelora.training.run_folder import MAX_CONFIG_BYTES, TrainingRun, read_run

_CONFIGS = ("config.yaml", ".job_config.json")
_KINDS = {".yaml", ".json", ".safetensors", ".png", ".jpg", ".jpeg", ".webp"}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
"""Ways of packing that need little memory to undo; LZMA takes up to 4 GiB if the file says so."""
_MOST_FILES = 20_000
_MOST_AT_ONCE = _MOST_FILES * 256
"""Bytes that are read from a zip in one go; the only large ones are its list of files, with about 50 bytes and a name for each."""
_UNPACKED_TIMES = 4
"""Weights and images hardly get smaller in a zip; what grows by more is no training job."""
_DEPTH = 4
_MOST_SHOWN = 2000
_NICENESS = 5
_STOP_S = 10.0


def run_names(root: Path | None) -> list[str]:
    """The training jobs below a folder, as `run_path` takes them, sorted."""
    if root is None or not root.is_dir():
        return []
    found: list[str] = []
    for folder, below, files in os.walk(root):
        name = Path(folder).relative_to(root)
        if any(config in files for config in _CONFIGS):
            found.append(name.as_posix())
        if len(name.parts) >= _DEPTH or len(found) >= _MOST_SHOWN:
            below.clear()
    return sorted(name for name in found if name.encode("utf-8", "ignore").decode() == name)


def run_path(root: Path | None, name: str) -> Path:
    """The folder of a job below `root`, and nowhere else.

    Raises:
        SettingsError: no folder was named.
        JobFolderError: it would be outside, or is not there.
    """
    if root is None:
        raise SettingsError(
            "This server verifies uploaded jobs only; its operator can name a folder with FIDELORA_JOBS_PATH."
        )
    inside = root.resolve()
    path = (inside / name).resolve() if "\0" not in name else inside.parent
    if not name or not path.is_relative_to(inside) or not path.is_dir():
        raise JobFolderError(
            f"There is no training job {name!r:.200} in the folder of jobs; choose one of the list."
        )
    return path


def unpack(archive: Path, target: Path, max_bytes: int) -> tuple[Path, int]:
    """Unpack what a training job needs out of a zip.

    Args:
        target: a new folder; it is removed again if anything is wrong.
        max_bytes: of the zip; what it holds may be four times as large.

    Returns:
        the job's folder in it, and how many files were left out because verifying needs none of their kind.

    Raises:
        JobFolderError: it is no zip, holds no job, more than one, or too much.
    """
    make_folder(target)
    try:
        with _SmallReads(archive) as file, zipfile.ZipFile(file) as packed:
            left_out = _unpack(packed, target, max_bytes * _UNPACKED_TIMES)
    except JobFolderError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OSError,
        ValueError,
    ) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise JobFolderError(
            f"The zip cannot be unpacked: {str(error) or type(error).__name__:.200}."
        ) from error
    jobs = run_names(target)
    if len(jobs) != 1:
        shutil.rmtree(target, ignore_errors=True)
        said = (
            "no training job: none of its folders has a config.yaml"
            if not jobs
            else f"{len(jobs)} training jobs; pack one"
        )
        raise JobFolderError(f"The zip holds {said}.")
    return target / jobs[0], left_out


class _SmallReads(io.FileIO):
    """A zip whose list of files is refused before it is read if it is too long: all of it becomes objects, however many."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        if min(left, left if size is None or size < 0 else size) > _MOST_AT_ONCE:
            raise JobFolderError(
                f"The zip's list of files has more than {_MOST_AT_ONCE:,} bytes; {_MOST_FILES:,} files are the most."
            )
        return super().read(size)


def _unpack(packed: zipfile.ZipFile, target: Path, most_bytes: int) -> int:
    entries = packed.infolist()
    if len(entries) > _MOST_FILES:
        raise JobFolderError(f"The zip holds {len(entries):,} files; {_MOST_FILES:,} are the most.")
    written = left_out = 0
    for entry in entries:
        if entry.is_dir():
            continue
        name = PurePosixPath(entry.filename)
        if (
            name.is_absolute()
            or ".." in name.parts
            or "\\" in entry.filename
            or ":" in entry.filename
        ):
            raise JobFolderError(
                f"The zip has a file {entry.filename!r:.200}, whose place is outside of it."
            )
        if name.suffix.lower() not in _KINDS or "__MACOSX" in name.parts:
            left_out += 1
            continue
        if entry.compress_type not in _METHODS:
            raise JobFolderError(
                f"The zip's {entry.filename!r:.200} is packed by a method that is not read here; use Deflate."
            )
        path = target / name
        size, most = 0, MAX_CONFIG_BYTES if name.name in _CONFIGS else most_bytes
        make_folder(path.parent)
        with (
            packed.open(entry) as source,
            path.open("xb") as file,
        ):  # never over another entry; links become plain files
            while part := source.read(2**20):
                written += len(part)
                size += len(part)
                if size > most:
                    raise JobFolderError(
                        f"The zip's {entry.filename!r:.200} has more than {most:,} bytes."
                    )
                if written > most_bytes:
                    raise JobFolderError(f"The zip holds more than {most_bytes:,} bytes.")
                file.write(part)
    return left_out


def read_inside(folder: Path, context: ServerContext) -> TrainingRun:
    """A job none of whose files lies outside of its folder, wherever its configuration and its links point.

    Raises:
        JobFolderError: one does, or it is no job, or it has a VAE of its own: a file of this machine or of the hub that the server
            would load because a stranger names it.
    """
    job = read_run(folder)
    inside = folder.resolve()
    for path in (
        *job.checkpoints.values(),
        *job.images.values(),
        *(folder / name for name in _CONFIGS),
    ):
        if not path.resolve().is_relative_to(inside):
            raise JobFolderError(f"The job {job.name} names files outside of its folder.")
    if job.vae and job.vae != base_for(job, context):
        raise JobFolderError(
            f"The job {job.name} names a VAE of its own (model.vae_path), and the page loads only this server's models; "
            "verify it with the command fidelora verify."
        )
    return job


def base_for(job: TrainingRun, context: ServerContext) -> str:
    """The base model that this server has for the model that a job trained; what the job names could be any file here."""
    return str(
        context.server_defaults[job.model].get("base_model") or get_family(job.model).base_model
    )


def hub_variables(settings: Settings) -> dict[str, str]:
    """What the hub's client in another process has to know of a server's settings."""
    variables = {}
    if settings.model_cache_dir is not None:
        variables["HF_HUB_CACHE"] = str(
            settings.model_cache_dir.absolute()
        )  # the process runs in another folder
    if settings.hf_token is not None:
        variables["HF_TOKEN"] = settings.hf_token.get_secret_value()
    return variables


@dataclass(frozen=True)
class Outcome:
    """How `fidelora verify` ended: its exit code, and its report if it wrote one."""

    code: int
    report: Path | None


class Verifier:
    """Runs `fidelora verify` as a process, one at a time.

    Args:
        device: that it computes on.
        timeout_s: after which it is ended.
        variables: of its environment, besides this process's own.
    """

    def __init__(self, device: str, timeout_s: float, variables: Mapping[str, str]) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._variables = dict(variables)
        self._turn = asyncio.Semaphore(1)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._canceled: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether another one has to wait."""
        return self._turn.locked()

    async def run(
        self, run_id: str, folder: Path, base_model: str, out: Path, *, step: str, doctor: bool
    ) -> AsyncIterator[str | Outcome]:
        """Each line that it prints, and at the end the outcome. Whoever stops listening ends it.

        Args:
            run_id: to cancel it by; it need not have begun.
            out: a folder for the report.

        Raises:
            JobFolderError: it was canceled, or took too long.
        """
        command = [
            sys.executable, "-P", "-m", "fidelora", "verify", str(folder), "--base-model", base_model, "--step", step,
            "--device", self._device, "--report", str(out), *(["--doctor"] if doctor else []),
        ]  # fmt: skip
        async with self._turn:
            if run_id in self._canceled:
                self._canceled.discard(run_id)
                raise JobFolderError("Canceled.")
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={
                    **os.environ,
                    **self._variables,
                    "NO_COLOR": "1",
                    "COLUMNS": "200",
                    "PYTHONUNBUFFERED": "1",
                },
                cwd=out,
                start_new_session=True,
            )
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(
                    os.PRIO_PROCESS, process.pid, _NICENESS
                )  # as workers: answers do not wait for its turn
            self._running[run_id] = process
            try:
                assert process.stdout is not None
                async with asyncio.timeout(self._timeout_s):
                    async for raw in process.stdout:
                        yield raw.decode("utf-8", "replace").rstrip()
                    code = await process.wait()
            except TimeoutError:
                raise JobFolderError(
                    f"Verifying took longer than {self._timeout_s:g} seconds, and was ended."
                ) from None
            finally:
                del self._running[run_id]
                await _end(process)
            if run_id in self._canceled:
                self._canceled.discard(run_id)
                raise JobFolderError("Canceled.")
        report = out / "report.html"
        yield Outcome(code, report if report.is_file() else None)

    def cancel(self, run_id: str) -> None:
        """End a run, or have it not begin."""
        self._canceled.add(run_id)
        if process := self._running.get(run_id):
            _signal(process, signal.SIGTERM)

    async def close(self) -> None:
        """End all of them."""
        for process in list(self._running.values()):
            await _end(process)


def new_id() -> str:
    """A name that nobody can guess."""
    return secrets.token_hex(16)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    _signal(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        _signal(process, signal.SIGKILL)
        await process.wait()
