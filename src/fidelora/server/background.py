"""Background tasks of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from fidelora.errors import JobStoreError

log = structlog.get_logger(__name__)


async def run_periodically(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    """Call `action` repeatedly, also after errors; log an error unless it repeats the last one."""
    last = ""
    while True:
        try:
            await action()
            last = ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text == last:
                pass
            elif isinstance(error, JobStoreError):
                log.error("job store unavailable, retrying", reason=str(error))
            else:
                log.exception("background task failed, retrying", reason=text)
            last = text
        await asyncio.sleep(seconds)
