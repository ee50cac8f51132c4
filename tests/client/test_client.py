"""The client, against the real application and against servers that misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from tests.server.http_support import ByHand, context_in, listening, now
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
    WrongUseError,
)
from fidelora.jobs.job import Status
from fidelora.server.context import ServerContext

KEY = "fl_secret"


@pytest.fixture
def context(tmp_path) -> ServerContext:
    return context_in(tmp_path)


@pytest.fixture
def worker(context) -> ByHand:
    return ByHand(context)


@pytest.fixture
def url(context):
    with listening(context) as found:
        yield found


@pytest.fixture
def client(url):
    with Client(url) as made:
        yield made


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(calls, "POLL_S", 0.01)


def in_background(action: Callable[[], Any]) -> None:
    threading.Timer(0.2, action).start()


def finish(worker: ByHand, context: ServerContext, content: bytes = b"an image") -> None:
    job = worker.claim()
    worker.step(job, 5)
    worker.succeed(job, content)


# --- against the real application --------------------------------------------------------------------------------------


def test_from_a_prompt_to_its_file(client, context, worker, tmp_path):
    in_background(lambda: finish(worker, context))
    seen: list[Any] = []
    result = client.generate(
        "[trigger] on grass",
        ("sks.safetensors", 0.8),
        trigger_word="sks",
        seed=7,
        width=512,
        on_progress=seen.append,
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


def test_several_prompts_and_loras_in_every_form(client, context):
    (context.settings.loras / "b.safetensors").write_bytes(LOKR.read_bytes())
    accepted = client.submit(
        ["a", {"prompt": "b", "seed": 3, "sample_steps": 9}],
        ["sks.safetensors", {"path": "b.safetensors", "network_multiplier": -1}],
        sample_steps=5,
        output_format="webp",
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
        ({"width": 3}, "width"),
        ({"wdth": 512}, "wdth"),
        ({"output_format": "gif"}, "output_format"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_mistake_costs_no_call(fields, words):
    with Client("http://127.0.0.1:1") as nowhere, pytest.raises(WrongUseError, match=words):
        nowhere.submit("a", "sks.safetensors", **fields)


def test_what_the_server_refuses_is_an_error_with_its_code(client):
    with pytest.raises(ApiError, match=r"none\.safetensors") as caught:
        client.submit("a", "none.safetensors")
    assert (caught.value.status, caught.value.code) == (400, "LORA_NOT_FOUND")
    with pytest.raises(ApiError, match=r"prompts.0.sampler: There is no sampler") as caught:
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
            call("nobody")
        assert (caught.value.status, caught.value.code) == (404, "REQUEST_NOT_FOUND")


def test_a_request_that_fails_or_is_canceled(client, worker, context):
    in_background(lambda: worker.fail(worker.claim()))
    with pytest.raises(RequestFailedError, match="NaN") as failed:
        client.generate("a", "sks.safetensors")
    assert failed.value.code == "NUMERICS"
    accepted = client.submit("a", "sks.safetensors")
    client.cancel(accepted.request_id)
    assert client.wait(accepted.request_id).status is Status.CANCELED
    with pytest.raises(WrongUseError, match="no images"):
        client.save_images(client.result(accepted.request_id), "out")

    def cancel_all() -> None:
        for job in context.store.list(status=Status.IN_QUEUE).jobs:
            context.store.cancel(job.id, now())

    in_background(cancel_all)
    with pytest.raises(RequestCanceledError):
        client.generate("a", "sks.safetensors")


def test_who_waits_too_long_hears_how_far_it_is(client, worker, context):
    accepted = client.submit("a", "sks.safetensors")
    worker.step(worker.claim(), 5)
    with pytest.raises(ClientTimeoutError, match="it is in_progress, 20% done"):
        client.wait(accepted.request_id, timeout_s=0.3)
    assert not context.store.get(accepted.request_id).cancel_requested
    with pytest.raises(ClientTimeoutError):
        client.wait(accepted.request_id, timeout_s=0.3, cancel_on_timeout=True)
    assert context.store.get(accepted.request_id).cancel_requested


def test_requests_and_loras_are_listed_over_all_pages(client, context, monkeypatch):
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
    with pytest.raises(ApiError, match="no uploaded LoRA"):
        client.delete_lora(uploaded.path)
    assert [model.id for model in client.models()] == ["sd15", "sdxl"]
    assert client.ready()


def test_a_key_is_sent_and_never_shown(url, context):
    key = context.keys.add("me")
    with Client(url) as without, pytest.raises(ApiError, match="API key") as caught:
        without.models()
    assert caught.value.status == 401
    with Client(url, api_key=key) as client:
        assert client.models()
        assert key not in repr(client) + repr(vars(client))


def test_the_asynchronous_client_does_the_same(url, context, worker, tmp_path):
    async def run() -> None:
        async with AsyncClient(url) as client:
            in_background(lambda: finish(worker, context))
            seen: list[Any] = []
            result = await client.generate("a", "sks.safetensors", on_progress=seen.append)
            assert seen[-1].status is Status.SUCCEEDED
            (path,) = await client.save_images(result, tmp_path / "out")
            assert path.read_bytes() == b"an image"
            assert [status.request_id async for status in client.requests()] == [result.request_id]
            assert [lora.path async for lora in client.loras()] == ["sks.safetensors"]
            assert (await client.upload_lora(LOKR)).uploaded
            await client.delete_lora(LOKR.name)
            assert [model.id for model in await client.models()] == ["sd15", "sdxl"]
            assert await client.ready()
            with pytest.raises(ApiError, match=r"none\.safetensors"):
                await client.submit("a", "none.safetensors")
            accepted = await client.submit("a", "sks.safetensors")
            with pytest.raises(ClientTimeoutError):
                await client.wait(accepted.request_id, timeout_s=0.2, cancel_on_timeout=True)
            assert (await client.status(accepted.request_id)).status is Status.CANCELED

    asyncio.run(run())


def test_both_clients_have_the_same_methods():
    def faces(kind: type) -> dict[str, list[str]]:
        methods = {
            name: method
            for name, method in vars(kind).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }
        return {
            name: [str(one) for one in inspect.signature(method).parameters.values()]
            for name, method in methods.items()
        }

    assert faces(Client) == faces(AsyncClient)


# --- against servers that misbehave ------------------------------------------------------------------------------------

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
    "request_id": "r1", "status": "succeeded", "outputs": {"images": [IMAGE], "videos": []}, "error": None,
    "created_at": "2026-11-22T12:00:00Z", "finished_at": None, "metadata": None,
}  # fmt: skip
ACCEPTED = {
    "request_id": "r1",
    "status": "queued",
    "status_url": "u",
    "result_url": "u",
    "created_at": "2026-11-22T12:00:00Z",
}


class Odd(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A server that answers from a script: for each path a list, the last of which stays."""

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


def odd(**script: list[Any]) -> tuple[Client, Odd]:
    transport = Odd(**script)
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


def test_a_busy_server_is_asked_again_under_the_same_key(pauses):
    client, transport = odd(
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
def test_but_not_for_ever(pauses, answers, status):
    client, transport = odd(inference=answers)
    with pytest.raises(ApiUnavailableError) as caught:
        client.submit("a", "b.safetensors", hf_token="hf_secret")
    assert caught.value.status == status
    assert len(transport.requests) == 4
    assert KEY not in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert json.loads(transport.requests[0].content)["hf_token"] == "hf_secret"


def test_what_is_refused_is_not_sent_again(pauses):
    client, transport = odd(inference=[error(400, "LORA_NOT_FOUND")])
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
def test_an_answer_that_says_nothing_is_an_error_all_the_same(pauses, answer):
    client, _ = odd(status=[answer])
    with pytest.raises(ApiError, match="nothing more"):
        client.status("r1")


@pytest.mark.parametrize(
    "answer", [httpx2.Response(200, text="<html>hello"), httpx2.Response(200, json={"a": 1})]
)
def test_an_answer_of_something_else_is_an_error(answer):
    client, _ = odd(status=[answer])
    with pytest.raises(ApiError, match="is the address right"):
        client.status("r1")


def test_a_stream_that_breaks_is_taken_up_where_it_broke(pauses):
    running = STATUS | {"status": "in_progress"}
    client, transport = odd(
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
def test_a_stream_that_never_comes_ends_the_wait(pauses, answer):
    client, transport = odd(events=[answer])
    with pytest.raises(ApiUnavailableError, match="GET /v1/requests/r1/events"):
        client.wait("r1")
    assert len(transport.requests) == 4


def test_a_server_without_events_is_polled(pauses):
    client, transport = odd(
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


@pytest.mark.parametrize(
    ("image", "request_id", "content", "words"),
    [
        ({}, "r1", b"y", "damaged"),
        ({"format": "../x"}, "r1", b"x", "format that is none"),
        ({}, "../r1", b"x", "format that is none"),
    ],
)
def test_files_are_what_was_made_and_where_they_were_wanted(
    tmp_path, image, request_id, content, words
):
    body = RESULT | {"request_id": request_id, "outputs": {"images": [IMAGE | image], "videos": []}}
    client, _ = odd(result=[body], **{"0": [httpx2.Response(200, content=content)]})
    with pytest.raises(OutputError, match=words):
        client.save_images(client.result("r1"), tmp_path / "out")
    assert list(tmp_path.rglob("*.*")) == []


def test_the_asynchronous_client_and_servers_that_misbehave(monkeypatch):
    taken: list[float] = []

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr("fidelora.client.aio.asyncio.sleep", sleep)

    async def run() -> None:
        polled = Odd(
            inference=[error(429, "QUEUE_FULL", Retry_After="7"), ACCEPTED],
            status=[STATUS, DONE],
            result=[RESULT],
        )
        async with AsyncClient("http://x", transport=polled) as client:
            assert (await client.generate("a", "b.safetensors")).request_id == "r1"
        assert taken == [7, 0.01]
        async with AsyncClient(
            "http://x", transport=Odd(events=[httpx2.ConnectError("no")])
        ) as client:
            with pytest.raises(ApiUnavailableError):
                await client.wait("r1")
        async with AsyncClient(
            "http://x", transport=Odd(events=[event(1, STATUS), event(2, DONE)], result=[RESULT])
        ) as client:
            assert (await client.wait("r1")).status is Status.SUCCEEDED
        async with AsyncClient(
            "http://x", transport=Odd(ready=[httpx2.ConnectError("no")])
        ) as client:
            assert not await client.ready()

    asyncio.run(run())


def printed(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_client_needs_no_torch():
    heavy = "('torch', 'numpy', 'fastapi', 'sqlalchemy')"
    assert (
        printed(
            f"import sys, fidelora; fidelora.Client; print([name for name in {heavy} if name in sys.modules])"
        )
        == "[]"
    )


def test_a_server_needs_no_torch_until_it_starts():
    assert printed("import sys, fidelora.server.run; print('torch' in sys.modules)") == "False"


def test_without_its_packages_the_client_says_what_to_install():
    code = """
import sys
sys.modules["httpx2"] = None
import fidelora
try:
    fidelora.Client
except ImportError as error:
    print(error)
"""
    assert "pip install 'fidelora[client]'" in printed(code)
