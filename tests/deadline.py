"""A deadline for a test that waits, so that a hang fails one test instead of ending the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Fail the test if the block takes longer. Works on the main thread only."""

    def fail(*_: Any) -> None:
        pytest.fail(f"the test took longer than its {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
