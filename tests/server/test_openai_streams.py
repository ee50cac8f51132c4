"""Calls of OpenAI's API that wait: partial images, keepalives, disconnects, stopping servers."""

from __future__ import annotations

import base64
import io

import httpx2
import openai
import pytest
from PIL import Image
from tests.server.http_support import (
    in_thread,
    now,
    only_job,
    pixels,
)
from tests.server.serve_support import until

from fidelora.jobs.job import JobProgress, Status, new_job
from fidelora.recipe import Recipe
from fidelora.server.routes.openai import _PreviewSelector

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def context_settings():
    return {"queue_size": 2, "model_aliases": "dall-e-3=sd15, gpt-image-1 = sdxl"}


@pytest.fixture
def client(openai_client):
    return openai_client


def preview(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_a_disconnected_client_cancels_its_job(client, context, worker, stream, running):
    with httpx2.Client() as other:
        body = {"prompt": "a ball", "stream": stream}
        call = other.build_request(
            "POST", f"{client.base_url}images/generations", json=body, timeout=2 if running else 0.3
        )
        sent = in_thread(lambda: other.send(call, stream=stream))
        job = only_job(context)
        if running:
            worker.step(worker.claim(), 3)
        if stream:
            sent.result(30).close()
        else:
            with pytest.raises(httpx2.ReadTimeout):
                sent.result(30)
    if running:
        assert until(lambda: context.store.get(job.id).cancel_requested, 20)
    else:
        assert until(lambda: context.store.get(job.id).status is Status.CANCELED, 20)


def test_partial_images_are_in_order_and_limited(client, context, worker):
    with client.images.generate(
        prompt="a ball",
        n=2,
        stream=True,
        partial_images=2,
        output_format="webp",
        extra_body={"steps": 12},
    ) as stream:
        job = until(lambda: worker.claim_one(), 20)
        events = iter(stream)

        def show(image: int, step: int, colour: str) -> None:
            context.store.renew(
                job.id,
                job.epoch,
                JobProgress(image, 2, step, 12, 1.0, preview(colour)),
                job.created_at,
                1e9,
            )

        seen = []
        for image in (0, 1):
            show(image, 2, "red")  # too early
            for step, colour in ((4, "green"), (8, "blue")):
                show(image, step, colour)
                seen.append(next(events))
            show(image, 12, "white")  # one too many
        worker.succeed(job, image_format="webp")
        rest = list(events)
    assert {event.type for event in seen} == {"image_generation.partial_image"}
    assert [event.partial_image_index for event in seen] == [0, 1, 0, 1]
    colours = [tuple(pixels(base64.b64decode(event.b64_json))[0, 0] > 90) for event in seen]
    assert colours == [(False, True, False), (False, False, True)] * 2
    assert {(event.output_format, event.size) for event in seen} == {("webp", "512x512")}
    assert [event.type for event in rest] == ["image_generation.completed"] * 2
    assert [base64.b64decode(event.b64_json) for event in rest] == [b"an image"] * 2


@pytest.mark.parametrize(("most", "sent"), [(0, []), (1, [6]), (3, [3, 6, 9])])
def test_partial_images_are_spread_over_the_steps(context, worker, most, sent):
    context.store.add(new_job((Recipe(prompt="a ball", steps=12),), now()))
    job, selector, found = worker.claim(), _PreviewSelector(most), []
    for step in range(1, 13):  # the preview of the last step is not sent: the image follows
        changed = worker.step(job, step, 12, preview(f"hsl({step}, 50%, 50%)"))
        found += [step for _ in range(2) if selector.event(changed) is not None]
    assert found == sent


def test_an_idle_stream_sends_keepalive_comments(client, context, worker, monkeypatch):
    from fidelora.server.routes import openai as routes

    monkeypatch.setattr(routes, "_KEEPALIVE_INTERVAL_S", 0.0)
    body = {"prompt": "a ball", "stream": True}
    with httpx2.stream("POST", f"{client.base_url}images/generations", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": making images"
        assert answer.headers["content-type"].startswith("text/event-stream")
        only_job(context)
        worker.succeed(worker.claim())
        assert "event: image_generation.completed" in list(lines)


def test_a_stopping_server_answers_waiting_clients(client, context):
    waiting = in_thread(lambda: client.images.generate(prompt="a ball"))
    job = only_job(context)
    context.stopping.set()
    with pytest.raises(openai.InternalServerError) as caught:
        waiting.result(30)
    assert caught.value.code == "SERVER_STOPPING"
    assert context.store.get(job.id).status is Status.CANCELED
