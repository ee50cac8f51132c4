"""Seconds that an image takes in each phase."""

from __future__ import annotations

import time


class PhaseClock:
    """A stopwatch for phases.

    Attributes:
        laps: seconds of each phase so far.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """Add the seconds since the previous lap to those of a phase."""
        now = time.monotonic()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now
