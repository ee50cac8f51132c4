"""Pause of a worker while images cannot be written, for example because the disk is full."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fidelora.atomic import temporary_name, write_atomically
from fidelora.errors import StorageError

log = logging.getLogger(__name__)

_PROBE_INTERVAL_S = 5.0  # time between two attempts to write
_PROBE_BYTES = 2**20  # about the size of an image; a full disk may still have room for less


class StoragePause:
    """Keeps a worker from claiming jobs while its output folder is not writable.

    Args:
        folder: output folder.
        on_change: called with the reason when a pause begins, and with an empty reason when it
            ends.
        monotonic: clock.
    """

    def __init__(
        self, folder: Path, on_change: Callable[[str], None], monotonic: Callable[[], float]
    ) -> None:
        self._folder = folder
        self._on_change = on_change
        self._monotonic = monotonic
        self._reason = ""
        self._next_probe = 0.0

    def begin(self, error: StorageError) -> None:
        """Begin a pause because of this error; extend a current pause, which keeps its reason."""
        self._next_probe = self._monotonic() + _PROBE_INTERVAL_S
        if not self._reason:
            self._reason = str(error)
            log.warning("worker pauses: %s", self._reason)
            self._on_change(self._reason)

    def is_over(self) -> bool:
        """True if images can be written. During a pause, a test file is written every 5 seconds."""
        if not self._reason:
            return True
        if self._monotonic() < self._next_probe:
            return False
        probe = self._folder / temporary_name()
        try:
            write_atomically(probe, bytes(_PROBE_BYTES))
        except StorageError as error:
            self.begin(error)
            return False
        finally:
            with suppress(OSError):
                probe.unlink()
        self._reason = ""
        log.info("worker continues: images can be written again")
        self._on_change("")
        return True
