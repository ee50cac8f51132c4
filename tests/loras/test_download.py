"""Downloads from untrusted URLs: allowed hosts and addresses, and limits of size and time."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from fidelora.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterNotFoundError,
    AdapterUrlRefusedError,
)
from fidelora.loras.download import Downloaded, DownloadRules, Network, download, is_public

CONTENT = bytes(range(256)) * 5000
HOSTS = frozenset({"huggingface.co", "files.example", "*.cdn.example"})
RULES = DownloadRules(hosts=HOSTS, max_bytes=10_000_000, timeout_s=20)
TOKEN = "hf_secret"

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Site:
    """A TLS server on 127.0.0.1, to which every hostname of the tests resolves.

    Attributes:
        heads: request heads in order of arrival.
        answers: responses by path; other paths return 404.
        lookups: hostnames that were resolved.
        addresses: results of the first lookups, in order; later lookups return 127.0.0.1.
    """

    def __init__(self, authority: trustme.CA) -> None:
        self.heads: list[bytes] = []
        self.answers: dict[str, Handler] = {}
        self.lookups: list[str] = []
        self.addresses: list[list[str]] = []
        self._authority = authority
        self.network = Network()

    async def resolve(self, host: str, port: int) -> list[str]:
        self.lookups.append(host)
        return self.addresses.pop(0) if self.addresses else ["127.0.0.1"]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Site]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(
            "huggingface.co", "files.example", "x.cdn.example"
        ).configure_cert(context)
        client = ssl.create_default_context()
        self._authority.configure_trust(client)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        # This one address stands for the public internet; everything else is judged as it is.
        self.network = Network(
            self.resolve, lambda address: address == "127.0.0.1" or is_public(address), client, port
        )
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            path = head.split(b" ")[1].decode()
            await self.answers.get(path, answer(b"none", status=404))(head, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has disconnected
        finally:
            writer.close()


def answer(body: bytes, *headers: str, status: int = 200, length: int | None = None) -> Handler:
    async def write(_head: bytes, writer: asyncio.StreamWriter) -> None:
        size = (
            [f"Content-Length: {len(body) if length is None else length}"] if length != -1 else []
        )
        head = "\r\n".join([f"HTTP/1.1 {status} X", "Connection: close", *size, *headers])
        writer.write(head.encode() + b"\r\n\r\n" + body)

    return write


def redirect(place: str, status: int = 302) -> Handler:
    return answer(b"", f"Location: {place}", status=status)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def site(authority) -> Site:
    return Site(authority)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "file.part"


def fetch(
    site: Site, target: Path, url: str, rules: DownloadRules = RULES, **given: str
) -> Downloaded | None:
    async def run() -> Downloaded | None:
        async with site.open():
            return await download(url, target, rules, network=site.network, **given)

    return asyncio.run(run())


def refusal(
    site: Site, target: Path, url: str, rules: DownloadRules = RULES, **given: str
) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch(site, target, url, rules, **given)
    assert not target.exists(), "a file is left"
    text = str(caught.value)
    assert text.endswith(".")
    assert TOKEN not in text
    assert "secret" not in text
    return caught.value


def test_a_downloaded_file_has_the_same_bytes(site, target):
    site.answers["/a.safetensors?x=1"] = answer(CONTENT, 'ETag: "v1"')
    got = fetch(site, target, "https://files.example/a.safetensors?x=1#part")
    assert got == Downloaded(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), '"v1"')
    assert target.read_bytes() == CONTENT
    assert b"Host: files.example" in site.heads[0]


def test_a_file_without_content_length_is_downloaded(site, target):
    site.answers["/a"] = answer(CONTENT, length=-1)
    got = fetch(site, target, "https://files.example/a")
    assert got is not None
    assert got.size_bytes == len(CONTENT)


def test_an_unchanged_file_is_not_downloaded_again(site, target):
    site.answers["/a"] = answer(b"", status=304, length=-1)
    assert fetch(site, target, "https://files.example/a", etag='"v1"') is None
    assert b'If-None-Match: "v1"' in site.heads[0]
    assert not target.exists()
    refusal(site, target, "https://files.example/a")  # the request had no ETag


# --- which URLs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://files.example/a", "ftp://files.example/a", "file:///etc/passwd", "https:///a",
        "https://", "https://user@files.example/a", "https://user:secret@files.example/a",
        "https://files.example:8443/a", "https://files.example:x/a",
        "https://other.example/a?secret", "https://files.example.evil.example/a",
        "https://evilfiles.example/a", "https://cdn.example/a", "https://evilcdn.example/a",
        "https://[::1/a", "https://\udcff/a",
    ],
)  # fmt: skip
def test_urls_that_are_not_allowed_are_refused(site, target, url):
    assert isinstance(refusal(site, target, url), AdapterUrlRefusedError)
    assert site.lookups == []


@pytest.mark.parametrize(
    "host", ["FILES.example", "files.example.", "files.example:443", "x.cdn.example"]
)
def test_other_spellings_of_listed_hosts_are_accepted(site, target, host):
    site.answers["/a"] = answer(CONTENT)
    assert fetch(site, target, f"https://{host}/a") is not None


@pytest.mark.parametrize(
    "literal",
    ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "017700000001", "0177.0.0.1", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "10.0.0.1", "169.254.169.254", "[fe80::1]",
     "[fd00::1]", "[64:ff9b::7f00:1]", "localhost"],
)  # fmt: skip
def test_ip_addresses_instead_of_hostnames_are_refused(site, target, literal):
    """They are refused whether the host is not listed or is listed by mistake."""
    url = f"https://{literal}/a"
    assert isinstance(refusal(site, target, url), AdapterUrlRefusedError)

    async def run() -> None:
        rules = replace(RULES, hosts=frozenset({literal.strip("[]")}))
        await download(
            url, target, rules, network=Network(port=1)
        )  # the real resolver and the real check

    with pytest.raises(AdapterError) as caught:
        asyncio.run(run())
    assert isinstance(caught.value, AdapterUrlRefusedError) or "was not found" in str(caught.value)


def test_without_listed_hosts_all_urls_are_refused(site, target):
    error = refusal(site, target, "https://files.example/a", DownloadRules())
    assert "FIDELORA_LORA_HOSTS" in str(error)


# --- which addresses ----------------------------------------------------------------------------

NOT_PUBLIC = [
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "255.255.255.255", "224.0.0.1", "198.18.0.1", "168.63.129.16", "192.0.0.192", "::1", "::",
    "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "2002:7f00:1::", "2002:a00:1::", "64:ff9b::a9fe:a9fe",
    "2001:0:7f00:1::", "::127.0.0.1", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_hostnames_with_private_addresses_are_refused(site, target, address):
    site.answers["/a"] = answer(CONTENT)
    site.addresses = [[address]]
    assert isinstance(refusal(site, target, "https://files.example/a"), AdapterUrlRefusedError)
    site.addresses = [["93.184.215.14", address]]
    assert isinstance(refusal(site, target, "https://files.example/a"), AdapterUrlRefusedError)
    assert site.heads == []


def test_a_hostname_that_does_not_resolve_is_an_error(site, target):
    site.addresses = [[]]
    refusal(site, target, "https://files.example/a")


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_accepted(address):
    assert is_public(address)


@given(st.ip_addresses())
def test_addresses_that_are_not_global_are_not_public(ip):
    mapped = getattr(ip, "ipv4_mapped", None)
    if not (mapped or ip).is_global:
        assert not is_public(str(ip))


@given(st.ip_addresses(v=4).filter(lambda ip: not ip.is_global))
def test_an_embedded_private_address_is_not_public(ip):
    number = int(ip)
    for wrapped in (
        0xFFFF << 32 | number,
        0x2002 << 112 | number << 80,
        0x0064FF9B << 96 | number,
        0x20010000 << 96 | number << 64,
    ):
        assert not is_public(str(ipaddress.IPv6Address(wrapped)))


def test_the_connection_uses_the_address_that_was_checked(site, target):
    """Each connection resolves the name once, so DNS rebinding cannot replace the address."""
    site.answers["/a"] = answer(CONTENT)
    site.addresses = [["127.0.0.1"], ["10.0.0.1"]]
    assert fetch(site, target, "https://files.example/a") is not None
    assert site.lookups == ["files.example"]


def test_the_certificate_is_verified_for_the_hostname(site, target):
    site.answers["/a"] = answer(CONTENT)
    rules = replace(RULES, hosts=frozenset({"*.example"}))
    assert isinstance(refusal(site, target, "https://other.example/a", rules), AdapterDownloadError)
    assert site.heads == []


# --- redirects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_listed_host_is_followed(site, target, status):
    site.answers["/a"] = redirect("https://x.cdn.example/b", status)
    site.answers["/b"] = answer(CONTENT)
    assert fetch(site, target, "https://files.example/a") is not None
    assert target.read_bytes() == CONTENT


def test_a_relative_redirect_is_followed(site, target):
    site.answers["/a/b"] = redirect("../c")
    site.answers["/c"] = answer(CONTENT)
    assert fetch(site, target, "https://files.example/a/b") is not None


@pytest.mark.parametrize(
    "place",
    ["http://files.example/b", "https://other.example/b", "https://127.0.0.1/b",
     "file:///etc/passwd", "//other.example/b",
     "https://u:p@files.example/b", "https://files.example:1/b", ""],
)  # fmt: skip
def test_redirects_are_checked_like_the_first_url(site, target, place):
    site.answers["/a"] = redirect(place)
    site.answers["/b"] = answer(CONTENT)
    refusal(site, target, "https://files.example/a")
    assert all(b"GET /b" not in head for head in site.heads)


def test_a_redirect_to_a_private_address_is_refused(site, target):
    site.answers["/a"] = redirect("https://x.cdn.example/b")
    site.addresses = [["127.0.0.1"], ["169.254.169.254"]]
    assert isinstance(refusal(site, target, "https://files.example/a"), AdapterUrlRefusedError)
    assert len(site.heads) == 1


def test_the_number_of_redirects_is_limited(site, target):
    site.answers["/a"] = redirect("/a")
    assert "redirects" in str(refusal(site, target, "https://files.example/a"))
    assert len(site.heads) == RULES.max_redirects + 1


def test_the_token_is_sent_only_to_the_hub(site, target):
    site.answers["/o/n/resolve/main/a.safetensors"] = redirect("https://x.cdn.example/b")
    site.answers["/b"] = answer(CONTENT)
    fetch(site, target, "https://huggingface.co/o/n/blob/main/a.safetensors", token=TOKEN)
    assert [TOKEN.encode() in head for head in site.heads] == [True, False]
    target.unlink()
    site.answers["/c"] = redirect("https://huggingface.co/o/n/resolve/main/a.safetensors")
    fetch(site, target, "https://files.example/c", token=TOKEN)
    assert [TOKEN.encode() in head for head in site.heads[2:]] == [False, True, False]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/o/n/blob/main/blob/a.safetensors", "/o/n/resolve/main/blob/a.safetensors"),
        (
            "/o/n/resolve/main/a.safetensors?download=true",
            "/o/n/resolve/main/a.safetensors?download=true",
        ),
    ],
)
def test_hub_links_become_download_links(site, target, path, asked):
    site.answers[asked] = answer(CONTENT)
    assert fetch(site, target, f"https://huggingface.co{path}") is not None


def test_a_hub_folder_page_is_refused(site, target):
    assert "folder" in str(refusal(site, target, "https://huggingface.co/o/n/tree/main"))


def test_blob_in_urls_of_other_hosts_is_not_changed(site, target):
    site.answers["/o/n/blob/a"] = answer(CONTENT)
    assert fetch(site, target, "https://files.example/o/n/blob/a") is not None


# --- responses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [(401, AdapterDownloadError, "hf_token"), (403, AdapterDownloadError, "hf_token"),
     (404, AdapterNotFoundError, "does not exist"), (410, AdapterNotFoundError, "does not exist"),
     (500, AdapterDownloadError, "500"), (204, AdapterDownloadError, "204")],
)  # fmt: skip
def test_responses_that_are_not_a_file_are_refused(site, target, status, kind, words):
    site.answers["/a?secret=1"] = answer(b"", status=status, length=-1 if status == 204 else None)
    error = refusal(site, target, "https://files.example/a?secret=1", token=TOKEN)
    assert isinstance(error, kind)
    assert words in str(error)


@pytest.mark.parametrize(
    "given",
    [
        answer(b"x", "Content-Type: text/html; charset=utf-8"),
        answer(b" \n<!DOCTYPE html>"),
        answer(b"<HTML>"),
    ],
)
def test_a_web_page_is_refused(site, target, given):
    site.answers["/a"] = given
    assert "web page" in str(refusal(site, target, "https://files.example/a"))


def test_a_file_that_is_too_large_is_not_downloaded(site, target):
    site.answers["/a"] = answer(b"", length=RULES.max_bytes + 1)
    assert "too large" in str(refusal(site, target, "https://files.example/a"))


def test_an_endless_file_is_aborted(site, target):
    sent = 0

    async def endless(_head: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 X\r\n\r\n")
        while True:
            writer.write(bytes(100_000))
            sent += 100_000
            await writer.drain()
            # Yield to the event loop: writes to a closed connection are discarded and drain() does
            # not wait, so without this the client's disconnect is never detected.
            await asyncio.sleep(0)

    site.answers["/a"] = endless
    assert "too large" in str(refusal(site, target, "https://files.example/a"))
    assert sent < 10 * RULES.max_bytes


def test_a_truncated_download_is_refused(site, target):
    site.answers["/a"] = answer(CONTENT, length=len(CONTENT) + 1)
    assert isinstance(refusal(site, target, "https://files.example/a"), AdapterDownloadError)


def test_compressed_responses_are_refused(site, target):
    site.answers["/a"] = answer(b"\x1f\x8b", "Content-Encoding: gzip")
    assert "content encoding" in str(refusal(site, target, "https://files.example/a"))
    assert b"Accept-Encoding: identity" in site.heads[0]


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 X\r\n", b"HTTP/1.1 200 X\r\nContent-Length: 100\r\n\r\n"]
)
def test_a_slow_server_is_limited_by_the_total_timeout(site, target, start):
    """Every byte arrives in time, but the whole file never does."""

    async def drip(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        for _ in range(10_000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    site.answers["/a"] = drip
    error = refusal(site, target, "https://files.example/a", replace(RULES, timeout_s=0.5))
    assert "within 0.5 seconds" in str(error)


def test_a_name_server_without_response_is_limited_by_the_timeout(site, target):
    async def never(_host: str, _port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    site.resolve = never
    assert "within 0.2 seconds" in str(
        refusal(site, target, "https://files.example/a", replace(RULES, timeout_s=0.2))
    )


def test_a_canceled_download_leaves_no_file(site, target):
    async def run() -> None:
        came = asyncio.Event()

        async def half(_head: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 10000000\r\n\r\n" + CONTENT)
            await writer.drain()
            came.set()
            await asyncio.Event().wait()

        site.answers["/a"] = half
        async with site.open():
            task = asyncio.create_task(
                download("https://files.example/a", target, RULES, network=site.network)
            )
            await came.wait()
            while not target.exists():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not target.exists()

    asyncio.run(run())


def test_proxies_in_the_environment_are_not_used(site, target, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    site.answers["/a"] = answer(CONTENT)
    assert fetch(site, target, "https://files.example/a") is not None
