"""State shared by the pool and a worker process, without locks.

A worker can be stopped or hang at any moment. `multiprocessing.Event` uses locks; if a worker were
stopped while it holds one, the server would wait for it forever.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

# Not fork: a forked child cannot use CUDA, and inherits every open connection.
spawn = multiprocessing.get_context("spawn")


class Flag:
    """A flag in shared memory that is set once."""

    def __init__(self) -> None:
        self._value = spawn.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


class Pulse:
    """Time until which a worker process counts as alive, in memory shared with the pool.

    The pool detects a hung worker without the job database, which the worker may keep locked. The
    time is monotonic, which is the same clock in all processes of a machine, so changes of the
    system's date have no effect.
    """

    def __init__(self) -> None:
        self._alive_until = spawn.RawValue("d", math.inf)

    def beat(self, seconds: float) -> None:
        """Report that the process is alive, and that it reports again within this time."""
        self._alive_until.value = time.monotonic() + seconds

    def has_stopped(self, monotonic: float) -> bool:
        """True if the process should have reported before this time, but did not."""
        return bool(monotonic > self._alive_until.value)


@contextmanager
def beating(beat: Callable[[float], None], every_s: float, for_s: float) -> Iterator[None]:
    """Report from a thread, while the block runs, that this process is alive.

    This is for blocks that take long and cannot report progress, such as loading a model. If the
    process is stopped, so is the thread. If only the block hangs, the reports end after `for_s`.

    Args:
        beat: called every `every_s` seconds, with three times `every_s`.
    """
    ended = threading.Event()

    def report() -> None:
        last = time.monotonic() + for_s
        while time.monotonic() < last:
            beat(3 * every_s)
            if ended.wait(every_s):
                return

    thread = threading.Thread(target=report, name="beats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class WakeSender:
    """The pool's end of a pipe that wakes an idle worker."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        os.set_blocking(connection.fileno(), False)

    def wake(self) -> None:
        """Wake the worker; has no effect if the process has ended or the pipe is full."""
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._connection.fileno(), b"\0")


class WakeReceiver:
    """The worker's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wait(self, seconds: float) -> None:
        """Wait until the pool wakes this process, or until the time is over."""
        if self._connection.poll(seconds):
            os.read(self._connection.fileno(), 65_536)


@dataclass(frozen=True)
class WorkerSignals:
    """State shared by the pool and a worker process.

    Attributes:
        pulse: set by the process while it makes progress.
        ready: set by the process once its model is loaded.
        finish: set by the pool to end the process after its current job.
        wake: receiving end of the pipe through which the pool reports new jobs.
    """

    pulse: Pulse
    ready: Flag
    finish: Flag
    wake: WakeReceiver


def new_signals() -> tuple[WorkerSignals, WakeSender]:
    """Return the signals for a new process, and the pool's end of its pipe."""
    receiver, sender = spawn.Pipe(duplex=False)
    return WorkerSignals(Pulse(), Flag(), Flag(), WakeReceiver(receiver)), WakeSender(sender)
