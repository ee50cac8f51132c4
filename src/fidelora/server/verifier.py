"""Commands that verify training runs and explain pictures, as child processes of the server.

Does not import Gradio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fidelora.errors import TrainingRunError
from fidelora.settings import Settings

CANCELED = "Canceled."
"""Message of the error that ends a canceled verification."""
_NICENESS = 5  # as for the workers, so that the server stays responsive
_STOP_S = 10.0  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Outcome:
    """Exit code of a command, and its report if it wrote one."""

    code: int
    report: Path | None


class Verifier:
    """Runs `fidelora verify` and `fidelora explain` as child processes, one at a time.

    Args:
        device: device of the computation.
        timeout_s: seconds after which the process is stopped.
        environment: variables added to those of this process.
    """

    def __init__(self, device: str, timeout_s: float, environment: Mapping[str, str]) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._environment = dict(environment)
        self._turn = asyncio.Semaphore(1)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._canceled: set[str] = set()

    @property
    def busy(self) -> bool:
        """True if a further verification has to wait."""
        return self._turn.locked()

    def run(
        self,
        verification_id: str,
        folder: Path,
        base_model: str,
        out: Path,
        *,
        step: str,
        doctor: bool,
    ) -> AsyncGenerator[str | Outcome, None]:
        """Verify a run: yield each line of output, and at the end the outcome.

        The process is stopped when the caller stops iterating.

        Args:
            verification_id: id for `cancel`, which can be called before the process starts.
            out: folder of the report.

        Raises:
            TrainingRunError: the verification was canceled or took too long.
        """
        command = ["verify", str(folder), "--base-model", base_model, "--step", step]
        command += ["--report", str(out), *(["--doctor"] if doctor else [])]
        return self._run(verification_id, command, out)

    def explain(
        self,
        verification_id: str,
        folder: Path,
        picture: Path,
        base_model: str,
        out: Path,
        options: Sequence[str] = (),
    ) -> AsyncGenerator[str | Outcome, None]:
        """Explain a picture: yield each line of output, and at the end the outcome.

        Args:
            picture: file of the picture.
            options: further options of the command, such as `--step`.

        Raises:
            TrainingRunError: the command was canceled or took too long.
        """
        command = ["explain", str(folder), str(picture), "--base-model", base_model]
        command += ["--report", str(out), *options]
        return self._run(verification_id, command, out)

    async def _run(
        self, verification_id: str, arguments: Sequence[str], out: Path
    ) -> AsyncGenerator[str | Outcome, None]:
        command = [sys.executable, "-P", "-m", "fidelora", *arguments]
        command += ["--device", self._device, "--progress-lines"]
        async with self._turn:
            self._raise_if_canceled(verification_id)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={
                    **os.environ,
                    **self._environment,
                    "NO_COLOR": "1",
                    "COLUMNS": "200",
                    "PYTHONUNBUFFERED": "1",
                },
                cwd=out,
                start_new_session=True,
            )
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            self._running[verification_id] = process
            try:
                assert process.stdout is not None
                async with asyncio.timeout(self._timeout_s):
                    async for raw in process.stdout:
                        yield raw.decode("utf-8", "replace").rstrip()
                    code = await process.wait()
            except TimeoutError:
                raise TrainingRunError(
                    f"The command exceeded {self._timeout_s:g} seconds and was stopped. Choose a "
                    "single step, or raise FIDELORA_INFERENCE_TIMEOUT."
                ) from None
            finally:
                del self._running[verification_id]
                await _stop(process)
            self._raise_if_canceled(verification_id)
        report = out / "report.html"
        with contextlib.suppress(FileNotFoundError):
            (out / "explain.html").replace(report)
        yield Outcome(code, report if report.is_file() else None)

    def cancel(self, verification_id: str) -> None:
        """Stop a verification, or prevent it from starting."""
        self._canceled.add(verification_id)
        if process := self._running.get(verification_id):
            _signal(process, signal.SIGTERM)

    async def close(self) -> None:
        """Stop all verifications."""
        for process in list(self._running.values()):
            await _stop(process)

    def _raise_if_canceled(self, verification_id: str) -> None:
        if verification_id in self._canceled:
            self._canceled.discard(verification_id)
            raise TrainingRunError(CANCELED)


def hub_environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables that configure `huggingface_hub` in a child process."""
    variables = {}
    if settings.model_cache_dir is not None:
        # Absolute, because the process runs in another folder.
        variables["HF_HUB_CACHE"] = str(settings.model_cache_dir.absolute())
    if settings.hf_token is not None:
        variables["HF_TOKEN"] = settings.hf_token.get_secret_value()
    return variables


def random_id() -> str:
    """Return a random id that cannot be guessed: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    _signal(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        _signal(process, signal.SIGKILL)
        await process.wait()
