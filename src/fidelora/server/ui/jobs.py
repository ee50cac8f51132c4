"""Training jobs that the page verifies: where they may come from, and the process that does it. Knows no Gradio.

A job comes from below one folder that whoever runs the server named, or as a zip from a browser. What a zip says of itself is not
believed: only files of a job's kinds are unpacked, each byte is counted, and names only choose among places below one new folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import zipfile
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fidelora.errors import JobFolderError, SettingsError
from fidelora.files import make_folder
from fidelora.models import model_spec
from fidelora.preview.job_folder import TrainingJob, read_job
from fidelora.preview.replay import plan_samples
from fidelora.server.parts import Parts

_CONFIGS = ("config.yaml", ".job_config.json")
_KINDS = {".yaml", ".json", ".safetensors", ".png", ".jpg", ".jpeg", ".webp"}
_MOST_FILES = 20_000
_UNPACKED_TIMES = 4
"""Weights and images hardly get smaller in a zip; what grows by more is no training job."""
_DEPTH = 4
_MOST_SHOWN = 2000
_NICENESS = 5
_STOP_S = 10.0


def job_names(root: Path | None) -> list[str]:
    """The training jobs below a folder, as `job_under` takes them, sorted."""
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


def job_under(root: Path | None, name: str) -> Path:
    """The folder of a job below `root`, and nowhere else.

    Raises:
        SettingsError: no folder was named.
        JobFolderError: it would be outside, or is not there.
    """
    if root is None:
        raise SettingsError("This server verifies uploaded jobs only; its operator can name a folder with FIDELORA_JOBS_PATH.")
    inside = root.resolve()
    path = (inside / name).resolve() if "\0" not in name else inside.parent
    if not name or not path.is_relative_to(inside) or not path.is_dir():
        raise JobFolderError(f"There is no training job {name!r:.200} in the folder of jobs; choose one of the list.")
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
        with zipfile.ZipFile(archive) as packed:
            left_out = _unpack(packed, target, max_bytes * _UNPACKED_TIMES)
    except JobFolderError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise JobFolderError(f"The zip cannot be unpacked: {str(error) or type(error).__name__:.200}.") from error
    jobs = job_names(target)
    if len(jobs) != 1:
        shutil.rmtree(target, ignore_errors=True)
        said = "no training job: none of its folders has a config.yaml" if not jobs else f"{len(jobs)} training jobs; pack one"
        raise JobFolderError(f"The zip holds {said}.")
    return target / jobs[0], left_out


def _unpack(packed: zipfile.ZipFile, target: Path, most_bytes: int) -> int:
    entries = packed.infolist()
    if len(entries) > _MOST_FILES:
        raise JobFolderError(f"The zip holds {len(entries):,} files; {_MOST_FILES:,} are the most.")
    written = left_out = 0
    for entry in entries:
        if entry.is_dir():
            continue
        name = PurePosixPath(entry.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in entry.filename:
            raise JobFolderError(f"The zip has a file {entry.filename!r:.200}, whose place is outside of it.")
        if name.suffix.lower() not in _KINDS or "__MACOSX" in name.parts:
            left_out += 1
            continue
        path = target / name
        make_folder(path.parent)
        with packed.open(entry) as source, path.open("xb") as file:  # never over another entry; links become plain files
            while part := source.read(2**20):
                written += len(part)
                if written > most_bytes:
                    raise JobFolderError(f"The zip holds more than {most_bytes:,} bytes.")
                file.write(part)
    return left_out


def read_inside(folder: Path) -> TrainingJob:
    """A job none of whose files lies outside of its folder, wherever its configuration and its links point.

    Raises:
        JobFolderError: one does, or it is no job.
    """
    job = read_job(folder)
    inside = folder.resolve()
    for path in (*job.checkpoints.values(), *job.images.values(), *(folder / name for name in _CONFIGS)):
        if not path.resolve().is_relative_to(inside):
            raise JobFolderError(f"The job {job.name} names files outside of its folder.")
    return job


def base_for(job: TrainingJob, parts: Parts) -> str:
    """The base model that this server has for the model that a job trained; what the job names could be any file here."""
    planned = plan_samples(job, 0)
    model = planned[0].recipe.model if planned else next(iter(parts.numerics))
    return str(parts.numerics[model].get("base_model") or model_spec(model).base_model)


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
    """

    def __init__(self, device: str, timeout_s: float) -> None:
        self._device = device
        self._timeout_s = timeout_s
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
                env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
                cwd=out,
                start_new_session=True,
            )
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)  # as workers: answers do not wait for its turn
            self._running[run_id] = process
            try:
                assert process.stdout is not None
                async with asyncio.timeout(self._timeout_s):
                    async for raw in process.stdout:
                        yield raw.decode("utf-8", "replace").rstrip()
                    code = await process.wait()
            except TimeoutError:
                raise JobFolderError(f"Verifying took longer than {self._timeout_s:g} seconds, and was ended.") from None
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
