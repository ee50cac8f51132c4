"""Progress of a verification or an explanation on the page. Does not import Gradio."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from fidelora.server.page.html import duration, progress_bar

_T = TypeVar("_T")
_LINE = re.compile(r"progress: (.+) (\d+) of (\d+)")
"""A line that `fidelora verify --progress-lines` prints."""


class Progress:
    """Progress that `fidelora verify` or `explain` prints, and the elapsed time."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._title, self._done, self._total = "Loading the base model", 0, 0

    def read(self, line: str) -> bool:
        """Return True if a line of output reports progress, which is then stored."""
        found = _LINE.fullmatch(line)
        if found is not None:
            title, done, total = found.groups()
            self._title, self._done, self._total = title.capitalize(), int(done), int(total)
        return found is not None

    def bar(self) -> str:
        """Return a progress bar with the finished part of the work and the elapsed time."""
        count = f" {self._done} of {self._total}" if self._total else ""
        elapsed = duration(time.monotonic() - self._start)
        sentence = f"{self._title}{count}. {elapsed} so far."
        return progress_bar(self._done, max(1, self._total), sentence)


async def with_pauses(items: AsyncGenerator[_T, None], pause_s: float) -> AsyncIterator[_T | None]:
    """Yield the items, and None whenever the next one takes longer than `pause_s`."""
    try:
        while True:
            following = asyncio.ensure_future(anext(items))
            try:
                while not (await asyncio.wait({following}, timeout=pause_s))[0]:
                    yield None
                yield following.result()
            except StopAsyncIteration:
                return
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.wait({following})
    finally:
        await items.aclose()
