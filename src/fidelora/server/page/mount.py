"""The page as a route of the server: dispatch, content security policies and shutdown.

Does not import Gradio.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fidelora.errors import JobNotFoundError
from fidelora.server.access import Caller
from fidelora.server.background import run_periodically
from fidelora.server.context import ServerContext, caller_of
from fidelora.server.login import LOGIN_PATH, LOGOUT_PATH, Login
from fidelora.server.page.downloads import images_zip
from fidelora.server.page.file_aliases import FileAliases, dicts_in
from fidelora.server.page.paths import (
    EVENTS,
    FILES,
    GRADIO,
    HEARTBEAT,
    IMAGES_ZIP,
    REPORTS,
    STREAMS,
    is_page_path,
)
from fidelora.server.page.pictures import REQUEST_FOLDER, PageFiles
from fidelora.server.page.session_keys import SessionKeys
from fidelora.server.verifier import Verifier

log = structlog.get_logger(__name__)

NO_PAGE = """This is the HTTP API of Fidelora; its description is at /docs.
The web page is not installed. In the folder of Fidelora's repository, run  pip install '.[ui]'
and restart the server.
"""
SWITCHED_OFF = """This is the HTTP API of Fidelora; its description is at /docs.
The web page is switched off (FIDELORA_PAGE).
"""

_SESSION_NOT_FOUND = PlainTextResponse("Session not found; reload the page.\n", 404)
_EVENT_NOT_FOUND = PlainTextResponse("The page does not have this event; reload the page.\n", 400)
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 2000
"""Longest part of a path of the page, and longest path: file systems allow no more than 255 and
4096, and Gradio does not check them."""
_CLEAN_INTERVAL_S = 600.0
# Scripts must be files of this server or match a hash, so that injected markup cannot run any.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# A report contains names and prompts of a training run that may be hostile. The sandbox gives it
# a separate origin, and the other directives block all loading.
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)
# Gradio's responses include uploaded files. This policy keeps a file that is opened as a document
# from loading or running anything.
_GRADIO_POLICY = "default-src 'none'; frame-ancestors 'none'"
_INLINE_SCRIPTS = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
# Link preview tags in Gradio's <head>, which refer to images on other hosts.
_SOCIAL_META = re.compile(rb"\s*<meta\s[^>]*(?:og:|twitter:)[^>]*>")

_SCRIPT = Path(__file__).with_name("script.js")


class Page(BaseRoute):
    """Route that handles the requests for the page and leaves all others to the API.

    Args:
        start: creates the Gradio application, its lifespan context, and the numbers of its events.
    """

    path = "/ (page)"  # label in the metrics

    def __init__(
        self,
        context: ServerContext,
        login: Login,
        page_files: PageFiles,
        verifier: Verifier,
        start: Callable[[], tuple[ASGIApp, AbstractAsyncContextManager[Any], Collection[int]]],
    ) -> None:
        page_files.empty()
        self._context = context
        self._login = login
        self._page_files = page_files
        self._verifier = verifier
        self._app, self._running, self._events = start()
        self._aliases = FileAliases(page_files.files)
        self._sessions = SessionKeys()
        self._streams: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the Gradio application while the context is open."""
        cleaning = asyncio.create_task(run_periodically(_CLEAN_INTERVAL_S, self._clean))
        async with self._running:
            yield
        cleaning.cancel()
        await self.close()

    async def close(self) -> None:
        """End the open streams and the running verifications."""
        for stream in list(self._streams):
            stream.cancel()
        await self._verifier.close()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and is_page_path(scope["path"]):
            return Match.FULL, {"route": self}
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = dict(scope)  # a copy, because inner routes write to it
        path, method = scope["path"], scope["method"]
        caller = caller_of(Request(scope))
        if not _can_be_file(path):
            await PlainTextResponse("Not found.\n", 404)(scope, receive, send)
            return
        if path.startswith(GRADIO):
            send = _with_gradio_policy(send)
        if path.startswith(FILES):
            path = scope["path"] = FILES + self._aliases.real(path.removeprefix(FILES))
            scope["raw_path"] = quote(path).encode()
        elif path == "/" or path.startswith(GRADIO):
            send = self._aliases.hiding(send)
            scope["headers"] = [
                header for header in scope["headers"] if header[0] != b"accept-encoding"
            ]
        if path == LOGIN_PATH:
            await Response(status_code=303, headers={"Location": "./"})(scope, receive, send)
        elif path == LOGOUT_PATH:
            response = await self._login.logout(method, Headers(scope=scope))
            await response(scope, receive, send)
        elif path.startswith(REPORTS):
            await self._report(path.removeprefix(REPORTS))(scope, receive, send)
        elif path == IMAGES_ZIP:
            query = scope["query_string"].decode("ascii", "replace")
            response = await run_in_threadpool(
                images_zip, self._context, self._page_files, query, caller
            )
            await response(scope, receive, send)
        elif path == "/":
            await self._document(scope, receive, send)
        elif path.startswith(STREAMS):
            session = _stream_session(scope)
            if session and self._sessions.allows(session, caller):
                await self._stream(scope, receive, send)
            else:
                await _SESSION_NOT_FOUND(scope, receive, send)
        elif path.startswith(FILES) and not await run_in_threadpool(
            self._is_visible, path.removeprefix(FILES), caller
        ):
            await PlainTextResponse("File not found.\n", 404)(scope, receive, send)
        elif path in EVENTS:
            await self._event(scope, receive, send, caller)
        else:
            await self._app(scope, receive, send)

    def _is_visible(self, file: str, caller: Caller) -> bool:
        """True for a path in the page's own folder that the caller has access to.

        Without this check, Gradio would fetch a URL given as a path and serve the response. Images
        of requests are in folders with the request's id; the names of all other folders cannot be
        guessed.
        """
        path = Path(file)
        # Gradio's URLs contain resolved paths.
        for root in (self._page_files.files, self._page_files.files.resolve()):
            if path.is_relative_to(root) and ".." not in path.parts:
                folder = path.relative_to(root).parts[:1]
                return self._is_visible_folder(*folder, caller=caller)
        return False

    def _is_visible_folder(self, folder: str = "", *, caller: Caller) -> bool:
        folder = folder.casefold()  # some file systems ignore the case of names
        if caller.is_admin or not folder.startswith(REQUEST_FOLDER):
            return True
        try:
            self._context.job(folder.removeprefix(REQUEST_FOLDER), caller)
        except JobNotFoundError:
            return False
        return True

    def _refusal(self, content: Any, caller: Caller) -> Response | None:
        """Return the response to an event that the caller may not send; None for all others."""
        if not self._sessions.allows(
            content.get("session_hash") if isinstance(content, dict) else None, caller
        ):
            return _SESSION_NOT_FOUND
        event = content.get("fn_index") if isinstance(content, dict) else None
        if not (event is None or (isinstance(event, int) and event in self._events)):
            return _EVENT_NOT_FOUND  # Gradio would fail with an internal error
        for entry in dicts_in(content):
            path = entry.get("path")
            if not isinstance(path, str):
                continue
            if "://" in path:
                return PlainTextResponse("Files must be uploaded, not given as URLs.\n", 400)
            # Gradio opens the `path` of objects with `meta`, a relative one in the working folder.
            # Other relative paths are the names of LoRAs in a form.
            is_file = "meta" in entry or path.startswith("/")
            if is_file and not self._is_visible(path, caller):
                return PlainTextResponse("File not found.\n", 404)
        return None

    def _report(self, verification_id: str) -> Response:
        file = self._page_files.verifications / verification_id / "report" / "report.html"
        if not re.fullmatch(r"[0-9a-f]{32}", verification_id) or not file.is_file():
            return PlainTextResponse(
                "This report is no longer available; run the command again.\n", 404
            )
        return HTMLResponse(file.read_bytes(), headers={"Content-Security-Policy": _REPORT_POLICY})

    async def _document(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the HTML document with a security policy and without references to other hosts."""
        start: Message = {}
        body = b""
        script = _SCRIPT.read_bytes()

        async def rewrite(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            if message["type"] != "http.response.body":  # extensions of servers and test clients
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = _SOCIAL_META.sub(b"", body).replace(
                b"</head>", b"<script>" + script + b"</script></head>", 1
            )
            hashes = " ".join(
                f"'sha256-{_sha256(script)}'" for script in _INLINE_SCRIPTS.findall(body)
            )
            headers = MutableHeaders(raw=start["headers"])
            headers["Content-Security-Policy"] = _PAGE_POLICY.format(hashes=hashes)
            headers["Referrer-Policy"] = "same-origin"
            headers["Cache-Control"] = "no-store"
            if scope["method"] != "HEAD":
                headers["Content-Length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, rewrite)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a long-lived response, and end it if it is still open when the server stops."""
        unfinished = False

        async def track(message: Message) -> None:
            nonlocal unfinished
            unfinished = message["type"] == "http.response.start" or bool(message.get("more_body"))
            await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, track))
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        try:
            await task
        except asyncio.CancelledError:
            if not self._context.stopping.is_set():
                raise
            if unfinished:
                await send({"type": "http.response.body", "body": b""})

    async def _event(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        """Forward an event to Gradio, unless `_refusal` refuses it.

        Gradio would fetch files that are given as URLs.
        """
        body = await Request(scope, receive).body()
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = {}
        if self._aliases.restore(content):
            body = json.dumps(content).encode()
        refusal = await run_in_threadpool(self._refusal, content, caller)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body}

        await self._app(scope, replay, send)

    async def _clean(self) -> None:
        now = self._context.retention_clock.now()
        await asyncio.to_thread(self._page_files.clean, now)


def make_page(context: ServerContext, login: Login) -> Page | str:
    """Return the page, or the text to serve at `/` instead of it.

    Raises:
        OutputError: the page's folder cannot be created.
    """
    if not context.settings.page:
        return SWITCHED_OFF
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        return NO_PAGE
    from fidelora.server.page.blocks import gradio_app

    settings = context.settings
    page_files = PageFiles(settings.data_dir.expanduser().absolute() / "page")
    verifier = context.verifier
    root_path = urlsplit(context.base_url).path.rstrip("/")
    return Page(
        context,
        login,
        page_files,
        verifier,
        lambda: gradio_app(context, page_files, verifier, root_path),
    )


def _with_gradio_policy(send: Send) -> Send:
    """Add `_GRADIO_POLICY` to the response."""

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Content-Security-Policy"] = _GRADIO_POLICY
        await send(message)

    return send_with_policy


def _can_be_file(path: str) -> bool:
    sizes = [len(part.encode("utf-8", "replace")) for part in path.split("/")]
    return max(sizes) <= _MAX_NAME_BYTES and sum(sizes) + len(sizes) <= _MAX_PATH_BYTES


def _stream_session(scope: Scope) -> str:
    """Return the session hash of a call for a stream, from its path or its query."""
    path, query = str(scope["path"]), str(scope["query_string"], "latin-1")
    if path.startswith(HEARTBEAT):
        return path.removeprefix(HEARTBEAT)
    return dict(parse_qsl(query)).get("session_hash", "")


def _sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
