"""Alias that hides the path of the page's folder from browsers.

Gradio identifies files by their absolute path, in responses, events and URLs. The alias replaces
the folder in everything that Gradio sends, and is replaced by the folder in what it receives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

ALIAS = "/page-files"
"""Path that browsers see instead of the page's folder."""
_TEXTS = ("application/json", "text/html", "text/plain")
_STREAM = "text/event-stream"


class FileAliases:
    """The alias of one folder.

    Args:
        folder: absolute path of the page's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The path as written in JSON with and without escapes, and in URLs. Gradio also sends the
        # path with symbolic links resolved.
        forms = {
            form.encode()
            for one in (str(folder), str(folder.resolve()))
            for form in (one, json.dumps(one)[1:-1], quote(one))
        }
        self._forms = sorted(forms, key=len, reverse=True)

    def real(self, path: str) -> str:
        """Return the real path of a path that may begin with the alias."""
        if path == ALIAS or path.startswith(f"{ALIAS}/"):
            return f"{self._folder}{path.removeprefix(ALIAS)}"
        return path

    def restore(self, content: Any) -> bool:
        """Replace the alias in every `path` of nested JSON; return True if any was found.

        Other texts, such as prompts, stay as they are.
        """
        found = False
        for entry in dicts_in(content):
            path = entry.get("path")
            if isinstance(path, str) and self.real(path) != path:
                entry["path"] = self.real(path)
                found = True
        return found

    def hide(self, content: bytes) -> bytes:
        """Return content with the alias instead of the folder."""
        for form in self._forms:
            content = content.replace(form, ALIAS.encode())
        return content

    def hiding(self, send: Send) -> Send:
        """Return a `send` that hides the folder in texts; images and other files are unchanged.

        The events of a stream are sent one by one. Other texts are sent when they are complete.
        """
        start: Message = {}
        kind = ""
        body = b""

        async def send_hidden(message: Message) -> None:
            nonlocal start, kind, body
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                kind = headers.get("content-type", "").partition(";")[0]
                if kind in _TEXTS:
                    start = message
                    return
            elif message["type"] == "http.response.body" and kind == _STREAM:
                message = {**message, "body": self.hide(message.get("body", b""))}
            elif message["type"] == "http.response.body" and kind in _TEXTS:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                body = self.hide(body)
                headers = MutableHeaders(raw=start["headers"])
                if "content-length" in headers and body:
                    headers["content-length"] = str(len(body))
                await send(start)
                message = {"type": "http.response.body", "body": body}
            await send(message)

        return send_hidden


def dicts_in(content: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in nested JSON.

    The function is not recursive, because the nesting can exceed Python's recursion limit.
    """
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value
