"""Clock for the removal of old data, which ignores forward jumps of the system clock."""

from __future__ import annotations

import time
from collections.abc import Callable


def _elapsed_s() -> float:
    """Return seconds since an arbitrary start; on Linux, they include the time of a suspend."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class RetentionClock:
    """The system clock, but never ahead of the start time plus the time that has really passed.

    If the date were set forward while the server runs, all data would look old and be removed.
    With this clock, nothing is removed before it has existed for the configured time.

    Args:
        wall: seconds since the epoch.
        elapsed: seconds since an arbitrary start, unaffected by changes of the date.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, elapsed: Callable[[], float] = _elapsed_s
    ) -> None:
        self._wall, self._elapsed = wall, elapsed
        self._started = wall() - elapsed()

    def now(self) -> float:
        """Return the time, in seconds since the epoch."""
        return min(self._wall(), self._started + self._elapsed())
