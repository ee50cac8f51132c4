"""HTTP connection to one server that the user named.

Redirects are not followed and addresses in responses are not used, so that neither requests nor the
key reach another server.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from fidelora.errors import ApiError, ApiUnavailableError, UsageError

MAX_RESPONSE_BYTES = 256 * 2**20
"""Largest response: an image of 4096 x 4096 pixels in base64 needs about 70 MB."""
_MAX_MESSAGE = 300  # characters of a server's error that are shown


class Connection:
    """Connection to one server.

    Args:
        base_url: http or https address, with a path prefix if there is one.
        key: API key, sent as `Authorization: Bearer`; `USER:PASSWORD` is sent as `Basic`.
        timeout_s: seconds to wait for one response, which may contain a picture.
        transport: another `httpx2` transport, for tests.

    Raises:
        UsageError: the address is not an http or https URL, or contains a password or query.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: str = "",
        timeout_s: float,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.base_url = _checked(base_url)
        self.key = key
        self.timeout_s = timeout_s
        self.transport = transport
        self._http = httpx2.Client(
            base_url=self.base_url,
            headers={"Authorization": _authorization(key)} if key else {},
            timeout=timeout_s,
            follow_redirects=False,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    @property
    def host(self) -> str:
        """Host of the server, for messages."""
        return urlsplit(self.base_url).netloc

    def find(self, path: str) -> Any:
        """Return the JSON of a path; None if the response is another error, or not JSON.

        Raises:
            ApiError: the server requires another key, or redirects.
            ApiUnavailableError: the server cannot be reached.
        """
        try:
            return self.get(path)
        except ApiUnavailableError:
            raise
        except ApiError as error:
            if error.status in (401, 403) or 300 <= error.status < 400:
                raise
            return None

    def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """Return the JSON of a path.

        Raises:
            ApiError: the response is an error, or not JSON.
            ApiUnavailableError: the server cannot be reached or is busy.
        """
        return self._json(path, self._send("GET", path, params=params))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a JSON body; return the JSON of the response. Raises as `get`."""
        return self._json(path, self._send("POST", path, body=body))

    def download(self, path: str, params: Mapping[str, str] | None = None) -> bytes:
        """Return the bytes of a file. Raises as `get`."""
        return self._send("GET", path, params=params)

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> bytes:
        try:
            with self._http.stream(method, path, params=params, json=body) as response:
                content = bytearray()
                for part in response.iter_bytes():
                    content += part
                    if len(content) > MAX_RESPONSE_BYTES:
                        raise ApiError(
                            f"The response of {self.host} to {path} is larger than "
                            f"{MAX_RESPONSE_BYTES // 2**20} MiB.",
                            status=response.status_code,
                        )
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ApiUnavailableError(f"{self.host} cannot be reached: {reason}.") from error
        status = response.status_code
        if 300 <= status < 400:
            raise ApiError(
                f"{self.host} redirects {path}. Redirects are not followed; set --against to the "
                "address that it redirects to.",
                status=status,
            )
        if status in (401, 403):
            raise ApiError(
                f"{self.host} requires a valid key; set the environment variable VERIFY_API_KEY.",
                status=status,
            )
        if not response.is_success:
            kind = ApiUnavailableError if status in (429, 502, 503, 504) else ApiError
            raise kind(
                f"{self.host} answered {path} with {status}: {_message(bytes(content))}",
                status=status,
            )
        return bytes(content)

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise self.unexpected(path) from error

    def unexpected(self, path: str) -> ApiError:
        """Return the error for a response without the expected fields."""
        return ApiError(
            f"The response of {self.host} to {path} does not belong to this API; check --against "
            "and --api."
        )


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UsageError(
            f"{url!r:.200} is not the address of a server; use http://HOST:PORT or https://HOST."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "The address must not contain a password, a query or a fragment; set the key in the "
            "environment variable VERIFY_API_KEY."
        )
    return url.rstrip("/")


def _authorization(key: str) -> str:
    if ":" in key:
        return f"Basic {base64.b64encode(key.encode()).decode()}"
    return f"Bearer {key}"


def _message(content: bytes) -> str:
    """Return the message of an error body, shortened."""
    try:
        body = json.loads(content)
    except ValueError:
        body = {}
    found: Any = body
    for _ in range(3):
        if not isinstance(found, dict):
            break
        found = next(
            (found[name] for name in ("error", "detail", "message", "errors") if found.get(name)),
            "",
        )
    text = found if isinstance(found, str) else json.dumps(found)
    if isinstance(body, dict) and body.get("node_errors"):
        text += f" {json.dumps(body['node_errors'])}"
    return text[:_MAX_MESSAGE] or "no message."
