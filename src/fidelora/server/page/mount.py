"""The page among the server's routes: which paths it has, what browsers may do with it, and how it ends. Knows no Gradio."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fidelora.server.context import ServerContext
from fidelora.server.login import LOGIN_PATH, LOGOUT_PATH, Login
from fidelora.server.page.paths import EVENTS, FILES, GRADIO, REPORTS, STREAMS, is_page_path
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.verifications import Verifier, hub_variables

log = structlog.get_logger(__name__)

NO_PAGE = """This is the HTTP API of Fidelora; its description is at /docs.
There is no web page: install its packages with  pip install 'fidelora[ui]'  and start the server again.
"""
SWITCHED_OFF = """This is the HTTP API of Fidelora; its description is at /docs.
The web page is switched off (FIDELORA_PAGE).
"""

_CLEAN_EVERY_S = 600.0
# No markup that a text could smuggle in can run: scripts are files of this server, or have one of the hashes.
_POLICY = (
    "default-src 'self'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; frame-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
# A report has the names and prompts of a job that may be a stranger's: it is a page without an origin, and reaches nothing.
_REPORT_POLICY = "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# What Gradio sends is looked at by the page, and is no page itself, whatever somebody uploaded.
_PART_POLICY = "default-src 'none'; frame-ancestors 'none'"
_SCRIPTS = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
_ABROAD = re.compile(rb"\s*<meta\s[^>]*(?:og:|twitter:)[^>]*>")

# A link to a report becomes the report itself, which is a page of its own origin by the policy that it is sent with. And where the
# page is narrow, what a button began is below what can be seen.
_SCRIPT = b"""
new MutationObserver(() => {
  for (const link of document.querySelectorAll("a.report:not([data-shown])")) {
    link.dataset.shown = "";
    const frame = document.createElement("iframe");
    frame.className = "report";
    frame.title = "Report of the verification";
    frame.setAttribute("sandbox", "allow-scripts");
    frame.src = link.href;
    link.before(frame);
  }
}).observe(document, { childList: true, subtree: true });
const shows = { generate: "progress", verify: "verdict", compare: "progress-compare" };
document.addEventListener("click", (event) => {
  const page_files = document.getElementById(shows[event.target.closest("button")?.id] ?? "");
  if (page_files && page_files.getBoundingClientRect().top > innerHeight - 200) page_files.scrollIntoView({ block: "center" });
});
"""


class Page(BaseRoute):
    """The page as a route: it takes the requests that are its own, and leaves all others.

    Args:
        start: makes the application behind the page, and what has to be entered while it serves.
    """

    path = "/ (page)"  # how the metrics call it

    def __init__(
        self,
        context: ServerContext,
        login: Login,
        page_files: PageFiles,
        verifier: Verifier,
        start: Callable[[], tuple[ASGIApp, AbstractAsyncContextManager[Any]]],
    ) -> None:
        page_files.empty()
        self._context = context
        self._login = login
        self._place = page_files
        self._verifier = verifier
        self._app, self._running = start()
        self._streams: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While it serves."""
        cleaning = asyncio.create_task(self._clean())
        async with self._running:
            yield
        cleaning.cancel()
        await self.close()

    async def close(self) -> None:
        """End the streams that lookers-on have open, and what is being verified."""
        for stream in list(self._streams):
            stream.cancel()
        await self._verifier.close()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and is_page_path(scope["path"]):
            return Match.FULL, {"route": self}
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = dict(scope)  # the routes below leave their own names in it
        path, method = scope["path"], scope["method"]
        if path.startswith(GRADIO):
            send = _as_part(send)
        if path == LOGIN_PATH:
            await Response(status_code=303, headers={"Location": "./"})(scope, receive, send)
        elif path == LOGOUT_PATH:
            await self._login.leave(method, Headers(scope=scope))(scope, receive, send)
        elif path.startswith(REPORTS):
            await self._report(path.removeprefix(REPORTS))(scope, receive, send)
        elif path == "/":
            await self._document(scope, receive, send)
        elif path.startswith(STREAMS):
            await self._stream(scope, receive, send)
        elif path.startswith(FILES) and not self._is_ours(path.removeprefix(FILES)):
            await PlainTextResponse("There is no such file.\n", 404)(scope, receive, send)
        elif path in EVENTS:
            await self._event(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, file: str) -> bool:
        """Whether it is a page_files in the page's own folder. Gradio would fetch an address, and send it on as its own."""
        path = Path(file)
        roots = (self._place.files, self._place.files.resolve())  # Gradio names the latter
        return ".." not in path.parts and any(path.is_relative_to(root) for root in roots)

    def _report(self, run_id: str) -> Response:
        file = self._place.checks / run_id / "report" / "report.html"
        if not re.fullmatch(r"[0-9a-f]{32}", run_id) or not file.is_file():
            return PlainTextResponse(
                "This report is not here any more; verify the job again.\n", 404
            )
        return HTMLResponse(file.read_bytes(), headers={"Content-Security-Policy": _REPORT_POLICY})

    async def _document(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page itself, without pictures of other hosts in its head, and with the policy that its scripts need."""
        scope["headers"] = [
            header for header in scope["headers"] if header[0] != b"accept-encoding"
        ]
        start: Message = {}
        body = b""

        async def changed(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            if (
                message["type"] != "http.response.body"
            ):  # extensions of some servers, and of test clients
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = _ABROAD.sub(b"", body).replace(
                b"</head>", b"<script>" + _SCRIPT + b"</script></head>", 1
            )
            hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in _SCRIPTS.findall(body))
            headers = MutableHeaders(raw=start["headers"])
            headers["Content-Security-Policy"] = _POLICY.format(hashes=hashes)
            headers["Referrer-Policy"] = "same-origin"
            headers["Cache-Control"] = "no-store"
            if scope["method"] != "HEAD":
                headers["Content-Length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, changed)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An answer that lasts, and ends with the server at the latest."""
        open_end = False

        async def noted(message: Message) -> None:
            nonlocal open_end
            open_end = message["type"] == "http.response.start" or bool(message.get("more_body"))
            await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, noted))
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        try:
            await task
        except asyncio.CancelledError:
            if not self._context.stopping.is_set():
                raise
            if open_end:
                await send({"type": "http.response.body", "body": b""})

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What a form sends. Where it has files, Gradio would fetch those that have an address on some other host."""
        body = await Request(scope, receive).body()
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = {}
        if _has_address(content):
            await PlainTextResponse("Files have to be uploaded.\n", 400)(scope, receive, send)
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body}

        await self._app(scope, again, send)

    async def _clean(self) -> None:
        while True:
            await asyncio.sleep(_CLEAN_EVERY_S)
            await asyncio.to_thread(self._place.clean)


def make_page(context: ServerContext, login: Login) -> Page | str:
    """The page, or what stands at `/` in its page_files.

    Raises:
        OutputError: its folder cannot be made.
    """
    if not context.settings.page:
        return SWITCHED_OFF
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        return NO_PAGE
    from fidelora.server.page.blocks import gradio_app

    settings = context.settings
    page_files = PageFiles(settings.data_dir.expanduser().absolute() / "page")
    verifier = Verifier(settings.devices[0], settings.inference_timeout_s, hub_variables(settings))
    root_path = urlsplit(context.base_url).path.rstrip("/")
    return Page(
        context,
        login,
        page_files,
        verifier,
        lambda: gradio_app(context, page_files, verifier, root_path),
    )


def _as_part(send: Send) -> Send:
    """Answers that a browser does not open as a page that can do something."""

    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Content-Security-Policy"] = _PART_POLICY
        await send(message)

    return marked


def _has_address(value: Any) -> bool:
    """Whether there is a file somewhere in it that lies on a host."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        return any(map(_has_address, value.values()))
    return isinstance(value, list) and any(map(_has_address, value))


def _sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
