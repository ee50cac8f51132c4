"""Where one worker process after the other lives, and what such a process does."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

from fidelora.accel import Offload
from fidelora.errors import FideloraError
from fidelora.jobs.sql import SqlStore
from fidelora.recipe import Recipe
from fidelora.workers.worker import AttemptReport, Worker, WorkerLimits

log = logging.getLogger(__name__)

_processes = multiprocessing.get_context(
    "spawn"
)  # a forked child cannot use CUDA, and inherits every open connection
_IDLE_S = 0.5
_KILL_WAIT_S = 10.0
_NICENESS = 5
"""A worker on the CPU takes all of it; the server, which needs little, should not wait for that little."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
CANNOT_START = 3
"""The exit code of a process that says why it cannot start."""


@dataclass(frozen=True)
class WorkerSetup:
    """What one worker process needs to know.

    Attributes:
        store_url: of the jobs' database.
        outputs: the folder for images.
        adapters: the folder of adapters by hash, if there is one.
        model_cache: where downloads of base models are kept, if not in their usual place.
        base_budget_bytes, adapter_budget_bytes: how much memory loaded base models, and adapters, may take; None: one base model.
        warm: a recipe whose base model is loaded before the worker says that it is ready.
        prepare: called first in the process, for example to set up logging; it has to be picklable.
    """

    store_url: str
    outputs: Path
    device: str = "auto"
    offload: Offload = "none"
    adapters: Path | None = None
    model_cache: Path | None = None
    base_budget_bytes: int | None = None
    adapter_budget_bytes: int | None = None
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    warm: Recipe | None = None
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class WorkerSignals:
    """Between a process and who watches it: it is ready; it shall end after its job; there may be a job."""

    ready: Event
    finish: Event
    wake: Event


class WorkerSlot:
    """Starts a process, hears what it reports, and knows when the next one may start.

    Args:
        name: of the place; each process adds its own number to it.
    """

    def __init__(self, name: str, setup: WorkerSetup) -> None:
        self._place = name
        self._setup = setup
        self._count = 0
        self._pause_s = 0.0
        self._next_start = 0.0
        self._reports: Connection | None = None
        self._ready, self._finish, self._wake = (_processes.Event() for _ in range(3))
        self.process: BaseProcess | None = None
        self.name = ""
        self.trouble = ""

    def start(self) -> None:
        self._count += 1
        self.name = f"{self._place}-{self._count}-{datetime.now(UTC):%Y%m%d%H%M%S%f}"
        self._ready, self._finish, self._wake = (_processes.Event() for _ in range(3))
        self._reports, theirs = _processes.Pipe(duplex=False)
        signals = WorkerSignals(self._ready, self._finish, self._wake)
        arguments = (self.name, self._setup, signals, theirs)
        self.process = _processes.Process(
            target=worker_process, args=arguments, name=self.name, daemon=True
        )
        self.process.start()
        theirs.close()  # so that the pipe ends with the process

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def ready(self) -> bool:
        return self.alive and self._ready.is_set()

    @property
    def may_start(self) -> bool:
        """Whether the pause after a process that never became ready is over."""
        return time.monotonic() >= self._next_start

    @property
    def reason(self) -> str:
        """Why the process is gone, to be said after 'because'."""
        code = self.process.exitcode if self.process else None
        if code is not None and code < 0:
            return f"its process was killed by signal {-code}"
        return f"its process ended with exit code {code}"

    def reports(self) -> Iterator[AttemptReport]:
        """What the process reported since the last look; its trouble at the start, if it had any, is noted."""
        try:
            while self._reports is not None and self._reports.poll():
                message = self._reports.recv()
                if isinstance(message, str):
                    self.trouble = message
                else:
                    yield message
        except (EOFError, OSError):  # the process is gone, perhaps in the middle of a message
            self._reports = None

    def bury(self) -> None:
        """Forget a dead process; after one that never became ready comes a pause, each time a longer one."""
        if self._ready.is_set():
            self._pause_s, self.trouble = 0.0, ""
        else:
            self._pause_s = min(self._pause_s * 2 or _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._next_start = time.monotonic() + self._pause_s
        self.process = None

    def wake(self) -> None:
        """Have an idle worker look for a job now."""
        self._wake.set()

    def finish(self) -> None:
        """Let the worker end after the job that it has."""
        self._finish.set()
        self._wake.set()

    def ask_to_leave(self) -> None:
        """Have the worker give its job back and end."""
        if self.process and self.process.is_alive():
            self.process.terminate()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join(_KILL_WAIT_S)

    def end(self, grace_s: float) -> None:
        """Wait, then ask, then kill."""
        if self.process:
            self.process.join(grace_s)
            self.ask_to_leave()
            self.process.join(_KILL_WAIT_S)
            if self.process.is_alive():
                self.kill()


def worker_process(
    name: str, setup: WorkerSetup, signals: WorkerSignals, reports: Connection
) -> None:
    """The life of one process: load, say so, and work on jobs until told to finish. SIGTERM gives the running job back at once."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to all processes of a terminal; the pool decides what it means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.nice(_NICENESS)
    if setup.prepare is not None:
        setup.prepare()
    try:
        worker = _make_worker(name, setup, reports)
    except FideloraError as error:
        reports.send(str(error))
        raise SystemExit(CANNOT_START) from error
    signals.ready.set()
    while not signals.finish.is_set():
        if worker.run_next() is None:
            signals.wake.wait(_IDLE_S)  # jobs of other servers on this store come without a signal
            signals.wake.clear()


def _make_worker(name: str, setup: WorkerSetup, reports: Connection) -> Worker:
    from fidelora.accel.allocator import importing_for_good, keep_freed_memory

    keep_freed_memory()
    with importing_for_good():
        from fidelora.adapters.library import DEFAULT_BUDGET_BYTES, AdapterLibrary
        from fidelora.engine.engine import Engine
    adapters = AdapterLibrary(
        setup.adapter_budget_bytes or DEFAULT_BUDGET_BYTES, folder=setup.adapters
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
    return Worker(
        name, SqlStore(setup.store_url), engine, setup.outputs, setup.limits, on_end=reports.send
    )


def _leave_with_parent() -> None:
    """A server that is killed takes its workers along: two sets of them would share one device after its restart."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
