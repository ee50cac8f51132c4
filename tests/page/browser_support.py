"""A Chromium on a server's page that records errors and requests to other hosts."""

from __future__ import annotations

import base64
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Page, expect

DEADLINE_MS = 60_000
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MIN_CONTRAST = 4.5
"""Contrast of text of normal size at level AA: https://www.w3.org/TR/WCAG22/#contrast-minimum."""
HOSTILE = "<img src=x onerror=alert(1)>"

expect.set_options(timeout=DEADLINE_MS)


class Visitor:
    """A browser session on the page.

    Attributes:
        trouble: console errors, uncaught exceptions, dialogs and requests to other hosts; must be
            empty at the end of each test.
    """

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.trouble: list[str] = []
        self._context = browser.new_context(viewport={"width": 1280, "height": 900}, **context)
        self._context.set_default_timeout(DEADLINE_MS)
        self.page: Page = self._context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", lambda request: self._on_request(request.url))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.trouble.append(message.text)

    def _on_dialog(self, dialog: Dialog) -> None:
        self.trouble.append(dialog.message)
        dialog.dismiss()

    def _on_request(self, url: str) -> None:
        if not url.startswith((self.url + "/", "data:", "blob:" + self.url)):
            self.trouble.append(f"a request to {url}")

    def open(self) -> Visitor:
        """Open the page and wait until it is ready."""
        self.page.goto(self.url)
        expect(self["generate"]).to_be_visible()
        return self

    def close(self) -> None:
        self._context.close()

    def __getitem__(self, element: str) -> Locator:
        """Return the element with this id."""
        return self.page.locator(f"#{element}")

    def field(self, element: str) -> Locator:
        """Return the text input of an element."""
        return self[element].locator("input:not([type=range]), textarea").first

    def choose(self, element: str, *typed: str) -> None:
        """Select entries of a drop-down list by typing."""
        box = self.field(element)
        for text in typed:
            box.click()
            self[element].get_by_role("option").first.wait_for()
            box.press("Control+a")
            box.press_sequentially(text)  # the list filters on key events
            self[element].locator("[role=option].active").filter(has_text=text).first.wait_for()
            box.press("Enter")
        box.press("Escape")

    def generate(self, prompt: str, *, lora: str = "", **fields: object) -> None:
        """Fill in the form for a small image and send it."""
        if lora:
            self.choose("loras", lora)
            expect(self["multiplier-0"]).to_be_visible()
        self.field("prompt").fill(prompt)
        for name, value in ({"width": 128, "height": 128, "steps": 4, "seed": 7} | fields).items():
            self.field(name).fill(str(value))
        self["generate"].click()

    def drop(self, *files: Path, onto: str = "body") -> None:
        """Drop files onto an element, as from a file manager."""
        # The page's script passes the files on to a zone that Gradio may add after the other parts.
        self.page.locator("#drop input[type=file]").wait_for(state="attached")
        carried = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
        self.page.locator(onto).evaluate(_script("drop.js"), carried)

    def unreadable_texts(self) -> list[str]:
        """Return the visible texts whose contrast is below 4.5 : 1, and the contrast of each.

        Computed as in WCAG 2.2. Disabled elements are exempt.
        """
        found = self.page.evaluate(_script("contrast.js"))
        assert len(found) >= 10, "too few texts were found on the page"
        return [f"{ratio:.2f} {text}" for text, ratio in found if ratio < MIN_CONTRAST]

    def images(self, count: int) -> list[Locator]:
        """Wait for this number of images in the gallery and return them."""
        shown = self["gallery"].locator("button img")
        expect(shown).to_have_count(count)
        return shown.all()

    def wait_until_done(self) -> None:
        """Wait until the job has succeeded."""
        expect(self["progress"]).to_contain_text("Done in")

    def file(self, image: Locator) -> bytes:
        """Return the bytes of an image on the page."""
        source = image.get_attribute("src")
        assert source is not None
        response = self.page.request.get(source)
        assert response.ok
        return response.body()

    def scrolls_sideways(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))


def _script(name: str) -> str:
    """Return the JavaScript function in a file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def pixels(file: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def copy_lora(source: Path, target: Path, **metadata: str) -> None:
    """Copy a LoRA with changed metadata."""
    import safetensors
    import safetensors.torch

    with safetensors.safe_open(source, "pt") as file:
        old = dict(file.metadata() or {})
    safetensors.torch.save_file(safetensors.torch.load(source.read_bytes()), target, old | metadata)
