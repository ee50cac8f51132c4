"""The clients against the real application and against servers with scripted answers."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest
from tests.server.http_support import ManualWorker, context_in, listening, now
from tests.server.serve_support import until
from tests.support import LOKR

from fidelora import AsyncClient, Client
from fidelora.api import InferenceRequest
from fidelora.client import calls
from fidelora.errors import (
    ApiError,
    ApiUnavailableError,
    ClientTimeoutError,
    OutputError,
    RequestCanceledError,
    RequestFailedError,
    UsageError,
)
from fidelora.families import all_families
from fidelora.jobs.job import Status
from fidelora.server.context import ServerContext

KEY = "fl_secret"


@pytest.fixture
def context(tmp_path) -> ServerContext:
    return context_in(tmp_path)


@pytest.fixture
def worker(context) -> ManualWorker:
    return ManualWorker(context)


@pytest.fixture
def url(context):
    with listening(context) as found:
        yield found


@pytest.fixture
def client(url):
    with Client(url) as made:
        yield made


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch):
    monkeypatch.setattr(calls, "POLL_S", 0.01)


def in_background(context: ServerContext, action: Callable[[], Any]) -> None:
    """Call `action` on another thread as soon as a request is in the queue."""

    def act() -> None:
        until(lambda: context.store.count(Status.IN_QUEUE))
        action()

    threading.Thread(target=act, daemon=True).start()


def finish(worker: ManualWorker, context: ServerContext, content: bytes = b"an image") -> None:
    job = worker.claim()
    worker.step(job, 5)
    worker.succeed(job, content)


# --- against the real application


def test_generate_and_save_images(client, context, worker, tmp_path):
    seen: list[Any] = []

    def on_progress(status: Any) -> None:
        if not seen:
            finish(worker, context)
        seen.append(status)

    result = client.generate(
        "[trigger] on grass",
        ("sks.safetensors", 0.8),
        trigger_word="sks",
        seed=7,
        width=512,
        on_progress=on_progress,
    )
    assert seen[0].status is Status.IN_QUEUE
    assert seen[-1].status is Status.SUCCEEDED
    assert [status.status for status in seen] == sorted(
        (status.status for status in seen), key=list(Status).index
    )
    (path,) = client.save_images(result, tmp_path / "out" / "new")
    assert path == tmp_path / "out" / "new" / f"{result.request_id}_output_0.png"
    assert path.read_bytes() == b"an image"
    (recipe,) = context.store.get(result.request_id).recipes
    assert (recipe.prompt, recipe.seed, recipe.width, recipe.height) == (
        "sks on grass",
        7,
        512,
        1024,
    )
    assert recipe.adapters[0].multiplier == 0.8


def test_submit_accepts_every_form_of_prompts_and_loras(client, context):
    (context.settings.loras / "b.safetensors").write_bytes(LOKR.read_bytes())
    accepted = client.submit(
        ["a", {"prompt": "b", "seed": 3, "sample_steps": 9}],
        ["sks.safetensors", {"path": "b.safetensors", "network_multiplier": -1}],
        sample_steps=5,
        output_format="webp",
        match="trainer",
    )
    job = context.store.get(accepted.request_id)
    assert [(recipe.prompt, recipe.seed, recipe.steps) for recipe in job.recipes] == [
        ("a", 42, 5),
        ("b", 3, 9),
    ]
    assert [ref.multiplier for ref in job.recipes[0].adapters] == [1.0, -1.0]
    assert job.image_format == "webp"

    whole = InferenceRequest.model_validate(
        {"model": "sd15", "loras": [{"path": "sks.safetensors"}], "prompts": [{"prompt": "c"}]}
    )
    assert context.store.get(client.submit(whole).request_id).recipes[0].prompt == "c"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 3}, r"width: Expected a number of at least 64\."),
        ({"wdth": 512}, "wdth"),
        ({"match": "trainers"}, "match"),
        ({"output_format": "gif"}, "output_format"),
        ({"seed": "x"}, r"seed: Expected an integer\."),
    ],
)
def test_wrong_arguments_are_refused_without_a_call(fields, words):
    with Client("http://127.0.0.1:1") as nowhere, pytest.raises(UsageError, match=words):
        nowhere.submit("a", "sks.safetensors", **fields)


@pytest.mark.parametrize(
    ("loras", "paths"),
    [
        ((), []),
        (("a.safetensors",), ["a.safetensors"]),
        (("a.safetensors", 0.5), ["a.safetensors"]),
        (("a.safetensors", "b.safetensors"), ["a.safetensors", "b.safetensors"]),
        ((("a.safetensors", 0.5), "b.safetensors"), ["a.safetensors", "b.safetensors"]),
    ],
)
def test_loras_can_be_a_tuple(loras, paths):
    request = calls.make_request("x", loras, {"model": "sd15"}, {})
    assert [lora.path for lora in request.loras] == paths


def test_a_lora_with_three_parts_is_refused():
    with pytest.raises(UsageError, match="a pair of a path and a multiplier"):
        calls.make_request("x", [("a.safetensors", 0.5, "low")], {"model": "sd15"}, {})  # type: ignore[list-item]


def test_wrong_addresses_and_files_are_refused_without_a_call(tmp_path):
    for kind in (Client, AsyncClient):
        with pytest.raises(UsageError, match=r"base_url is '127\.0\.0\.1:8000'; it must"):
            kind("127.0.0.1:8000")
    with Client("http://127.0.0.1:1") as nowhere, pytest.raises(UsageError, match="cannot be read"):
        nowhere.upload_lora(tmp_path / "none.safetensors")


def test_server_errors_are_raised_with_their_code(client):
    with pytest.raises(ApiError, match=r"none\.safetensors") as caught:
        client.submit("a", "none.safetensors")
    assert (caught.value.status, caught.value.code) == (400, "LORA_NOT_FOUND")
    with pytest.raises(ApiError, match=r"prompts.0.sampler: The sampler") as caught:
        client.submit("a", "sks.safetensors", sampler="x")
    assert (caught.value.status, caught.value.code) == (422, "VALIDATION")
    for call in (
        client.status,
        client.result,
        client.cancel,
        client.wait,
        lambda one: client.image(one, 0),
    ):
        with pytest.raises(ApiError) as caught:
            call("unknown")
        assert (caught.value.status, caught.value.code) == (404, "REQUEST_NOT_FOUND")


def test_failed_and_canceled_requests_raise(client, worker, context):
    in_background(context, lambda: worker.fail(worker.claim()))
    with pytest.raises(RequestFailedError, match="NaN") as failed:
        client.generate("a", "sks.safetensors")
    assert failed.value.code == "NUMERICS"
    accepted = client.submit("a", "sks.safetensors")
    client.cancel(accepted.request_id)
    assert client.wait(accepted.request_id).status is Status.CANCELED
    with pytest.raises(UsageError, match="no images"):
        client.save_images(client.result(accepted.request_id), "out")

    def cancel_all() -> None:
        for job in context.store.list(status=Status.IN_QUEUE).jobs:
            context.store.cancel(job.id, now())

    in_background(context, cancel_all)
    with pytest.raises(RequestCanceledError):
        client.generate("a", "sks.safetensors")


def test_timeout_error_contains_the_progress(client, worker, context):
    accepted = client.submit("a", "sks.safetensors")
    worker.step(worker.claim(), 5)
    with pytest.raises(ClientTimeoutError, match="it is in_progress, 20% done"):
        client.wait(accepted.request_id, timeout_s=0.3)
    assert not context.store.get(accepted.request_id).cancel_requested
    with pytest.raises(ClientTimeoutError):
        client.wait(accepted.request_id, timeout_s=0.3, cancel_on_timeout=True)
    assert context.store.get(accepted.request_id).cancel_requested


def test_lists_cover_all_pages(client, context, monkeypatch):
    ids = [client.submit("a", "sks.safetensors").request_id for _ in range(3)]
    monkeypatch.setattr(
        context.store,
        "list",
        lambda *, limit, _list=context.store.list, **given: _list(limit=1, **given),
    )
    assert [status.request_id for status in client.requests()] == ids[::-1]
    assert list(client.requests(status=Status.FAILED)) == []
    uploaded = client.upload_lora(LOKR, "mine.safetensors")
    assert uploaded.path == "uploads/mine.safetensors"
    assert [lora.path for lora in client.loras()] == ["sks.safetensors", "uploads/mine.safetensors"]
    client.delete_lora(uploaded.path)
    assert [lora.path for lora in client.loras()] == ["sks.safetensors"]
    with pytest.raises(ApiError, match="No uploaded LoRA"):
        client.delete_lora(uploaded.path)
    assert [model.id for model in client.models()] == list(all_families())
    assert client.ready()


def test_api_key_is_sent_and_not_in_repr(url, context):
    key = context.keys.add("me")
    with Client(url) as without, pytest.raises(ApiError, match="API key") as caught:
        without.models()
    assert caught.value.status == 401
    with Client(url, api_key=key) as client:
        assert client.models()
        assert key not in repr(client) + repr(vars(client))


def test_every_call_of_the_async_client_works(url, context, worker, tmp_path):
    async def run() -> None:
        async with AsyncClient(url) as client:
            in_background(context, lambda: finish(worker, context))
            seen: list[Any] = []
            result = await client.generate("a", "sks.safetensors", on_progress=seen.append)
            assert seen[-1].status is Status.SUCCEEDED
            (path,) = await client.save_images(result, tmp_path / "out")
            assert path.read_bytes() == b"an image"
            assert [status.request_id async for status in client.requests()] == [result.request_id]
            assert [lora.path async for lora in client.loras()] == ["sks.safetensors"]
            assert (await client.upload_lora(LOKR)).uploaded
            await client.delete_lora(LOKR.name)
            assert [model.id for model in await client.models()] == list(all_families())
            assert await client.ready()
            with pytest.raises(ApiError, match=r"none\.safetensors"):
                await client.submit("a", "none.safetensors")
            accepted = await client.submit("a", "sks.safetensors")
            with pytest.raises(ClientTimeoutError):
                await client.wait(accepted.request_id, timeout_s=0.2, cancel_on_timeout=True)
            assert (await client.status(accepted.request_id)).status is Status.CANCELED

    asyncio.run(run())


def test_both_clients_have_the_same_methods():
    def parameters_of(kind: type) -> dict[str, list[str]]:
        methods = {
            name: method
            for name, method in vars(kind).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }
        return {
            name: [str(one) for one in inspect.signature(method).parameters.values()]
            for name, method in methods.items()
        }

    assert parameters_of(Client) == parameters_of(AsyncClient)


# --- against servers with scripted answers

STATUS = {
    "request_id": "r1",
    "status": "in_queue",
    "created_at": "2026-11-22T12:00:00Z",
    "started_at": None,
    "finished_at": None,
    "error": None,
}
DONE = STATUS | {"status": "succeeded"}
IMAGE = {
    "format": "png",
    "width": 8,
    "height": 8,
    "file_path": "/x/../r1.png",
    "seed": 1,
    "sha256": hashlib.sha256(b"x").hexdigest(),
}
RESULT = {
    "request_id": "r1",
    "status": "succeeded",
    "outputs": {"images": [IMAGE], "videos": []},
    "error": None,
    "created_at": "2026-11-22T12:00:00Z",
    "finished_at": None,
    "metadata": None,
}
ACCEPTED = {
    "request_id": "r1",
    "status": "queued",
    "status_url": "u",
    "result_url": "u",
    "created_at": "2026-11-22T12:00:00Z",
}


class ScriptedTransport(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Transport with a list of answers for each path; the last answer of a list repeats."""

    def __init__(self, **script: list[Any]) -> None:
        self.script = {name: iter(answers) for name, answers in script.items()}
        self.last: dict[str, Any] = {}
        self.requests: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        name = request.url.path.rsplit("/", 1)[-1]
        self.last[name] = answer = next(self.script.get(name, iter(())), self.last.get(name))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx2.Response):
            return httpx2.Response(
                answer.status_code, headers=answer.headers, content=answer.content
            )
        if isinstance(answer, str):
            return httpx2.Response(200, content=self._stream(answer))
        return (
            httpx2.Response(200, json=answer)
            if answer is not None
            else httpx2.Response(404, json={"detail": "Not Found"})
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = self.handle_request(request)
        return httpx2.Response(
            answer.status_code, headers=answer.headers, content=b"".join(answer.iter_bytes())
        )

    def _stream(self, text: str) -> Iterator[bytes]:
        whole, _, rest = text.partition("BREAK")
        yield whole.encode()
        if rest or text.endswith("BREAK"):
            raise httpx2.ReadError("the connection broke")


def scripted_client(**script: list[Any]) -> tuple[Client, ScriptedTransport]:
    transport = ScriptedTransport(**script)
    return Client("http://x.example/prefix", api_key=KEY, transport=transport, retries=3), transport


def event(number: int, body: dict[str, Any]) -> str:
    return f"event: status\ndata: {json.dumps(body)}\nid: {number}\n\n"


def error(status: int, code: str, **headers: str) -> httpx2.Response:
    body = {"detail": {"error": {"code": code, "message": "No.", "details": {"a": 1}}}}
    return httpx2.Response(
        status,
        json=body,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


@pytest.fixture
def pauses(monkeypatch):
    taken: list[float] = []
    monkeypatch.setattr("fidelora.client.sync.time.sleep", taken.append)
    return taken


def test_retries_use_the_same_idempotency_key(pauses):
    client, transport = scripted_client(
        inference=[
            error(429, "QUEUE_FULL", Retry_After="7"),
            httpx2.ConnectError("no"),
            error(503, "SERVER_STOPPING"),
            ACCEPTED,
        ]
    )
    assert client.submit("a", "b.safetensors").request_id == "r1"
    assert len({request.headers["idempotency-key"] for request in transport.requests}) == 1
    assert pauses == [7, 1.0, 2.0]
    assert str(transport.requests[0].url) == "http://x.example/prefix/v1/inference"


@pytest.mark.parametrize(
    ("answers", "status"), [([error(503, "X")], 503), ([httpx2.ConnectError("no")], 0)]
)
def test_retries_are_limited_and_errors_hide_secrets(pauses, answers, status):
    client, transport = scripted_client(inference=answers)
    with pytest.raises(ApiUnavailableError) as caught:
        client.submit("a", "b.safetensors", hf_token="hf_secret")
    assert caught.value.status == status
    assert len(transport.requests) == 4
    assert KEY not in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert json.loads(transport.requests[0].content)["hf_token"] == "hf_secret"


def test_refused_requests_are_not_retried(pauses):
    client, transport = scripted_client(inference=[error(400, "LORA_NOT_FOUND")])
    with pytest.raises(ApiError) as caught:
        client.submit("a", "b.safetensors", idempotency_key="mine")
    assert caught.value.details == {"a": 1}
    assert [request.headers["idempotency-key"] for request in transport.requests] == ["mine"]
    assert pauses == []


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(502, text="<html>"),
        httpx2.Response(500),
        httpx2.Response(400, json={"detail": {"error": 1}}),
    ],
)
def test_an_error_without_a_body_raises(pauses, answer):
    client, _ = scripted_client(status=[answer])
    with pytest.raises(ApiError, match="without an error body"):
        client.status("r1")


@pytest.mark.parametrize(
    "answer", [httpx2.Response(200, text="<html>hello"), httpx2.Response(200, json={"a": 1})]
)
def test_a_response_of_another_api_raises(answer):
    client, _ = scripted_client(status=[answer])
    with pytest.raises(ApiError, match="check base_url"):
        client.status("r1")


def test_a_broken_stream_is_resumed_after_the_last_event(pauses):
    running = STATUS | {"status": "in_progress"}
    client, transport = scripted_client(
        events=[
            event(1, STATUS) + event(4, running) + "data: {BREAK",
            httpx2.ConnectError("no"),
            ": ping\n\n" + event(9, DONE),
        ],
        result=[RESULT],
    )
    seen: list[Any] = []
    client.wait("r1", on_progress=seen.append)
    assert [status.status.value for status in seen] == ["in_queue", "in_progress", "succeeded"]
    streams = [request for request in transport.requests if request.url.path.endswith("events")]
    assert [request.headers.get("last-event-id") for request in streams] == [None, "4", "4"]


@pytest.mark.parametrize("answer", [httpx2.ConnectError("no"), "BREAK", ": ping\n\n"])
def test_a_stream_that_always_breaks_ends_the_wait(pauses, answer):
    client, transport = scripted_client(events=[answer])
    with pytest.raises(ApiUnavailableError, match="GET /v1/requests/r1/events"):
        client.wait("r1")
    assert len(transport.requests) == 4


def test_a_server_without_events_is_polled(pauses):
    client, transport = scripted_client(
        status=[STATUS, STATUS, STATUS | {"status": "in_progress"}, DONE], result=[RESULT]
    )
    seen: list[Any] = []
    result = client.wait("r1", on_progress=seen.append)
    assert [status.status.value for status in seen] == ["in_queue", "in_progress", "succeeded"]
    assert result.outputs is not None
    assert len(pauses) == 3
    assert [request.url.path.rsplit("/")[-1] for request in transport.requests] == [
        "events",
        *["status"] * 4,
        "result",
    ]


def test_leaving_the_iteration_closes_the_stream(monkeypatch):
    closed: list[bool] = []
    stream = event(1, STATUS) + event(2, DONE)

    class Body(httpx2.SyncByteStream, httpx2.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield stream.encode()

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield stream.encode()

        def close(self) -> None:
            closed.append(True)

        async def aclose(self) -> None:
            closed.append(True)

    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, stream=Body()))
    events: Any = Client("http://x", transport=transport).events("r1")
    assert next(events).status is Status.IN_QUEUE
    assert closed == []
    events.close()
    assert closed == [True]

    async def run() -> None:
        events: Any = AsyncClient("http://x", transport=transport).events("r1")
        assert (await anext(events)).status is Status.IN_QUEUE
        await events.aclose()
        assert closed == [True, True]

    asyncio.run(run())


@pytest.mark.parametrize("error", [None, httpx2.ConnectError("no")])
def test_upload_is_sent_once_and_closes_the_file(monkeypatch, pauses, error):
    opened: list[IO[Any]] = []
    original = Path.open

    def recording_open(self: Path, *args: Any) -> IO[Any]:
        opened.append(original(self, *args))
        return opened[-1]

    monkeypatch.setattr(Path, "open", recording_open)
    client, transport = scripted_client(loras=[error])
    with pytest.raises(ApiError, match="POST /v1/loras" if error else "without an error body"):
        client.upload_lora(LOKR)
    assert len(transport.requests) == 1
    assert transport.requests[0].extensions["timeout"]["read"] is None
    assert [file.closed for file in opened] == [True]


def test_a_timeout_error_of_a_callback_cancels_but_others_do_not(pauses):
    client, transport = scripted_client(events=[event(1, STATUS)], r1=[STATUS])

    def callback(error: Exception) -> Callable[[Any], None]:
        def raise_error(status: Any) -> None:
            raise error

        return raise_error

    with pytest.raises(ApiError, match="from the callback"):
        client.wait("r1", on_progress=callback(ApiError("from the callback", status=404)))
    assert [request.method for request in transport.requests] == ["GET"]
    with pytest.raises(ClientTimeoutError, match="from the callback"):
        client.wait(
            "r1",
            on_progress=callback(ClientTimeoutError("from the callback")),
            cancel_on_timeout=True,
        )
    assert [request.method for request in transport.requests] == ["GET", "GET", "DELETE"]


@pytest.mark.parametrize(
    ("image", "request_id", "content", "words"),
    [
        ({}, "r1", b"y", "damaged"),
        ({"format": "../x"}, "r1", b"x", "format that is not valid"),
        ({}, "../r1", b"x", "format that is not valid"),
    ],
)
def test_save_images_checks_content_and_names(tmp_path, image, request_id, content, words):
    body = RESULT | {"request_id": request_id, "outputs": {"images": [IMAGE | image], "videos": []}}
    client, _ = scripted_client(result=[body], **{"0": [httpx2.Response(200, content=content)]})
    with pytest.raises(OutputError, match=words):
        client.save_images(client.result("r1"), tmp_path / "out")
    assert list(tmp_path.rglob("*.*")) == []


def test_async_client_retries_polls_and_resumes(monkeypatch):
    taken: list[float] = []

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr("fidelora.client.aio.asyncio.sleep", sleep)

    async def run() -> None:
        polled = ScriptedTransport(
            inference=[error(429, "QUEUE_FULL", Retry_After="7"), ACCEPTED],
            status=[STATUS, DONE],
            result=[RESULT],
        )
        async with AsyncClient("http://x", transport=polled) as client:
            assert (await client.generate("a", "b.safetensors")).request_id == "r1"
        assert taken == [7, 0.01]
        async with AsyncClient(
            "http://x", transport=ScriptedTransport(events=[httpx2.ConnectError("no")])
        ) as client:
            with pytest.raises(ApiUnavailableError):
                await client.wait("r1")
        async with AsyncClient(
            "http://x",
            transport=ScriptedTransport(events=[event(1, STATUS), event(2, DONE)], result=[RESULT]),
        ) as client:
            assert (await client.wait("r1")).status is Status.SUCCEEDED
        async with AsyncClient(
            "http://x", transport=ScriptedTransport(ready=[httpx2.ConnectError("no")])
        ) as client:
            assert not await client.ready()

    asyncio.run(run())


def printed(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50
    ).stdout.strip()


def test_the_client_does_not_import_torch():
    heavy = {"torch", "numpy", "fastapi", "sqlalchemy"}
    code = f"import sys, fidelora; fidelora.Client; print({heavy} & sys.modules.keys())"
    assert printed(code) == "set()"


def test_the_server_imports_torch_only_when_it_starts():
    assert printed("import sys, fidelora.server.run; print('torch' in sys.modules)") == "False"


def test_import_error_names_the_extra_to_install():
    code = """
import sys
sys.modules["httpx2"] = None
import fidelora
try:
    fidelora.Client
except ImportError as error:
    print(error)
"""
    assert "pip install '.[client]'" in printed(code)
