"""Log lines when the server becomes ready to make images, and when it cannot."""

from __future__ import annotations

import structlog

from fidelora.server.context import ServerContext

log = structlog.get_logger(__name__)


class ReadinessLog:
    """Logs each change of the readiness: ready, starting, or unable to make images."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._last = (False, "")

    def update(self) -> None:
        """Log the state if it differs from that of the last call."""
        pool = self._context.pool
        state = (pool is not None and pool.ready, self._context.unready_reason)
        if state == self._last:
            return
        self._last = state
        ready, reason = state
        if ready:
            log.info("ready", base_url=self._context.base_url)
        elif reason:
            log.error("not ready, trying again", reason=reason)
        else:
            log.warning("not ready, a worker is starting")
