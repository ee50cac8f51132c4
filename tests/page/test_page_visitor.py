"""The page's event handlers act for the API key of the visitor."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import gradio as gr
import pytest
from starlette.requests import Request
from starlette.testclient import TestClient
from tests.server.http_support import ManualWorker, context_in, now
from tests.support import LORA

from fidelora.errors import JobNotFoundError
from fidelora.jobs.job import Status, new_job
from fidelora.recipe import Recipe
from fidelora.server import job_watcher
from fidelora.server.access import ANONYMOUS, UNRESTRICTED, Caller
from fidelora.server.app import make_app
from fidelora.server.page.blocks import gradio_app
from fidelora.server.page.handlers import for_visitor
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.pictures import PageFiles, Pictures
from fidelora.server.page.request_queue import RequestQueue, Session
from fidelora.server.page.session_keys import SessionKeys
from fidelora.server.page.uploads import add_lora
from fidelora.server.page.visitor import acting_for, visitor
from fidelora.server.verifier import Verifier

ALICE, BOB = Caller("a" * 16, is_admin=False), Caller("b" * 16, is_admin=False)
ADMIN = Caller("c" * 16, is_admin=True)


@pytest.fixture
def context(tmp_path):
    return context_in(tmp_path)


def request_of(caller: Caller | None) -> gr.Request:
    scope: dict[str, object] = {"type": "http", "headers": [], "fidelora_caller": caller}
    return gr.Request(Request(scope))


class Handlers:
    def call(self, value: str) -> tuple[str, Caller]:
        return value, visitor()

    async def wait(self, value: str) -> tuple[str, Caller]:
        return value, visitor()

    async def stream(self, value: str):
        for step in range(2):
            yield value + str(step), visitor()

    def select(self, event: gr.SelectData, value: str) -> Caller:
        return visitor()


def test_a_handler_runs_for_the_visitor_of_its_event():
    handlers = Handlers()
    assert for_visitor(handlers.call)(request_of(ALICE), "x") == ("x", ALICE)

    async def run():
        assert await for_visitor(handlers.wait)(request_of(BOB), "x") == ("x", BOB)
        streams = [for_visitor(handlers.stream)(request_of(one), "x") for one in (ALICE, BOB)]
        steps = [await anext(stream) for stream in streams * 2]
        assert visitor() == ANONYMOUS  # also between two steps
        assert steps == [("x0", ALICE), ("x0", BOB), ("x1", ALICE), ("x1", BOB)]
        assert [step async for step in streams[0]] == []

    asyncio.run(run())
    assert visitor() == ANONYMOUS


def test_gradio_finds_the_request_and_the_event_data():
    from gradio.helpers import special_args

    request = request_of(ALICE)
    for name in ("call", "wait", "stream"):
        values, *_ = special_args(for_visitor(getattr(Handlers(), name)), ["x"], request)
        assert values == [request, "x"]
    data = SimpleNamespace(target=None, _data={"index": 0, "value": ""})
    values, _, index, _ = special_args(for_visitor(Handlers().select), ["x"], request, data)
    assert index == 1
    assert values[0] is request
    assert isinstance(values[1], gr.SelectData)


def test_a_caller_claimed_in_a_request_body_is_ignored():
    claimed = gr.Request(scope={"fidelora_caller": ADMIN})
    assert for_visitor(Handlers().call)(claimed, "x") == ("x", ANONYMOUS)
    assert for_visitor(Handlers().call)(request_of(None), "x") == ("x", ANONYMOUS)


def test_every_handler_that_uses_the_store_or_loras_is_for_a_visitor(context, tmp_path):
    """The handlers listed here use neither the store nor LoRAs.

    Wrap a new handler with `for_visitor`, or add its name to the list.
    """
    page_files = PageFiles(tmp_path / "page")
    page_files.empty()
    app, _, _ = gradio_app(context, page_files, Verifier("cpu", 60, {}), "")
    blocks = next(route.app.blocks for route in app.routes if hasattr(route, "app"))
    without = {
        function.fn.__name__
        for function in blocks.fns.values()
        if function.fn and not inspect.signature(function.fn).parameters.get("request")
    }
    assert without == {
        "<lambda>",  # an empty seed
        "_apply_preset",
        "_cancel",  # of a verification or explanation
        "_explain",
        "_refresh_runs",
        "_store",  # of the form, in the browser
        "_update",  # of the banner
        "_use_prompt",
        "_verify",
        "_preset_of",
        "update_model",
    }


def owned(context, caller: Caller):
    return context.store.add(new_job((Recipe(prompt="a"),), now(), owner=caller.owner))


def test_the_queue_follows_and_cancels_only_the_visitors_requests(context, monkeypatch):
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.002)
    queue, job = RequestQueue(context.store, context.watcher), owned(context, ALICE)

    async def follow(caller: Caller) -> list[str]:
        with acting_for(caller):
            session, texts = Session(pending=[job.id]), []
            async for update in queue.follow(session):
                texts.append(update.progress + update.waiting)
                queue.cancel_all(session)
            return texts

    with acting_for(BOB):
        for cancel in (queue.cancel, queue.cancel_all):
            cancel(Session(pending=[job.id]))
    assert asyncio.run(follow(BOB)) == [""]
    assert context.store.get(job.id).status is Status.IN_QUEUE
    assert "Next in the queue" in asyncio.run(follow(ALICE))[0]
    assert context.store.get(job.id).status is Status.CANCELED


def test_pictures_are_those_of_the_visitors_requests(context, tmp_path):
    job = owned(context, ALICE)
    ManualWorker(context).succeed(ManualWorker(context).claim())
    page_files = PageFiles(tmp_path / "page")
    page_files.empty()
    pictures = Pictures(context, page_files, LoraList(context))
    for caller, count in ((BOB, 0), (ANONYMOUS, 0), (ALICE, 1), (ADMIN, 1), (UNRESTRICTED, 1)):
        with acting_for(caller):
            assert len(pictures.gallery([(job.id, 0)])[0]) == count
            if not count:
                with pytest.raises(JobNotFoundError):
                    pictures.recipe((job.id, 0))


def test_the_list_of_loras_has_only_the_visitors_uploads(context, tmp_path):
    file = tmp_path / "dropped.safetensors"
    file.write_bytes(LORA.read_bytes())
    with acting_for(ALICE):
        path = add_lora(context, file)
    loras = LoraList(context)
    for caller, sees in ((ALICE, True), (ADMIN, True), (BOB, False), (ANONYMOUS, False)):
        with acting_for(caller):
            assert (path in [one for _, one in loras.choices()]) is sees
            assert (loras.summary(path) is not None) is sees


def test_a_session_belongs_to_the_first_key_that_uses_it():
    sessions = SessionKeys()
    assert sessions.allows("one", ALICE)
    assert not sessions.allows("one", BOB)
    assert not sessions.allows("one", ADMIN)
    assert sessions.allows("one", ALICE)
    assert sessions.allows("", BOB)
    assert sessions.allows(None, BOB)
    for number in range(10_001):
        sessions.allows(str(number), BOB)
    assert sessions.allows("one", BOB)  # dropped, so that the number is bounded


def test_the_page_refuses_files_and_sessions_of_another_key(context):
    keys = {name: context.keys.add(name) for name in ("alice", "bob")}
    app = make_app(context, with_page=True)
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)) as client:
        headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
        alice = context.keys.find(keys["alice"])
        job = owned(context, Caller(alice.id, is_admin=False))
        ManualWorker(context).succeed(ManualWorker(context).claim())
        files = PageFiles(context.settings.data_dir.absolute() / "page")
        pictures = Pictures(context, files, LoraList(context))
        with acting_for(UNRESTRICTED):
            ((file, _),) = pictures.gallery([(job.id, 0)])[1]
        url = f"/gradio_api/file={file}"
        assert client.get(url, headers=headers["bob"]).status_code == 404
        assert client.get(url, headers=headers["alice"]).status_code == 200
        assert client.get(url, headers=headers["alice"]).content == b"an image"
        event = {"session_hash": "of-alice", "fn_index": 0, "data": [{"path": file}]}
        join = "/gradio_api/queue/join"
        foreign = client.post(join, json=event | {"session_hash": "x"}, headers=headers["bob"])
        assert foreign.status_code == 404
        own = client.post(join, json=event | {"data": []}, headers=headers["alice"])
        assert own.status_code != 404
        for path in (
            "/gradio_api/queue/data?session_hash=of-alice",
            "/gradio_api/heartbeat/of-alice",
        ):
            assert client.get(path, headers=headers["bob"]).status_code == 404
        event = {"session_hash": "of-alice", "event_id": "x", "fn_index": 0}
        answer = client.post("/gradio_api/cancel", json=event, headers=headers["bob"])
        assert answer.status_code == 404
