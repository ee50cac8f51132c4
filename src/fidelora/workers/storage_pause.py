"""Pause of a worker while images cannot be written, for example because the disk is full."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fidelora.errors import StorageError
from fidelora.storage.images import ImageStore

log = logging.getLogger(__name__)

_PROBE_INTERVAL_S = 5.0  # seconds between two attempts to write


class StoragePause:
    """Keeps a worker from claiming jobs while images cannot be stored.

    Args:
        images: storage for the images.
        on_change: called with the reason when a pause begins, and with an empty reason when it
            ends.
        monotonic: clock.
    """

    def __init__(
        self, images: ImageStore, on_change: Callable[[str], None], monotonic: Callable[[], float]
    ) -> None:
        self._images = images
        self._on_change = on_change
        self._monotonic = monotonic
        self._reason = ""
        self._next_probe = 0.0

    def begin(self, error: StorageError) -> None:
        """Begin a pause because of this error, or extend the current pause and keep its reason."""
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
        try:
            self._images.check()
        except StorageError as error:
            self.begin(error)
            return False
        self._reason = ""
        log.info("worker continues: images can be written again")
        self._on_change("")
        return True
