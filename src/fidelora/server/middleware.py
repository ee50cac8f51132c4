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
from fidelora.server.api_keys import ApiKeys
from fidelora.server.login import LOGIN_PATH, Login
from fidelora.server.metrics import Metrics
from fidelora.server.page.paths import UPLOAD_PATH as JOB_PATH
from fidelora.server.page.paths import is_page_path
from fidelora.server.problem_formats import A1111_PATHS, answer
from fidelora.server.problems import problem_of

log = structlog.get_logger("fidelora.http")

_OPEN = {"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
"""Paths that need no key: probes, and the description of the API."""
_OFTEN = ("/metrics", "/assets/", "/static/")
"""What is asked for so often that the log does not tell of it."""
_ENTRANCES = {("GET", "/"), ("GET", LOGIN_PATH), ("POST", LOGIN_PATH)}
"""Where somebody without a key is asked for one."""
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


class RequestLog:
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
            about = (
                {"request_id": scope["path_params"]["request_id"]}
                if scope.get("path_params", {}).get("request_id")
                else {}
            )
            write(
                "http",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(seconds * 1000, 1),
                **about,
            )


class BodyLimitMiddleware:
    """Refuses bodies that are too large, those that do not say their size as soon as they are."""

    def __init__(self, app: ASGIApp, max_lora_bytes: int, max_job_bytes: int) -> None:
        self._app = app
        self._larger = {
            ("POST", "/v1/loras"): max_lora_bytes,
            ("POST", "/v1/replay"): MAX_IMAGE_BYTES,
            ("POST", JOB_PATH): max_job_bytes,
        }

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


class AccessControl:
    """Lets in who has a key. A server without keys is for this machine alone, and for pages that name it as such.

    Without the second rule, a web page that somebody looks at here could have its own name lead to 127.0.0.1 (DNS rebinding) and
    use the server as its own, or send forms to it, to which browsers add the page's origin.

    Args:
        login: how people show a key to our own page; None if there is no page.
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, base_url: str, login: Login | None = None
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = _LOOPBACK_NAMES | {urlsplit(base_url).hostname or "localhost"}
        self._authority = urlsplit(
            base_url
        ).netloc.lower()  # what browsers name where a proxy names something else
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            try:
                scope["fidelora_owner"] = self._owner(
                    Headers(scope=scope), scope["path"], scope["method"]
                )
            except FideloraError as error:
                if (
                    isinstance(error, ApiKeyError)
                    and self._login
                    and (scope["method"], scope["path"]) in _ENTRANCES
                ):
                    await self._login(scope, receive, send)
                    return
                await answer(problem_of(error), scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in _OPEN or (
            path == "/" and self._login is None
        )  # where it says that there is no page

    def _owner(self, headers: Headers, path: str, method: str) -> str:
        of_page = self._login is not None and is_page_path(path)
        if of_page and method == "POST":
            self._refuse_other_sites(headers)
        if self._keys.names():
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip() if scheme.lower() == "bearer" else ""
            if scheme.lower() == "basic" and path.startswith(A1111_PATHS):
                key = _password(given)
            owner = self._keys.owner(key) if key else None
            if (
                owner is None and of_page and self._login
            ):  # nowhere else: other sites could send the cookie to the API
                owner = self._login.owner(headers)
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

    def _refuse_other_sites(self, headers: Headers) -> None:
        """Browsers say which page a POST comes from, programs say nothing. Unlike an API's client, only our own page acts on it."""
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site", "same-origin") == "same-origin":
            return
        authority = (origin or "").lower().partition("://")[2]
        if authority and authority in (headers.get("host", "").lower(), self._authority):
            return
        raise RequestError(
            "A page of another site sent this; use the server's own page.", code="OTHER_SITE"
        )


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
