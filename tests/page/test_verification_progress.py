"""Progress of a verification on the page."""

from __future__ import annotations

import asyncio
import contextlib
import html

import pytest

from fidelora.server.page.verification_progress import Progress, with_pauses


def test_progress_lines_become_a_bar():
    progress = Progress()
    assert "Loading the base model." in html.unescape(progress.bar())
    assert not progress.read("  160   0   128x128   identical")
    assert progress.read("progress: replaying 3 of 4")
    assert 'max="4" value="3"' in progress.bar()
    assert "Replaying 3 of 4" in progress.bar()
    assert " s so far" in progress.bar()


def test_none_is_yielded_while_the_next_item_takes_long():
    async def run() -> list[int | None]:
        go_on = asyncio.Event()

        async def numbers():
            yield 1
            await go_on.wait()
            yield 2

        found = []
        async for item in with_pauses(numbers(), 0.001):
            found.append(item)
            if found.count(None) == 3:
                go_on.set()
        return found

    found = asyncio.run(run())
    assert found[:4] == [1, None, None, None]
    assert [item for item in found if item is not None] == [1, 2]


def test_an_error_of_the_items_is_raised():
    async def numbers():
        yield 1
        raise ValueError

    async def run() -> None:
        async for _ in with_pauses(numbers(), 60):
            pass

    with pytest.raises(ValueError, match=r"^$"):
        asyncio.run(run())


def test_the_items_are_closed_when_the_caller_stops():
    closed = []

    async def numbers():
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def run() -> None:
        async with contextlib.aclosing(with_pauses(numbers(), 0.001)) as items:  # type: ignore[type-var]
            async for item in items:
                if item is None:
                    break

    asyncio.run(run())
    assert closed == [True]
