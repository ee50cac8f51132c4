"""Connections without a complete request are closed, and their number is limited."""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import suppress
from typing import Any

import pytest
import uvicorn

from fidelora.server import connections
from fidelora.server.connections import LimitedProtocol, connection_limit

TIMEOUT_S = 20.0
REQUEST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer when the whole body has arrived."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def short_timeouts(monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(connections, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(LimitedProtocol, "max_connections", 3)


async def with_server(call: Any, app: Any = app, **given: Any) -> Any:
    """Return the result of `call(port)` while the server runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=LimitedProtocol, log_config=None, lifespan="off", **given)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve(sockets=[listener]))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await call(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await serving


async def talk(port: int, *parts: bytes) -> bytes:
    """Send all parts, and return everything that the server answers until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


def recorded_calls(monkeypatch: Any, method: str) -> list[Any]:
    """Return a list that receives the argument of each later call of a method of the protocol."""
    arguments: list[Any] = []
    original = getattr(LimitedProtocol, method)

    def call(protocol: LimitedProtocol, argument: Any) -> None:
        arguments.append(argument)
        original(protocol, argument)

    monkeypatch.setattr(LimitedProtocol, method, call)
    return arguments


def transport_of(writer: asyncio.StreamWriter) -> asyncio.Transport:
    assert isinstance(writer.transport, asyncio.Transport)
    return writer.transport


@pytest.mark.parametrize(
    "parts",
    [(), (b"GET / HT",), (REQUEST[:-2],), (REQUEST, b"12")],
    ids=["idle", "half-line", "half-header", "half-body"],
)
def test_a_connection_without_a_whole_request_is_closed(short_timeouts, parts):
    assert asyncio.run(with_server(lambda port: talk(port, *parts))) == b""


def test_bytes_of_a_header_do_not_extend_its_time(short_timeouts):
    async def drip(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.create_task(reader.read())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n")
        while not answer.done():
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0)
            if writer.is_closing() or reader.at_eof():
                break
        writer.close()
        return await answer

    with suppress(ConnectionError):  # the server closed while more was written
        assert asyncio.run(with_server(drip)) == b""


def test_a_body_that_trickles_in_is_closed(short_timeouts, monkeypatch):
    monkeypatch.setattr(connections, "MIN_BYTES_PER_S", 10**9)

    async def drip(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.create_task(reader.read())
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        while not answer.done():
            writer.write(b"a")
            await asyncio.sleep(0)
        writer.close()
        return await answer

    with suppress(ConnectionError):  # the server closed while more was written
        assert asyncio.run(with_server(drip)) == b""


CONTENT = b"\0" * 16 * 2**20  # more than the system buffers


async def download(scope: Any, receive: Any, send: Any) -> None:
    """Send a large response in two parts."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": CONTENT, "more_body": True})
    await send({"type": "http.response.body", "body": CONTENT})


@pytest.mark.parametrize("is_short", [False, True], ids=["large", "small-rest"])
def test_a_connection_whose_client_does_not_read_is_closed(short_timeouts, monkeypatch, is_short):
    monkeypatch.setattr(connections, "WRITE_TIMEOUT_S", 0.05)
    lost = recorded_calls(monkeypatch, "connection_lost")

    async def without_reading(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        transport_of(writer).pause_reading()
        writer.write(REQUEST + b"1234")
        while not lost:
            await asyncio.sleep(0)
        writer.close()

    asyncio.run(with_server(without_reading, small_rest if is_short else download))
    assert len(lost) == 1


async def small_rest(scope: Any, receive: Any, send: Any) -> None:
    """End the response and the connection with a few bytes that the client has not read."""
    transport = receive.__self__.transport
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while transport.get_write_buffer_size() == 0:
        transport.write(b"a" * 2000)
    await send({"type": "http.response.body", "body": b""})
    transport.close()


def test_a_slow_client_that_keeps_reading_gets_the_whole_response(short_timeouts, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(connections, "MIN_BYTES_PER_S", -(10**9))  # no minimum rate
    checks = recorded_calls(monkeypatch, "_wait_for_client")

    async def slowly(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        transport_of(writer).pause_reading()
        writer.write(REQUEST + b"1234")
        while len(checks) < 3:
            await asyncio.sleep(0)
        transport_of(writer).resume_reading()
        size = 0
        while part := await reader.read(2**20):
            size += part.count(0)
            if size == 2 * len(CONTENT):
                break
        writer.close()
        return size

    size = asyncio.run(with_server(slowly, download))
    assert size == 2 * len(CONTENT)


def test_a_request_is_parsed_in_small_parts(short_timeouts, monkeypatch):
    parts = recorded_calls(monkeypatch, "data_received")
    chunks = b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"
    header = (
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert b"204" in asyncio.run(with_server(lambda port: talk(port, header + chunks)))
    assert b"".join(parts) == header + chunks
    assert max(map(len, parts)) <= connections.READ_BYTES


def test_several_requests_on_one_connection_are_answered(short_timeouts):
    async def twice(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answers = b""
        for _ in range(2):
            writer.write(REQUEST + b"1234")
            answers += await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return answers

    assert asyncio.run(with_server(twice)).count(b"204") == 2


def test_a_request_with_two_lengths_is_the_last_of_its_connection():
    """Otherwise, the second request could pass a proxy unseen (request smuggling)."""
    smuggled = (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n" + REQUEST + b"1234"
    )
    assert asyncio.run(with_server(lambda port: talk(port, smuggled))).count(b"204") == 1


def test_connections_over_the_limit_are_closed_at_once(short_timeouts, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", TIMEOUT_S)

    async def many(port: int) -> tuple[int, bytes]:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        reader, more = await asyncio.open_connection("127.0.0.1", port)
        try:
            refused = await reader.read()
        except ConnectionError:
            refused = b""
        held[0][1].write(REQUEST + b"1234")  # the others still work
        answer = await held[0][0].readuntil(b"\r\n\r\n")
        for _, writer in held:
            writer.close()
        more.close()
        return len(refused), answer

    refused, answer = asyncio.run(with_server(many))
    assert refused == 0
    assert b"204" in answer


@pytest.mark.parametrize(
    ("soft", "hard", "limit", "raised"),
    [
        (1024, 4096, 3840, 4096),
        (1024, resource.RLIM_INFINITY, 4096, 65_536),
        (100_000, 100_000, 4096, None),
        (256, 256, 16, None),
    ],
)
def test_the_limit_depends_on_the_limit_of_open_files(monkeypatch, soft, hard, limit, raised):
    changed: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits[0]))
    assert connection_limit() == limit
    assert changed == ([] if raised is None else [raised])
