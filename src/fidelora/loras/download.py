"""Download LoRA files from untrusted URLs.

Only https, hosts listed by the operator, and public addresses are allowed, within limits of size
and time. The address is checked when a connection is opened, and the connection is made to the
checked address. A redirect, or a name that resolves to another address the second time (DNS
rebinding), therefore cannot bypass the check.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2
from AntiSSRF import IPAddressRanges

from fidelora.atomic import is_full, output_error
from fidelora.errors import AdapterDownloadError, AdapterNotFoundError, AdapterUrlRefusedError
from fidelora.loras.hub import USE_TOKEN

HUB = "huggingface.co"
_HUB_SITES = {HUB, f"www.{HUB}", "hf.co"}
_PIECE_BYTES = 2**20  # bytes written at a time
_HTML_STARTS = (b"<!doctype", b"<html")
_REDIRECTS = (301, 302, 303, 307, 308)
_REFUSED_RANGES = [ipaddress.ip_network(text) for text in IPAddressRanges.recommended_latest]
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""Only IPv6 range assigned for public use: https://www.iana.org/assignments/ipv6-address-space."""
_ERRORS = (
    httpcore2.NetworkError,
    httpcore2.TimeoutException,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    OSError,
)

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class DownloadRules:
    """Limits of downloads.

    Attributes:
        hosts: allowed hosts in lower case, also for redirects; `*.example.com` allows every
            subdomain of example.com. None allows every public host, for URLs that the user of this
            machine chose.
        max_bytes: maximum size of a file.
        timeout_s: time limit of a whole download: name lookups, connections, redirects, headers
            and body.
        max_redirects: maximum number of redirects of a download.
    """

    hosts: frozenset[str] | None = frozenset()
    max_bytes: int = 2 * 2**30
    timeout_s: float = 300.0
    max_redirects: int = 5


@dataclass(frozen=True)
class Downloaded:
    """A downloaded file; `etag` is None if the server sent none."""

    sha256: str
    size_bytes: int
    etag: str | None


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """True if an IP address, and each IPv4 address embedded in it, is on the public internet."""
    ip = ipaddress.ip_address(address.split("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        inner = [ip.sixtofour, *(ip.teredo or ())]
    is_assigned = ip.version == 4 or ip in _GLOBAL_UNICAST
    refused = any(ip.version == network.version and ip in network for network in _REFUSED_RANGES)
    return (
        is_assigned
        and ip.is_global
        and not ip.is_multicast
        and not refused
        and all(is_public(str(one)) for one in inner if one is not None)
    )


@dataclass(frozen=True)
class Network:
    """Network access of downloads. Only tests replace it; it is not a setting."""

    resolve: Resolve = _resolve
    is_allowed: Callable[[str], bool] = is_public
    ssl_context: ssl.SSLContext = field(default_factory=httpcore2.default_ssl_context)
    port: int = 443


async def download(
    url: str,
    target: Path,
    rules: DownloadRules,
    *,
    token: str | None = None,
    etag: str | None = None,
    network: Network | None = None,
) -> Downloaded | None:
    """Download `url` into the new file `target`; if that fails, no file is left.

    Args:
        token: token for the Hugging Face hub; sent to that host only.
        etag: ETag of the version that is stored already.

    Returns:
        The downloaded file, or None if the version with this `etag` is still current.

    Raises:
        AdapterUrlRefusedError: the URL, or one that it redirects to, is not allowed.
        AdapterNotFoundError: the file does not exist on the server.
        AdapterDownloadError: the download failed, or the file is too large or a web page.
        StorageFullError: the disk is full.
    """
    try:
        async with asyncio.timeout(rules.timeout_s):
            return await _Download(rules, network or Network(), token, etag).run(url, target)
    except TimeoutError:
        target.unlink(missing_ok=True)
        raise AdapterDownloadError(
            f"{_shown(url)} was not downloaded within {rules.timeout_s:g} seconds; "
            "put the file into the LoRA folder instead."
        ) from None
    except BaseException:
        target.unlink(missing_ok=True)
        raise


class _Download:
    def __init__(
        self, rules: DownloadRules, network: Network, token: str | None, etag: str | None
    ) -> None:
        self._rules = rules
        self._network = network
        self._token = token
        self._etag = etag

    async def run(self, url: str, target: Path) -> Downloaded | None:
        """Follow redirects and download the file.

        Proxies from the environment are not used, because addresses behind a proxy cannot be
        checked.
        """
        backend = _CheckedConnections(self._network)
        async with httpcore2.AsyncConnectionPool(
            ssl_context=self._network.ssl_context, network_backend=backend
        ) as pool:
            parsed = _hub_file(self._checked(url))
            for _ in range(self._rules.max_redirects + 1):
                try:
                    async with pool.stream(
                        "GET", parsed.geturl(), headers=self._headers(parsed)
                    ) as response:
                        if response.status not in _REDIRECTS:
                            return await self._take(response, parsed, target)
                        location = _header(response, b"location")
                except _ERRORS as error:
                    if isinstance(error, OSError) and is_full(error):
                        raise output_error(
                            f"{_shown(parsed.geturl())} could not be downloaded", error
                        ) from error
                    raise AdapterDownloadError(
                        f"{_shown(parsed.geturl())} could not be downloaded: {_reason(error)}."
                    ) from error
                parsed = self._checked(urljoin(parsed.geturl(), location))
        raise AdapterDownloadError(
            f"{_shown(url)} has more than {self._rules.max_redirects} redirects; "
            "use the direct download link of the file."
        )

    def _checked(self, url: str) -> SplitResult:
        """Return the parsed URL, or raise AdapterUrlRefusedError if it is not allowed."""
        hosts = self._rules.hosts
        if hosts is not None and not hosts:
            raise AdapterUrlRefusedError(
                "This server does not download LoRAs from URLs; "
                "its operator can allow hosts with FIDELORA_LORA_HOSTS."
            )
        try:
            parsed = urlsplit(url)
            host, port = (parsed.hostname or "").rstrip(".").encode("idna").decode(), parsed.port
        except (ValueError, UnicodeError):
            raise AdapterUrlRefusedError(
                f"{url[:100]!r} is not a URL; use the form https://host/path/file.safetensors."
            ) from None
        if parsed.scheme != "https":
            raise AdapterUrlRefusedError(
                f"{_shown(url)} is not https; LoRAs are downloaded over https only."
            )
        if parsed.username is not None or parsed.password is not None:
            raise AdapterUrlRefusedError(
                f"URLs with a user name or password are not supported; for the hub, {USE_TOKEN}."
            )
        if port not in (None, 443):
            raise AdapterUrlRefusedError(
                f"{_shown(url)} has the port {port}; only port 443 is allowed."
            )
        if hosts is not None and not any(_matches(host, pattern) for pattern in hosts):
            raise AdapterUrlRefusedError(
                f"This server does not download LoRAs from {host[:100]!r}; "
                "its operator can allow the host with FIDELORA_LORA_HOSTS."
            )
        return SplitResult(
            "https", f"[{host}]" if ":" in host else host, parsed.path or "/", parsed.query, ""
        )

    def _headers(self, parsed: SplitResult) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"Host", parsed.netloc.encode()),
            (b"User-Agent", b"fidelora"),
            # Compressed content could grow without limit when it is decompressed.
            (b"Accept-Encoding", b"identity"),
        ]
        if self._token and parsed.hostname == HUB:
            headers.append(
                (b"Authorization", b"Bearer " + self._token.encode("latin-1", "replace"))
            )
        if self._etag:
            headers.append((b"If-None-Match", self._etag.encode("latin-1", "replace")))
        return headers

    async def _take(
        self, response: httpcore2.Response, parsed: SplitResult, target: Path
    ) -> Downloaded | None:
        """Check the status and headers of the response, and write its body to `target`."""
        shown = _shown(parsed.geturl())
        if response.status == 304 and self._etag:
            return None
        if response.status in (401, 403):
            raise AdapterDownloadError(
                f"{shown} is private or gated ({response.status}); for the hub, {USE_TOKEN}."
            )
        if response.status in (404, 410):
            raise AdapterNotFoundError(
                f"{shown} does not exist ({response.status}); check the URL."
            )
        if response.status != 200:
            raise AdapterDownloadError(
                f"{shown} could not be downloaded: the server returned {response.status}."
            )
        if _header(response, b"content-encoding") not in ("", "identity"):
            raise AdapterDownloadError(
                f"{shown} has a content encoding, which is not supported; use another server."
            )
        if _header(response, b"content-type").lower().startswith("text/html"):
            raise _web_page(shown)
        length = _header(response, b"content-length")
        if length.isdigit() and int(length) > self._rules.max_bytes:
            raise self._too_large(shown)
        body = response.aiter_stream()
        async with aclosing(body):
            sha256, size_bytes = await self._write(body, shown, target)
        return Downloaded(sha256, size_bytes, _header(response, b"etag") or None)

    async def _write(self, body: AsyncIterator[bytes], shown: str, target: Path) -> tuple[str, int]:
        digest, size_bytes, piece = hashlib.sha256(), 0, bytearray()

        def put(file: BinaryIO, content: bytes) -> None:
            digest.update(content)
            file.write(content)

        with target.open("xb") as file:
            async for chunk in body:
                if size_bytes == 0 and bytes(chunk[:100]).lstrip().lower().startswith(_HTML_STARTS):
                    raise _web_page(shown)
                size_bytes += len(chunk)
                if size_bytes > self._rules.max_bytes:
                    raise self._too_large(shown)
                piece += chunk
                if len(piece) >= _PIECE_BYTES:
                    await asyncio.to_thread(put, file, bytes(piece))
                    piece.clear()
            put(file, bytes(piece))
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        return digest.hexdigest(), size_bytes

    def _too_large(self, shown: str) -> AdapterDownloadError:
        return AdapterDownloadError(
            f"{shown} is too large; the limit is {self._rules.max_bytes:,} bytes."
        )


class _CheckedConnections(httpcore2.AsyncNetworkBackend):
    """Network backend that checks addresses itself, and connects only to public ones."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = await self._network.resolve(host, port)
        except OSError as error:  # no `UnicodeError`: the name is ASCII by now
            raise AdapterDownloadError(
                f"The host {host[:100]!r} was not found; check the URL."
            ) from error
        # A single private address among several is enough to refuse the host.
        if not addresses or not all(self._network.is_allowed(address) for address in addresses):
            raise AdapterUrlRefusedError(
                f"{host[:100]!r} is not on the public internet; "
                "LoRAs are downloaded from public hosts only."
            )
        return await self._inner.connect_tcp(
            addresses[0], self._network.port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(
        self, *_args: Any, **_options: Any
    ) -> httpcore2.AsyncNetworkStream:
        raise AdapterUrlRefusedError("LoRAs are not downloaded from Unix sockets.")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _hub_file(parsed: SplitResult) -> SplitResult:
    """Return the download URL (`/resolve/`) for the hub page of a file (`/blob/`).

    Other URLs are returned unchanged.
    """
    parts = parsed.path.split("/")  # "", owner, name, blob, revision, ...
    if parsed.hostname not in _HUB_SITES or len(parts) < 4:
        return parsed
    if parts[3] == "tree":
        raise AdapterUrlRefusedError(
            f"{_shown(parsed.geturl())} is the page of a folder; use the URL of a file in it."
        )
    if parts[3] == "blob":
        parts[3] = "resolve"
    return parsed._replace(path="/".join(parts))


def _matches(host: str, pattern: str) -> bool:
    return host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _header(response: httpcore2.Response, name: bytes) -> str:
    """Return a header; several of the same name are joined, as HTTP defines it."""
    found = (value for key, value in response.headers if key.lower() == name)
    return ", ".join(value.decode("latin-1").strip() for value in found)


def _shown(url: str) -> str:
    """Return a URL for messages, without its query, which may contain a secret."""
    parsed = urlsplit(url)
    return f"{parsed.scheme}://{parsed.hostname or ''}{parsed.path}"[:300]


def _web_page(shown: str) -> AdapterDownloadError:
    return AdapterDownloadError(
        f"{shown} is a web page (HTML), not a LoRA; use the direct download link of the file."
    )


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
