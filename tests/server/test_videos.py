"""Videos over HTTP: formats, results, limits, and a worker that is killed while it makes one."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.faults.test_kills import is_gone, workers_of
from tests.server.serve_support import Server, until
from tests.support import TINY_WAN21, WAN21_LORA

from fidelora import AdapterRef, Client, Engine, Recipe
from fidelora.api import InferenceRequest, check_request, output_format_of, recipes_of, request_for
from fidelora.api.openai import ImagesRequest
from fidelora.client.calls import outputs_of
from fidelora.errors import RequestError, RequestFieldError
from fidelora.images import mp4
from fidelora.images.read import read_origin
from fidelora.recipe_fields import MAX_FRAMES
from fidelora.training.compare import compare, decoded_frames, reencode

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="PyAV (the extra `video`) is not installed"
)
LORA = AdapterRef.from_file(WAN21_LORA)


def body_of(*prompts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    small = {"prompt": "a ball", "width": 64, "height": 64, "sample_steps": 2}
    return {
        "model": "wan21_1b",
        "loras": [{"path": "wan.safetensors"}],
        "prompts": [small | prompt for prompt in prompts or ({},)],
    } | fields


def recipes_for(body: dict[str, Any]) -> tuple[Recipe, ...]:
    request = InferenceRequest.model_validate(body)
    check_request(request)
    return recipes_of(request, (LORA,) * len(request.loras), {}, lambda: 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("videos")
    (data / "loras").mkdir()
    shutil.copyfile(WAN21_LORA, data / "loras" / "wan.safetensors")
    made = Server(data, f"wan21_1b={TINY_WAN21}")
    yield made
    made.close()


def frames_of(body: Any) -> Any:
    """Return the frames that a request's recipe gives without a server."""
    recipe = Recipe.from_dict(body["recipe"])
    recipe = replace(recipe, base_model=str(TINY_WAN21), adapters=(LORA,))
    return Engine(device="cpu").generate(recipe).all_pixels


def content_at(url: str, server: Server) -> tuple[bytes, str]:
    path = "/v1/" + url.partition("/v1/")[2]
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return answer.read(), answer.headers["content-type"]


# --- requests -----------------------------------------------------------------------------------


def test_the_documented_defaults_are_used():
    (recipe,) = recipes_for(body_of())
    assert (recipe.frames, recipe.fps) == (41, 16)
    (recipe,) = recipes_for(body_of({"num_frames": 10, "fps": 24}))
    assert (recipe.frames, recipe.fps) == (9, 24)
    again = request_for([recipe], ["wan.safetensors"])["prompts"][0]
    assert (again["num_frames"], again["fps"]) == (9, 24)


def test_rounded_frames_are_in_range():
    (recipe,) = recipes_for(body_of({"num_frames": MAX_FRAMES - 1}))
    assert recipe.frames == MAX_FRAMES
    assert Recipe.from_dict(recipe.to_dict()).frames == MAX_FRAMES


@pytest.mark.parametrize("frames", [0, MAX_FRAMES + 1])
def test_frames_out_of_range_are_refused(frames):
    with pytest.raises(ValueError, match="num_frames"):
        InferenceRequest.model_validate(body_of({"num_frames": frames}))


@pytest.mark.parametrize(
    ("frames", "requested", "expected"),
    [
        ((1,), None, "png"),
        ((1, 9), None, "webp"),
        ((9,), "webp", "webp"),
        ((1,), "jpeg", "jpeg"),
        ((9,), "png", "A video of 9 frames cannot be a png file"),
        ((1, 9), "mp4", "A still image cannot be an mp4 file"),
    ],
)
def test_the_format_fits_images_and_videos(frames, requested, expected):
    recipes = recipes_for(body_of(*({"num_frames": one} for one in frames)))
    if " " not in expected:
        assert output_format_of(requested, recipes) == expected
        return
    with pytest.raises(RequestFieldError, match=expected):
        output_format_of(requested, recipes)


def test_videos_without_pyav_need_webp(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipes = recipes_for(body_of())
    with pytest.raises(RequestFieldError, match="Set output_format to webp"):
        output_format_of(None, recipes)
    assert output_format_of("webp", recipes) == "webp"


def test_openais_api_makes_still_images():
    request = ImagesRequest.model_validate({"prompt": "a", "model": "wan21_1b", "num_frames": 9})
    with pytest.raises(RequestError, match="this API makes still images; request videos with"):
        request.to_inference()
    del request.model_extra["num_frames"]  # type: ignore[union-attr]
    (prompt,) = request.to_inference().prompts
    assert prompt.num_frames == 1


# --- results ------------------------------------------------------------------------------------


def test_a_request_can_return_images_and_videos(server, tmp_path):
    body = body_of({"num_frames": 1}, {"num_frames": 5, "fps": 8}, {"num_frames": 1, "seed": 5})
    request_id = server.ask(body)
    assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"
    outputs = server.call(f"/v1/requests/{request_id}/result")["outputs"]
    assert [image["seed"] for image in outputs["images"]] == [42, 5]
    (video,) = outputs["videos"]
    expected = {"format": "webp", "width": 64, "height": 64, "num_frames": 5, "fps": 8, "seed": 43}
    assert {name: video[name] for name in expected} == expected
    content, kind = content_at(video["url"], server)
    assert kind == "image/webp"
    with Image.open(io.BytesIO(content)) as image:
        local = reencode(frames_of(video), "WEBP", 8)
        assert compare(decoded_frames(image), local).identical
    with Client(server.url) as client:
        result = client.result(request_id)
        assert list(outputs_of(result)) == [0, 1, 2]
        paths = client.save_images(result, tmp_path)
    assert [path.name for path in paths] == [f"{request_id}_output_{n}.webp" for n in range(3)]
    assert paths[1].read_bytes() == content


@needs_av
def test_an_mp4_contains_its_recipe(server):
    request_id = server.ask(body_of({"num_frames": 5}))
    assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"
    outputs = server.call(f"/v1/requests/{request_id}/result")["outputs"]
    assert outputs["images"] == []
    (video,) = outputs["videos"]
    content, kind = content_at(video["url"], server)
    assert (video["format"], kind) == ("mp4", "video/mp4")
    origin = read_origin(content)
    assert origin.recipe is not None
    assert origin.recipe.to_dict() == video["recipe"]
    frames = np.stack(mp4.decode_mp4(content))
    assert frames.shape == (5, 64, 64, 3)
    assert compare(frames, frames_of(video)).mean_difference < 25
    with Client(server.url) as client:
        accepted = client.replay(content)
        result = client.wait(accepted.request_id)
    assert result.outputs is not None
    assert result.outputs.videos[0].sha256 == video["sha256"]


def test_a_video_larger_than_the_limit_is_refused(server):
    with pytest.raises(urllib.error.HTTPError) as failed:
        server.ask(body_of({"num_frames": 1000, "width": 4096}, output_format="webp"))
    assert b"FIDELORA_MAX_VIDEO_PIXELS" in failed.value.read()


LONG_VIDEO = {"width": 128, "height": 128, "num_frames": 17, "sample_steps": 100}


def test_a_worker_killed_in_the_middle_of_a_video_loses_nothing(server):
    server.ready()
    request_id = server.ask(body_of(LONG_VIDEO, output_format="webp"))

    def is_in_the_middle() -> bool:
        status = server.status(request_id)
        assert status["status"] != "succeeded", "the video is too short for this test"
        progress = status["progress"]
        return progress is not None and 0 < progress["step"] < progress["steps"]

    until(is_in_the_middle)
    (worker,) = workers_of(server)
    os.kill(worker, signal.SIGKILL)
    until(lambda: is_gone(worker))
    assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"
    (video,) = server.call(f"/v1/requests/{request_id}/result")["outputs"]["videos"]
    content, _ = content_at(video["url"], server)
    with Image.open(io.BytesIO(content)) as image:
        expected = reencode(frames_of(video), "WEBP", 16)
        assert compare(decoded_frames(image), expected).identical
    names = [path.name for path in Path(server.data, "outputs").glob(f"{request_id}*")]
    assert names == [f"{request_id}_output_0.webp"]
