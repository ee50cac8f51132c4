"""Middleware: call ids and the access log, body limits, and access control by host and API key."""

from __future__ import annotations

import base64
import ipaddress
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fidelora.errors import (
    ApiKeyError,
    BodyTooLargeError,
    FideloraError,
    PeerNotAllowedError,
    RequestError,
)
from fidelora.jobs.api_keys import ApiKeys, hash_of
from fidelora.server.access import UNRESTRICTED, Caller
from fidelora.server.api_docs import DOCS_PATHS
from fidelora.server.login import LOGIN_PATH, Login
from fidelora.server.metrics import Metrics
from fidelora.server.page.paths import UPLOAD_PATH as PAGE_UPLOAD_PATH
from fidelora.server.page.paths import is_page_path
from fidelora.server.problem_formats import A1111_PATHS, problem_response
from fidelora.server.problems import problem_of

log = structlog.get_logger("fidelora.http")

_PUBLIC_PATHS = {"/health", "/ready", "/openapi.json", *DOCS_PATHS}
"""Paths that need no API key: the probes and the API documentation."""
_FREQUENT_PATHS = ("/metrics", "/assets/", "/static/")
"""Prefixes of paths that are called so often that they are logged at debug level only."""
_LOGIN_ROUTES = {("GET", "/"), ("GET", LOGIN_PATH), ("POST", LOGIN_PATH)}
"""Routes at which browsers without a session get the login form."""
MAX_BODY_BYTES = 2**20
"""Largest body of routes that do not have their own limit: 1 MiB."""
MAX_IMAGE_BYTES = 64 * 2**20
"""Largest image file to replay: 64 MiB. The server's largest images have 48 MiB of pixels."""
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_FORWARDING_HEADERS = {
    "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip",
    "cf-connecting-ip", "fastly-client-ip", "tailscale-user-login",
}  # fmt: skip
"""Headers that proxies and tunnels add to calls, besides those that begin with `x-forwarded-`."""
_CALL_ID = re.compile(r"[\w.-]{1,64}")


def is_loopback(host: str) -> bool:
    """True if a server that listens on `host` is reachable from this machine only."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class RequestLogMiddleware:
    """Gives each call an id, and logs and counts the call when its response has been sent."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("//"):  # the client's base URL ends with /
            scope["path"] = "/" + scope["path"].lstrip("/")
        client_id = Headers(scope=scope).get("x-request-id", "")
        call_id = client_id if _CALL_ID.fullmatch(client_id) else uuid.uuid4().hex[:16]
        start, status = time.monotonic(), 500  # status if the application sends no response

        async def send_with_headers(message: Message) -> None:
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
            await self._app(scope, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - start
            pattern = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(scope["method"], pattern, status, seconds)
            quiet = scope["path"] in _PUBLIC_PATHS or scope["path"].startswith(_FREQUENT_PATHS)
            write = log.debug if quiet and status < 400 else log.info
            job = (
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
                **job,
            )


class BodyLimitMiddleware:
    """Rejects bodies that are too large, by their Content-Length or while they are received."""

    def __init__(self, app: ASGIApp, max_lora_bytes: int, max_job_bytes: int) -> None:
        self._app = app
        self._extra_bytes = {
            ("POST", "/v1/loras"): max_lora_bytes,
            ("POST", "/v1/replay"): MAX_IMAGE_BYTES,
            ("POST", "/v1/explain"): MAX_IMAGE_BYTES + max_job_bytes,
            ("POST", "/sdapi/v1/png-info"): MAX_IMAGE_BYTES * 4 // 3,  # in base64
            ("POST", PAGE_UPLOAD_PATH): max(max_lora_bytes, max_job_bytes),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The upload limit is added to the base limit, which covers the other fields of a form.
        limit = MAX_BODY_BYTES + self._extra_bytes.get((scope["method"], scope["path"]), 0)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            await problem_response(problem_of(_too_large(limit)), scope["path"])(
                scope, receive, send
            )
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_limited, send)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is too large; at most {limit:,} bytes are allowed.")


class AccessControl:
    """Requires an API key; without keys, serves only callers on this machine.

    Without keys, the connection must come from a loopback address, and `Host` and `Origin` must
    name this server. The latter blocks DNS rebinding (a hostile hostname that resolves to
    127.0.0.1) and form posts from pages of other sites, which browsers send with an `Origin`
    header. Calls with a header of a proxy are refused, because every client of a proxy on this
    machine has a loopback address, and the proxy may change `Host`. The rules are checked at each
    call, because keys can be removed while the server runs.

    Args:
        login: login of the web page; None if there is no page.
        origins: origins of other sites that may call a server without keys.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        base_url: str,
        login: Login | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = _LOOPBACK_NAMES | {urlsplit(base_url).hostname or "localhost"}
        # Browsers send this as origin even if a proxy changes the Host header.
        self._authority = urlsplit(base_url).netloc.lower()
        self._login = login
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_public(scope["path"]):
            try:
                try:
                    scope["fidelora_caller"] = await self._caller(scope)
                except ApiKeyError:
                    if not self._login or (scope["method"], scope["path"]) not in _LOGIN_ROUTES:
                        raise
                    await self._login(scope, receive, send)
                    return
            except FideloraError as error:
                await problem_response(problem_of(error), scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        # Without the page, "/" returns only a notice.
        return path in _PUBLIC_PATHS or (path == "/" and self._login is None)

    async def _caller(self, scope: Scope) -> Caller:
        headers, path = Headers(scope=scope), scope["path"]
        is_page = self._login is not None and is_page_path(path)
        if is_page and scope["method"] == "POST":
            self._refuse_other_sites(headers)
        keys = self._keys.in_memory()
        if keys is None:
            keys = await run_in_threadpool(self._keys.by_hash)
        if keys:
            scheme, _, credentials = headers.get("authorization", "").partition(" ")
            secret = credentials.strip() if scheme.lower() == "bearer" else ""
            if scheme.lower() == "basic" and path.startswith(A1111_PATHS):
                secret = _password(credentials)
            key = keys.get(hash_of(secret)) if secret else None
            # The API does not accept cookies, because other sites could make a browser send them.
            if key is None and is_page and self._login:
                key = keys.get(await self._login.key_sha256(headers))
            if key is None:
                raise ApiKeyError
            return Caller(key.id, key.is_admin)
        peer = scope.get("client")  # None for a Unix socket
        if peer is not None and not is_loopback(peer[0]):
            raise PeerNotAllowedError
        _refuse_proxies(headers)
        origin = headers.get("origin")
        checked = [] if origin is None or origin in self._origins else [origin]
        for url in ("//" + headers.get("host", ""), *checked):
            host = _host(url)
            if host not in self._hosts and not is_loopback(host):
                container = (
                    " Programs in a container use that name for this machine."
                    if host == "host.docker.internal"
                    else ""
                )
                raise RequestError(
                    "A server without API keys accepts only calls to and from hostnames of its own "
                    f"machine, not {host!r:.100}.{container} Create a key with `fidelora keys "
                    "add`, or set BASE_URL to the address that clients use.",
                    code="HOST_NOT_ALLOWED",
                )
        return UNRESTRICTED

    def _refuse_other_sites(self, headers: Headers) -> None:
        """Reject a POST from another site, on routes that only the server's page may call.

        Browsers send `Origin` or `Sec-Fetch-Site` with a POST; other programs send neither.
        """
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site", "same-origin") == "same-origin":
            return
        authority = (origin or "").lower().partition("://")[2]
        if authority and authority in (headers.get("host", "").lower(), self._authority):
            return
        raise RequestError(
            "A page of another site sent this call; use the server's own page.", code="OTHER_SITE"
        )


def _refuse_proxies(headers: Headers) -> None:
    """Reject a call that a proxy has forwarded, possibly for a client on another machine.

    Raises:
        PeerNotAllowedError: the call has a header that only proxies add.
    """
    for name in headers:
        if name in _FORWARDING_HEADERS or name.startswith("x-forwarded-"):
            raise PeerNotAllowedError(
                f"The call came through a proxy (header {name!r:.100}), so the caller may be on "
                "another machine. A server without API keys refuses such calls. Create a key with "
                "`fidelora keys add`; the proxy itself can also send it."
            )


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _password(credentials: str) -> str:
    """Return the password of Basic credentials, which is the API key; the user name is ignored.

    A1111 clients do not support bearer tokens.
    """
    try:
        # The user name may have any encoding.
        return base64.b64decode(credentials, validate=True).partition(b":")[2].decode()
    except ValueError:
        return ""
