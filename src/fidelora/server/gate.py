"""What every request passes first: its id and its line in the log, the check of the host it names, and its API key."""

from __future__ import annotations

import ipaddress
import re
import time
import uuid
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fidelora.errors import ApiKeyError, BodyTooLargeError, FideloraError, RequestError
from fidelora.server.keys import ApiKeys
from fidelora.server.login import LOGIN_PATH, Login
from fidelora.server.metrics import Metrics
from fidelora.server.problems import answer_to
from fidelora.server.ui.paths import UPLOAD_PATH as PAGE_UPLOAD_PATH
from fidelora.server.ui.paths import is_page_path

log = structlog.get_logger("fidelora.http")

_OPEN = {"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
"""Paths that need no key: probes, and the description of the API."""
_OFTEN = ("/metrics", "/assets/", "/static/")
"""What is asked for so often that the log does not tell of it."""
UPLOAD_PATH = "/v1/loras"
_ENTRANCES = {("GET", "/"), ("GET", LOGIN_PATH), ("POST", LOGIN_PATH)}
"""Where somebody without a key is asked for one."""
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_CALL_ID = re.compile(r"[\w.-]{1,64}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Log:
    """Gives each call an id, and writes one line and one count when its answer is out."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        call_id = given if _CALL_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        start, status = time.monotonic(), 500  # what is answered if nothing below answers

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = call_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(call_id=call_id)
        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = time.monotonic() - start
            pattern = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(scope["method"], pattern, status, seconds)
            quiet = scope["path"] in _OPEN or scope["path"].startswith(_OFTEN)
            write = log.debug if quiet and status < 400 else log.info
            about = {"request_id": scope["path_params"]["request_id"]} if scope.get("path_params", {}).get("request_id") else {}
            write("http", method=scope["method"], path=scope["path"], status=status, ms=round(seconds * 1000, 1), **about)


class BodyLimit:
    """Refuses bodies that are too large, those that do not say their size as soon as they are."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int, max_page_upload_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_of_uploads = {UPLOAD_PATH: max_upload_bytes, PAGE_UPLOAD_PATH: max_page_upload_bytes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_of_uploads.get(scope["path"], self._max_bytes) if scope["method"] == "POST" else self._max_bytes
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            await answer_to(_too_large(limit))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, counted, send)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is too large; {limit:,} bytes are allowed here.")


class Gate:
    """Lets in who has a key. A server without keys is for this machine alone, and for pages that name it as such.

    Without the second rule, a web page that somebody looks at here could have its own name lead to 127.0.0.1 (DNS rebinding) and
    use the server as its own. Another site's page cannot have a browser act on ours, either.

    Args:
        login: how people show a key; None if there is no page.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, base_url: str, login: Login | None = None) -> None:
        self._app = app
        self._keys = keys
        self._hosts = _LOOPBACK_NAMES | {urlsplit(base_url).hostname or "localhost"}
        self._authority = urlsplit(base_url).netloc.lower()  # what browsers name where a proxy names something else
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["path"] in _OPEN or (scope["path"] == "/" and self._login is None) if scope["type"] == "http" else True
        if not is_open:
            try:
                scope["fidelora_owner"] = self._owner(scope, Headers(scope=scope))
            except ApiKeyError as error:
                asks = self._login is not None and (scope["method"], scope["path"]) in _ENTRANCES
                await (self._login if asks and self._login else answer_to(error))(scope, receive, send)
                return
            except FideloraError as error:
                await answer_to(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope, headers: Headers) -> str:
        of_page = self._login is not None and is_page_path(scope["path"])
        if of_page and scope["method"] == "POST":
            self._refuse_other_sites(headers)
        if self._keys.names():
            scheme, _, key = headers.get("authorization", "").partition(" ")
            owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
            if owner is None and of_page and self._login:  # nowhere else: other sites could send the cookie to the API
                owner = self._login.owner(headers)
            if owner is None:
                raise ApiKeyError
            return owner
        host = urlsplit("//" + headers.get("host", "")).hostname or ""
        if host not in self._hosts and not is_loopback(host):
            raise RequestError(
                f"This server has no API keys, and answers only to names of this machine, not to {host!r:.100}; "
                "make a key with `fidelora keys add`, or set BASE_URL.",
                code="HOST_NOT_ALLOWED",
            )
        return ""

    def _refuse_other_sites(self, headers: Headers) -> None:
        """Browsers say which page a POST comes from; programs say nothing, and need not."""
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site", "same-origin") == "same-origin":
            return
        authority = (origin or "").lower().partition("://")[2]
        if authority and (authority == headers.get("host", "").lower() or authority == self._authority):
            return
        raise RequestError("A page of another site sent this; use the server's own page.", code="OTHER_SITE")
