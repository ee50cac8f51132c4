"""Worker processes: start, signals and end, and the function that runs inside the process."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import fidelora
from fidelora.accel import Offload
from fidelora.accel.threads import limit_spinning, limit_threads
from fidelora.errors import FideloraError, JobStoreError
from fidelora.families import get_family
from fidelora.jobs.sql import SqlStore
from fidelora.loras.shared import SharedAdapters
from fidelora.recipe import Recipe
from fidelora.storage.bucket import Bucket
from fidelora.storage.images import image_store
from fidelora.workers.attempt import AttemptReport, WorkerLimits
from fidelora.workers.presence import Presence
from fidelora.workers.signals import WorkerSignals, beating, new_signals, spawn
from fidelora.workers.worker import Worker

log = logging.getLogger(__name__)

POLL_S = 0.5  # seconds between two polls of an idle worker
_EXIT_WAIT_S = 10.0  # seconds to wait for an exit after SIGTERM, and after SIGKILL
_NICENESS = 5  # a worker uses the whole CPU; the server must still respond promptly
_MIN_RESTART_DELAY_S, _MAX_RESTART_DELAY_S = 1.0, 60.0  # seconds; doubled after each failed start
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
CANNOT_START = 3  # exit code of a process that has reported why it cannot start


@dataclass(frozen=True)
class WorkerSetup:
    """Configuration of one worker process.

    Attributes:
        store_url: database of the jobs.
        outputs: folder for images.
        object_store: URL of the bucket for images and adapters; empty for folders only.
        adapters: folder with adapter files named by hash; None for no folder.
        model_cache: folder for downloaded base models; None for Hugging Face's default.
        hub_token: access token for the hub; None to use the one in the environment.
        base_budget_bytes: memory for loaded base models; None for one base model.
        adapter_budget_bytes: memory for loaded adapters; None for the adapter library's default.
        warm: recipe whose base model is loaded before the worker is ready.
        prepare: called first in the process, for example to set up logging; has to be picklable.
    """

    store_url: str
    outputs: Path
    device: str = "auto"
    offload: Offload = "none"
    object_store: str = ""
    adapters: Path | None = None
    model_cache: Path | None = None
    hub_token: str | None = field(default=None, repr=False)
    base_budget_bytes: int | None = None
    adapter_budget_bytes: int | None = None
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    warm: Recipe | None = None
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class WorkerPaused:
    """Message of a worker that pauses for this reason, or continues if the reason is empty."""

    reason: str


class WorkerSlot:
    """One worker of the pool. It has one process at a time, which is replaced when it ends.

    Args:
        name: name of the slot; process names consist of this name, a number and the start time.

    Attributes:
        process: the current process; None before the first start and until a restart.
        name: name of the current process, stored in its job.
        startup_error: reason why the last ended process never became ready; empty if it did.
    """

    def __init__(self, name: str, setup: WorkerSetup) -> None:
        self._slot_name = name
        self._setup = setup
        self._starts = 0
        self._restart_delay_s = 0.0
        self._next_start = 0.0
        self._reports: Connection | None = None
        self._signals, self._wake = new_signals()
        self._reported_error = ""
        self._pause_reason = ""
        self.process: BaseProcess | None = None
        self.name = ""
        self.startup_error = ""

    def start(self) -> None:
        self._starts += 1
        self.name = f"{self._slot_name}-{self._starts}-{datetime.now(UTC):%Y%m%d%H%M%S%f}"
        self._signals, self._wake = new_signals()
        self._reported_error = self._pause_reason = ""
        self._reports, child_end = spawn.Pipe(duplex=False)
        arguments = (self.name, self._setup, self._signals, child_end)
        self.process = spawn.Process(
            target=worker_process, args=arguments, name=self.name, daemon=True
        )
        self._signals.pulse.beat(self._setup.limits.load_s)
        self.process.start()
        child_end.close()  # so that the pipe closes when the process ends

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def ready(self) -> bool:
        return self.alive and self._signals.ready.is_set() and not self._pause_reason

    def is_hung(self, monotonic: float) -> bool:
        """True if the process should have reported before this monotonic time, but did not."""
        return self.alive and self._signals.pulse.has_stopped(monotonic)

    @property
    def unready_reason(self) -> str:
        """Reason why the slot makes no images: a pause or a failed start; empty if none."""
        return self._pause_reason if self._signals.ready.is_set() else self.startup_error

    @property
    def may_start(self) -> bool:
        """True unless a start failed a short time ago and the restart delay is not over."""
        return time.monotonic() >= self._next_start

    @property
    def exit_reason(self) -> str:
        """Reason why the process ended, worded as a clause after 'because'."""
        code = self.process.exitcode if self.process else None
        if code is not None and code < 0:
            return f"its process was killed by signal {-code}"
        return f"its process ended with exit code {code}"

    def reports(self) -> Iterator[AttemptReport]:
        """Yield the process's reports since the last call; store its startup error and pauses."""
        try:
            while self._reports is not None and self._reports.poll():
                message = self._reports.recv()
                if isinstance(message, str):
                    self._reported_error = message
                elif isinstance(message, WorkerPaused):
                    self._pause_reason = message.reason
                else:
                    yield message
        except (EOFError, OSError):  # the process has ended, perhaps in the middle of a message
            self._reports = None

    def forget_process(self) -> None:
        """Clear a dead process, and delay the next start if the process never became ready."""
        if self._signals.ready.is_set():
            self._restart_delay_s, self.startup_error = 0.0, ""
        else:
            self.startup_error = self._reported_error or (
                f"A worker ended before it was ready, because {self.exit_reason}; see the server's "
                "log. Signal 9 usually means that the machine has too little memory."
            )
            doubled = self._restart_delay_s * 2 or _MIN_RESTART_DELAY_S
            self._restart_delay_s = min(doubled, _MAX_RESTART_DELAY_S)
        self._next_start = time.monotonic() + self._restart_delay_s
        self.process = None

    def wake(self) -> None:
        """Make an idle worker look for a job now."""
        self._wake.wake()

    def finish(self) -> None:
        """End the process after its current job."""
        self._signals.finish.set()
        self._wake.wake()

    def terminate(self) -> None:
        """Make the worker release its job and exit."""
        if self.process and self.process.is_alive():
            self.process.terminate()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join(_EXIT_WAIT_S)

    def end(self, grace_s: float) -> None:
        """Wait for the process to exit, then terminate it, then kill it."""
        if self.process:
            self.process.join(grace_s)
            self.terminate()
            self.process.join(_EXIT_WAIT_S)
            if self.process.is_alive():
                self.kill()


def worker_process(
    name: str, setup: WorkerSetup, signals: WorkerSignals, reports: Connection
) -> None:
    """Run one worker process: load the model, then work on jobs until `signals.finish` is set.

    On SIGTERM, the process releases its job at once and exits.
    """
    signal.signal(signal.SIGTERM, _exit)
    # Ctrl-C signals every process of the terminal, but only the pool may end workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _continue_when_parent_dies()
    os.nice(_NICENESS)
    prepare_process(setup)
    limits, beat = setup.limits, signals.pulse.beat
    try:
        with beating(beat, limits.lease_s, limits.load_s):
            worker, presence = _make_worker(name, setup, beat, reports)
    except FideloraError as error:
        reports.send(str(error))
        raise SystemExit(CANNOT_START) from error
    except Exception as error:
        reports.send(f"A worker failed to start with an unexpected {type(error).__name__}: {error}")
        raise
    signals.ready.set()
    presence.start()
    try:
        while not signals.finish.is_set():
            try:
                job = worker.run_next()
            except JobStoreError as error:
                log.warning("job store unavailable, no job claimed: %s", error)
                job = None
            if job is None:
                # Poll as well: notifications of other processes can be missing or lost.
                signals.wake.wait(POLL_S)
    finally:
        presence.close()


def prepare_process(setup: WorkerSetup) -> None:
    """Set environment variables before the libraries that read them are imported."""
    limit_spinning()
    if setup.hub_token is not None:
        os.environ["HF_TOKEN"] = setup.hub_token
    if setup.prepare is not None:
        setup.prepare()


def _make_worker(
    name: str, setup: WorkerSetup, beat: Callable[[float], None], reports: Connection
) -> tuple[Worker, Presence]:
    from fidelora.accel.allocator import fast_imports, keep_freed_memory

    keep_freed_memory()
    with fast_imports():
        from fidelora.adapters.library import DEFAULT_BUDGET_BYTES, AdapterLibrary
        from fidelora.engine.engine import Engine
        from fidelora.engine.model import import_family

        if setup.warm is not None:
            import_family(get_family(setup.warm.model))
    limit_threads()
    fetch = None
    if setup.object_store:
        fetch = SharedAdapters(Bucket(setup.object_store)).fetch
    adapters = AdapterLibrary(
        setup.adapter_budget_bytes or DEFAULT_BUDGET_BYTES, folder=setup.adapters, fetch=fetch
    )
    engine = Engine(
        device=setup.device,
        offload=setup.offload,
        cache_dir=setup.model_cache,
        base_budget_bytes=setup.base_budget_bytes,
        adapters=adapters,
    )
    if setup.warm is not None:
        engine.load(setup.warm)
    store = SqlStore(setup.store_url)
    presence = Presence(store, name, str(engine.device), fidelora.__version__)
    worker = Worker(
        name,
        store,
        engine,
        image_store(setup.outputs, setup.object_store),
        setup.limits,
        on_end=reports.send,
        on_pause=lambda reason: reports.send(WorkerPaused(reason)),
        beat=beat,
        presence=presence,
    )
    return worker, presence


def _exit_with_parent() -> None:
    """End this process when the server is killed.

    Otherwise the old workers and those of a restarted server would share one device.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # releases the job
        time.sleep(_EXIT_WAIT_S)
        os.kill(os.getpid(), signal.SIGKILL)


def _continue_when_parent_dies() -> None:
    """On Linux, request SIGCONT for this process when the server dies.

    A process that is stopped (SIGSTOP) could not notice that the server has died, and would keep
    its device. The kernel sends the signal also when the server's thread that started the process
    ends; this has no effect, because the process is running.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def _exit(_signal: int, _frame: FrameType | None) -> None:
    # The exception makes the worker release its job. Both systemd and the pool may send SIGTERM,
    # and the second signal must not interrupt the release.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)
