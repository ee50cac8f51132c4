"""One browser and server per module, one clean page per test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from tests.page.browser_support import CHROMIUM, Visitor
from tests.server.serve_support import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        skip = pytest.mark.skip(
            reason="no Chromium found: apt-get install chromium, or set CHROMIUM to its path"
        )
        for item in items:
            if "browser" in getattr(item, "fixturenames", ()):
                item.add_marker(skip)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Browser of one module. While it is open, `asyncio.run` fails in this thread."""
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work in containers; it only opens the page under test.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Callable[..., Visitor]]:
    """Return a function that creates visitors; fails if a browser recorded any trouble."""
    visitors: list[Visitor] = []

    def create(**context: object) -> Visitor:
        visitors.append(Visitor(browser, server.url, **context))
        return visitors[-1]

    yield create
    trouble = [one for visitor in visitors for one in visitor.trouble]
    for visitor in visitors:
        visitor.close()
    assert not trouble


@pytest.fixture
def visitor(visit: Callable[..., Visitor]) -> Visitor:
    return visit().open()
