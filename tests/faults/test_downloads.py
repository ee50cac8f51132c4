"""Slow, endless and lying download servers; tests/loras/test_download.py has the basic cases."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
from tests.faults.fuzz.targets import check_message
from tests.faults.hostile_adapters import SOUND, hostile_adapters, lora
from tests.faults.hostile_adapters import file_of as safetensors_of
from tests.loras.test_download import (
    CONTENT,
    RULES,
    Handler,
    Site,
    answer,
    fetch,
    redirect,
    refusal,
)

from fidelora.errors import (
    AdapterChangedError,
    AdapterDownloadError,
    AdapterError,
    AdapterUrlRefusedError,
    FideloraError,
)
from fidelora.loras.cache import AdapterCache
from fidelora.loras.download import DownloadRules, download
from fidelora.loras.resolve import AdapterResolver
from fidelora.recipe import AdapterRef

URL = "https://files.example/a.safetensors"
PATH = "/a.safetensors"
SHORT = replace(RULES, timeout_s=0.5)
"""Rules with a short timeout. Only for servers that never finish: others could exceed it."""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def site(authority) -> Site:
    return Site(authority)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "file.part"


def raw(content: bytes) -> Handler:
    """Return a handler that sends these bytes as they are, and closes the connection."""

    async def write(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    return write


def endless(start: bytes, part: Callable[[int], bytes]) -> Handler:
    """Return a handler that sends parts for as long as the client reads them."""

    async def write(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        number = 0
        while not writer.is_closing():
            writer.write(part(number))
            number += 1
            await writer.drain()
            await asyncio.sleep(0)  # or the disconnect of the client would not be noticed

    return write


OK = b"HTTP/1.1 200 X\r\nConnection: close\r\n"


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 1\r\nContent-Length: 2\r\n", b"Content-Length: -1\r\n",
        b"Content-Length: 1x\r\n", b"Content-Length: \r\n", b"Content-Length: 1, 2\r\n",
        b"Content-Length: 99999999999999999999999999\r\n", b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n", b"Content-Length: 0x10\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n", b"Bad Header\r\n", b"\0: a\r\n",
        b"a: b\r\n\tc\x00\r\n",
    ],
    ids=range(13),
)  # fmt: skip
def test_headers_that_lie_about_the_length_are_refused(site, target, headers):
    site.answers[PATH] = raw(OK + headers + b"\r\n" + CONTENT[:100])
    assert isinstance(refusal(site, target, URL), AdapterDownloadError)


def test_a_body_that_is_longer_than_announced_is_cut(site, target):
    site.answers[PATH] = answer(CONTENT, length=10)
    got = fetch(site, target, URL)
    assert got is not None
    assert (got.size_bytes, target.read_bytes()) == (10, CONTENT[:10])


@pytest.mark.parametrize(
    "body",
    [
        b"5\r\nabc", b"5\r\nabcde\r\n", b"-1\r\na\r\n", b"x\r\n", b"\r\n", b"5;" + b"a" * 10**6,
        b"ffffffffffffffffffffff\r\na", b"5 5\r\nabcde\r\n0\r\n\r\n", b"0\r\na: " + b"b" * 10**6,
        b"5\nabcde\n0\n\n",
    ],
    ids=range(10),
)  # fmt: skip
def test_chunks_that_are_not_valid_are_refused(site, target, body):
    site.answers[PATH] = raw(OK + b"Transfer-Encoding: chunked\r\n\r\n" + body)
    assert isinstance(refusal(site, target, URL), AdapterDownloadError)


# --- servers that never finish --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"HTTP/1.1 200 X\r\n", lambda number: b"a%d: b\r\n" % number),
        (b"HTTP/1.1 200 X\r\nA: ", lambda _number: b"a" * 1000),
        (b"HTTP/1.1 200 ", lambda _number: b"a" * 1000),
        (b"", lambda _number: b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", lambda _number: b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"),
        (b"", lambda _number: b"\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", lambda _number: b"1\r\na\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5", lambda _number: b";a"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", lambda _number: b"a: b\r\n"),
        (OK + b"Content-Encoding: gzip\r\n\r\n", lambda _number: gzip.compress(bytes(10**6))),
    ],
    ids=["headers", "header", "reason", "continue", "hints", "lines", "chunks", "extension",
         "trailers", "gzip"],
)  # fmt: skip
def test_a_server_that_never_finishes_is_given_up(site, target, start, part):
    site.answers[PATH] = endless(start, part)
    error = refusal(site, target, URL, replace(SHORT, max_bytes=1000))
    assert isinstance(error, AdapterDownloadError)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\r\n\r\n", b"garbage", b"\x16\x03\x01", b"\0" * 10_000, b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 99 X\r\n\r\n", b"HTTP/1.1 1000 X\r\n\r\n",
    ],
    ids=range(8),
)  # fmt: skip
def test_a_response_that_is_not_http_is_refused(site, target, content):
    site.answers[PATH] = raw(content)
    assert isinstance(refusal(site, target, URL, SHORT), AdapterDownloadError)


def test_redirects_that_never_repeat_are_limited(site, target):
    async def elsewhere(head: bytes, writer: asyncio.StreamWriter) -> None:
        site.answers[f"/{len(site.heads)}"] = elsewhere
        await redirect(f"https://x.cdn.example/{len(site.heads)}")(head, writer)

    site.answers[PATH] = elsewhere
    assert "redirects" in str(refusal(site, target, URL))
    assert len(site.heads) == RULES.max_redirects + 1


@pytest.mark.parametrize(
    "place",
    [
        "https://127.0.0.1/a", "https://[::1]/a", "https://2130706433/a", "https://0x7f000001/a",
        "https://localhost/a", "https://169.254.169.254/latest/meta-data/",
        "https://files.example@127.0.0.1/a", "https://files.example:22/a", "//127.0.0.1/a",
        "gopher://files.example/a", "javascript:alert(1)", "data:text/plain,a",
        "https://files.example\\@127.0.0.1/a", "https://\u2024/a",
        "https://files.example\t.evil.example/a", "https://xn--/a", "https://" + "a" * 300 + "/a",
        "https://[v1.a]/a",
    ],
)  # fmt: skip
def test_redirects_to_hostile_places_are_refused(site, target, place):
    site.answers[PATH] = raw(
        b"HTTP/1.1 302 X\r\nConnection: close\r\nLocation: " + place.encode() + b"\r\n\r\n"
    )
    assert isinstance(refusal(site, target, URL), AdapterUrlRefusedError | AdapterDownloadError)
    assert len(site.heads) == 1, "a second request was sent"


def test_a_redirect_with_a_very_long_url_is_refused(site, target):
    site.answers[PATH] = redirect("https://files.example/" + "a" * 10**6)
    assert isinstance(refusal(site, target, URL), AdapterDownloadError)


# --- content --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["gzip", "br", "zstd", "deflate", "GZIP", "identity, gzip", "x"]
)
def test_a_compressed_bomb_is_refused_before_it_is_read(site, target, encoding):
    bomb = zlib.compress(bytes(10**7))
    site.answers[PATH] = answer(bomb, f"Content-Encoding: {encoding}")
    assert "content encoding" in str(refusal(site, target, URL))


def test_a_second_content_encoding_is_not_hidden_by_the_first(site, target):
    site.answers[PATH] = answer(b"\x1f\x8b", "Content-Encoding: identity", "Content-Encoding: gzip")
    assert "content encoding" in str(refusal(site, target, URL))


@pytest.fixture
def resolve(site, tmp_path, monkeypatch):
    """Return a function that resolves `URL` as the server does, with its cache."""
    monkeypatch.setattr(
        "fidelora.loras.resolve.download",
        lambda *given, **options: download(*given, **options, network=site.network),
    )
    cache = AdapterCache(tmp_path / "cache", 2**30)
    resolver = AdapterResolver(
        tmp_path, cache, DownloadRules(hosts=RULES.hosts, max_bytes=10**7, timeout_s=20)
    )

    def run(sha256: str | None = None) -> AdapterRef:
        async def resolved() -> AdapterRef:
            async with site.open():
                return await resolver.resolve(URL, owner=None, sha256=sha256)

        return asyncio.run(resolved())

    run.cache = cache  # type: ignore[attr-defined]
    return run


def test_content_that_changes_is_detected(site, resolve):
    site.answers[PATH] = answer(SOUND, 'ETag: "1"')
    first = resolve()
    other = safetensors_of(*lora({"changed": "yes"}))
    site.answers[PATH] = answer(other, 'ETag: "1"')
    second = resolve()
    assert second.sha256 != first.sha256, "the changed content was not noticed behind the same ETag"
    with pytest.raises(AdapterChangedError):
        resolve("0" * 64)
    assert resolve(first.sha256).sha256 == first.sha256, "the file is no longer in the cache"


def test_a_server_that_claims_no_change_returns_the_known_file(site, resolve):
    site.answers[PATH] = answer(SOUND, 'ETag: "1"')
    first = resolve()
    site.answers[PATH] = answer(b"", status=304, length=-1)
    assert resolve().sha256 == first.sha256
    resolve.cache.path(first.sha256).unlink()
    with pytest.raises(AdapterDownloadError):
        resolve()  # without a cached file the request has no ETag, so 304 is an error


@pytest.mark.parametrize("etag", ['"' + "a" * 60_000 + '"', '"\u00e9"', "\x01", "a b", ""])
def test_hostile_etags_do_no_harm(site, resolve, etag):
    site.answers[PATH] = raw(
        OK + f"Content-Length: {len(SOUND)}\r\nETag: {etag}\r\n\r\n".encode("latin-1") + SOUND
    )
    for _ in range(2):
        try:
            resolve()
        except FideloraError as error:
            check_message(error)


@pytest.mark.parametrize(
    "hostile",
    [one for one in hostile_adapters() if one.outcome == "refused" and one.is_plain][::9],
    ids=lambda hostile: hostile.name,
)
def test_hostile_files_are_not_kept(site, resolve, tmp_path, hostile):
    hostile.write(tmp_path / "hostile")
    site.answers[PATH] = answer((tmp_path / "hostile").read_bytes(), 'ETag: "1"')
    with pytest.raises(FideloraError) as caught:
        resolve()
    check_message(caught.value)
    assert isinstance(caught.value, AdapterError) or "safetensors" in str(caught.value)
    assert list(resolve.cache.folder.iterdir()) == []
