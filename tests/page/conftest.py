"""One browser and one server for each module; a page without trouble for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from tests.page.browser_support import CHROMIUM, Visitor
from tests.server.serve_support import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        skip = pytest.mark.skip(
            reason="there is no Chromium: apt-get install chromium, or set CHROMIUM to its path"
        )
        for item in items:
            if "browser" in getattr(item, "fixturenames", ()):
                item.add_marker(skip)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Its library keeps an event loop running in this thread, in which no test of another module could run its own."""
    with sync_playwright() as playwright:
        # Inside of containers its own sandbox cannot be set up, and it sees nothing here but our own page.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Callable[..., Visitor]]:
    """Makes somebody who looks at the server's page; at the end nothing may have gone wrong in the browser."""
    visitors: list[Visitor] = []

    def come(**context: object) -> Visitor:
        visitors.append(Visitor(browser, server.url, **context))
        return visitors[-1]

    yield come
    trouble = [one for visitor in visitors for one in visitor.trouble]
    for visitor in visitors:
        visitor.close()
    assert not trouble


@pytest.fixture
def visitor(visit: Callable[..., Visitor]) -> Visitor:
    return visit().come()
