"""What every request passes first: its id and its line in the log, the check of the host it names, and its API key."""

from __future__ import annotations

import base64
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
from fidelora.server.metrics import Metrics
from fidelora.server.problems import problem_of
from fidelora.server.shapes import A1111_PATHS, answer

log = structlog.get_logger("fidelora.http")

_OPEN = {"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
"""Paths that need no key: probes, and the description of the API."""
MAX_BODY_BYTES = 2**20
MAX_IMAGE_BYTES = 64 * 2**20
"""Of an image that is to be made again; the largest that is made here has 48 MiB of pixels."""
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
            quiet = scope["path"] in _OPEN or scope["path"] == "/metrics"
            write = log.debug if quiet and status < 400 else log.info
            about = {"request_id": scope["path_params"]["request_id"]} if scope.get("path_params", {}).get("request_id") else {}
            write("http", method=scope["method"], path=scope["path"], status=status, ms=round(seconds * 1000, 1), **about)


class BodyLimit:
    """Refuses bodies that are too large, those that do not say their size as soon as they are."""

    def __init__(self, app: ASGIApp, max_lora_bytes: int) -> None:
        self._app = app
        self._larger = {("POST", "/v1/loras"): max_lora_bytes, ("POST", "/v1/replay"): MAX_IMAGE_BYTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # With room for the rest of a form.
        limit = MAX_BODY_BYTES + self._larger.get((scope["method"], scope["path"]), 0)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            await answer(problem_of(_too_large(limit)), scope["path"])(scope, receive, send)
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
    use the server as its own, or send forms to it, to which browsers add the page's origin.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, base_url: str) -> None:
        self._app = app
        self._keys = keys
        self._hosts = _LOOPBACK_NAMES | {urlsplit(base_url).hostname or "localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            try:
                scope["fidelora_owner"] = self._owner(Headers(scope=scope), scope["path"])
            except FideloraError as error:
                await answer(problem_of(error), scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _owner(self, headers: Headers, path: str) -> str:
        if self._keys.names():
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip() if scheme.lower() == "bearer" else ""
            if scheme.lower() == "basic" and path.startswith(A1111_PATHS):
                key = _password(given)
            owner = self._keys.owner(key) if key else None
            if owner is None:
                raise ApiKeyError
            return owner
        origin = headers.get("origin")
        for place in ("//" + headers.get("host", ""), *([] if origin is None else [origin])):
            host = _host(place)
            if host not in self._hosts and not is_loopback(host):
                raise RequestError(
                    f"This server has no API keys, and answers only to names and pages of this machine, not to {host!r:.100}; "
                    "make a key with `fidelora keys add`, or set BASE_URL.",
                    code="HOST_NOT_ALLOWED",
                )
        return ""


def _host(place: str) -> str:
    try:
        return urlsplit(place).hostname or ""
    except ValueError:
        return ""


def _password(given: str) -> str:
    """Clients of A1111 know names and passwords only: the key is the password, and the name is not looked at."""
    try:
        return base64.b64decode(given, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""
