"""`POST /v1/replay`: an image, its recipe or its parameters become a request for the same image."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.server.http_support import (
    MINIMAL,
    SERVER_DEFAULTS,
    ManualWorker,
    client_of,
    context_in,
    listening,
    pixels,
    png_with_parameters,
    settings_for,
)
from tests.server.serve_support import IMAGES_DEADLINE_S, Server
from tests.support import LORA, LORA_CONV, TINY_BASE

from fidelora import AsyncClient, Client
from fidelora.errors import ApiError, ImageRecordError
from fidelora.families import get_family
from fidelora.images.read import read_origin
from fidelora.images.write import GeneratedImage
from fidelora.jobs.job import Status
from fidelora.jobs.memory import MemoryStore
from fidelora.recipe import AdapterRef, Recipe
from fidelora.server.app import context_with_store
from fidelora.server.context import ServerContext
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles

SKS = AdapterRef.from_file(LORA, 0.5)
TINY_SHA256 = ContentHashes().sha256_of(BaseFiles.find(get_family("sd15"), str(TINY_BASE)))
RECIPE = Recipe(
    prompt="a <b>ball</b>",
    base_model="tiny",
    width=64,
    height=72,
    steps=3,
    seed=9,
    noise="modern",
    adapters=(SKS,),
)
ENVIRONMENT = {"fidelora": "0", "device": "cpu"}


def image_of(
    recipe: Recipe = RECIPE, image_format: Any = "png", quality: int | None = None
) -> bytes:
    return GeneratedImage(np.zeros((72, 64, 3), np.uint8), recipe, ENVIRONMENT).encode(
        image_format, quality
    )


@pytest.fixture
def context(tmp_path) -> ServerContext:
    return context_in(tmp_path, queue_size=2)


def send(client: Any, content: bytes, **fields: str) -> Any:
    return client.post("/v1/replay", files={"image": ("ball.png", content)}, data=fields)


def error(answer: Any) -> tuple[int, str, Any]:
    content = answer.json()["detail"]["error"]
    return answer.status_code, content["code"], content["details"]


@pytest.mark.parametrize(
    "value", [r'Hires: "\ud800"', r'Hashes: {"lora:\ud800": "0123456789"}', r'"\udfff": 1']
)
def test_parameters_with_lone_surrogates_are_cleaned(client, context, value):
    text = f"a ball\nSteps: 2, Sampler: Euler, Seed: 1, {value}"
    answer = client.post("/v1/replay", json={"parameters": text})
    assert answer.status_code == 200, answer.text
    assert len(context.store.list().jobs) == 1


# --- real images --------------------------------------------------------------------------------


def test_a_replayed_file_is_identical(tiny_server: Server, tmp_path):
    """Test each image format, with LoRAs named differently in the request and the recipe."""
    with Client(tiny_server.url) as client:
        for image_format in ("png", "jpeg", "webp"):
            made = client.generate(
                "a ball",
                [("sks.safetensors", 0.7), ("people/conv.safetensors", -0.5)],
                width=64,
                height=72,
                sample_steps=2,
                seed=5,
                sampler="euler_a",
                output_format=image_format,
                timeout_s=300,
            )
            (path,) = client.save_images(made, tmp_path)
            again = client.replay(path)
            assert (again.source, again.changes, again.ignored, again.warnings) == (
                "fidelora",
                [],
                [],
                [],
            )
            result = client.wait(again.request_id, timeout_s=300)
            assert result.status is Status.SUCCEEDED, result.error
            assert client.image(again.request_id, 0) == path.read_bytes()


def test_images_of_openai_and_a1111_clients_can_be_replayed(tiny_server: Server):
    extra = {
        "size": "64x64",
        "steps": 2,
        "loras": [{"path": "sks.safetensors"}],
        "output_format": "jpeg",
        "output_compression": 40,
    }
    ours = httpx2.post(
        f"{tiny_server.url}/v1/images/generations",
        json={"prompt": "a ball", "response_format": "url"} | extra,
        timeout=IMAGES_DEADLINE_S,
    ).json()
    theirs = tiny_server.call(
        "/sdapi/v1/txt2img",
        {
            "prompt": "a ball <lora:conv:0.5>",
            "steps": 2,
            "width": 64,
            "height": 64,
            "send_images": False,
        },
    )
    urls = [
        ours["data"][0]["url"],
        f"{tiny_server.url}/v1/requests/{json.loads(theirs['info'])['request_id']}/images/0",
    ]
    with Client(tiny_server.url) as client:
        for content in (httpx2.get(url, timeout=60).content for url in urls):
            again = client.replay(content)
            assert client.wait(again.request_id, timeout_s=300).status is Status.SUCCEEDED
            assert client.image(again.request_id, 0) == content


def test_another_programs_image_can_be_replayed(tiny_server: Server):
    text = (
        "a ball <lora:sks:0.5>\n"
        "Steps: 2, Sampler: Euler a, CFG scale: 4, Seed: 9, Size: 64x72, Clip skip: 2"
    )
    with Client(tiny_server.url) as client:
        again = client.replay(png_with_parameters(text))
        assert (again.source, [one.name for one in again.ignored]) == ("a1111", ["Clip skip"])
        assert client.wait(again.request_id, timeout_s=300).status is Status.SUCCEEDED
        content = client.image(again.request_id, 0)
    assert pixels(content).shape == (72, 64, 3)
    recipe = read_origin(content).recipe
    assert recipe is not None
    assert (recipe.sampler, recipe.seed, recipe.base_model) == ("euler_a", 9, TINY_BASE.name)


# --- jobs of Fidelora's images ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_format", "quality"), [("png", None), ("jpeg", None), ("jpeg", 70), ("webp", 20)]
)
def test_the_job_has_the_images_recipe_and_format(client, context, image_format, quality):
    answer = send(client, image_of(RECIPE, image_format, quality))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    job = context.store.get(body["request_id"])
    assert job.recipes == (RECIPE,)
    assert [ref.name for ref in job.recipes[0].adapters] == [LORA.stem]
    assert (job.image_format, job.image_quality) == (image_format, quality)
    assert context.cache.path(SKS.sha256).is_file(), (
        "the adapter is not in the cache, where workers look for its hash"
    )
    assert body["recipe"] == RECIPE.to_dict()
    assert body["status_url"].endswith(f"/v1/requests/{job.id}/status")


def test_a_recipe_can_be_sent_instead_of_an_image(client, context):
    answer = client.post("/v1/replay", json={"recipe": RECIPE.to_dict(), "output_format": "webp"})
    job = context.store.get(answer.json()["request_id"])
    assert (job.recipes, job.image_format) == ((RECIPE,), "webp")


def test_another_format_has_no_quality(client, context):
    answer = send(client, image_of(RECIPE, "jpeg", 70), output_format="png")
    job = context.store.get(answer.json()["request_id"])
    assert (job.image_format, job.image_quality) == ("png", None)


def test_everything_in_a_recipe_is_kept(client, context):
    live = replace(
        RECIPE,
        adapter_mode="live",
        noise="legacy",
        dtype="bfloat16",
        vae_dtype="float32",
        guidance_scale=50,
    )
    answer = send(client, image_of(live))
    assert context.store.get(answer.json()["request_id"]).recipes == (live,)


def test_changes_are_listed(client, context):
    live = replace(RECIPE, adapter_mode="live", base_model="/home/me/base", variant="fp16")
    answer = send(client, image_of(live), fidelity="fast", base_model="server")
    assert answer.json()["changes"] == [
        {"name": "base_model", "was": "base", "now": "tiny"},
        {"name": "variant", "was": "fp16", "now": ""},
        {"name": "fidelity", "was": "exact", "now": "fast"},
        {"name": "adapter_mode", "was": "live", "now": "merged"},
    ]
    (recipe,) = context.store.get(answer.json()["request_id"]).recipes
    assert (recipe.base_model, recipe.variant, recipe.fidelity, recipe.adapter_mode) == (
        "tiny",
        "",
        "fast",
        "merged",
    )


@pytest.mark.parametrize(
    "change",
    [{"base_model": "other/base"}, {"variant": "fp16"}, {"vae": "other/vae"}, {"config": "etc"}],
)
def test_another_base_model_is_rejected(client, context, change):
    status, code, details = error(send(client, image_of(replace(RECIPE, **change))))
    assert (status, code) == (400, "BASE_MODEL_DIFFERS")
    ((name, value),) = change.items()
    assert details == {
        "differs": {name: {"recipe": value, "server": "tiny" if name == "base_model" else ""}}
    }
    assert context.store.list().jobs == ()


@pytest.fixture
def local_client(tmp_path):
    """A client of a server whose base model is a folder."""
    defaults = SERVER_DEFAULTS | {"base_model": str(TINY_BASE)}
    context = context_with_store(
        MemoryStore(), settings_for(tmp_path), {"sd15": defaults}, "http://127.0.0.1:8000"
    )
    with client_of(context) as client:
        yield client, context


def test_a_job_has_the_hash_of_the_base_model_and_shows_no_path(local_client):
    client, context = local_client
    accepted = client.post("/v1/inference", json=MINIMAL).json()
    (recipe,) = context.store.get(accepted["request_id"]).recipes
    assert (recipe.base_model, recipe.base_sha256) == (str(TINY_BASE), TINY_SHA256)
    (model,) = client.get("/sdapi/v1/sd-models").json()
    assert model["filename"] == TINY_BASE.name


def test_the_same_base_model_at_another_place_is_no_difference(local_client):
    client, context = local_client
    moved = replace(RECIPE, base_model="/mnt/x", base_sha256=TINY_SHA256)
    body = send(client, image_of(moved)).json()
    assert body["changes"] == []
    assert str(TINY_BASE) not in json.dumps(body)
    (recipe,) = context.store.get(body["request_id"]).recipes
    assert (recipe.base_model, recipe.digest) == (str(TINY_BASE), moved.digest)


def test_another_base_model_of_the_same_name_is_rejected(local_client):
    client, context = local_client
    other = replace(RECIPE, base_model=f"/mnt/{TINY_BASE.name}", base_sha256="ab" * 32)
    answer = send(client, image_of(other))
    assert error(answer)[1:] == (
        "BASE_MODEL_DIFFERS",
        {"differs": {"base_sha256": {"recipe": "ab" * 32, "server": TINY_SHA256}}},
    )
    assert "sha256 abababababab" in answer.json()["detail"]["error"]["message"]
    assert str(TINY_BASE) not in answer.text
    accepted = send(client, image_of(other), base_model="server").json()
    assert accepted["changes"] == [
        {"name": "base_sha256", "was": "ab" * 32, "now": TINY_SHA256},
    ]
    (recipe,) = context.store.get(accepted["request_id"]).recipes
    assert recipe.base_sha256 == TINY_SHA256


def test_a_worker_compares_a_base_model_that_only_the_image_identifies(client, context):
    """The server has no hash of a base model on the hub; the worker computes it."""
    body = send(client, image_of(replace(RECIPE, base_sha256=TINY_SHA256))).json()
    (recipe,) = context.store.get(body["request_id"]).recipes
    assert (recipe.base_model, recipe.base_sha256) == ("tiny", TINY_SHA256)


def test_missing_adapters_are_named(client, context):
    gone = AdapterRef("ab" * 32, 1.0, name="gone")
    status, code, details = error(
        send(client, image_of(replace(RECIPE, adapters=(SKS, gone, AdapterRef("cd" * 32)))))
    )
    assert (status, code) == (400, "LORA_BYTES_MISSING")
    assert details == {
        "missing": [{"sha256": "ab" * 32, "name": "gone"}, {"sha256": "cd" * 32, "name": ""}]
    }
    assert context.store.list().jobs == ()


def test_adapters_are_found_by_content_and_in_the_cache(client, context):
    (context.settings.loras / "sks.safetensors").rename(
        context.settings.loras / "other.safetensors"
    )
    assert send(client, image_of()).status_code == 200
    (context.settings.loras / "other.safetensors").unlink()
    assert send(client, image_of()).status_code == 200, "the adapters were not found in the cache"
    shutil.copyfile(LORA_CONV, context.settings.loras / f"{LORA.stem}.safetensors")
    context.cache.path(SKS.sha256).unlink()
    assert error(send(client, image_of()))[1] == "LORA_BYTES_MISSING", (
        "another file of the same name was used"
    )


# --- other programs' images ---------------------------------------------------------------------


def test_the_supported_parameters_are_used(client, context):
    text = (
        "a (red:1.2) ball <lora:sks:0.5>\nNegative prompt: bad\n"
        "Steps: 20, Sampler: DPM++ SDE, CFG scale: 7, Seed: 1, Size: 64x72, Model: x, "
        'Lora hashes: "sks: ffffffffffff", Version: v1'
    )
    for answer in (
        send(client, png_with_parameters(text)),
        client.post("/v1/replay", json={"parameters": text}),
    ):
        body = answer.json()
        assert answer.status_code == 200, body
        assert body["source"] == "a1111"
        assert [one["name"] for one in body["ignored"]] == ["Sampler", "Model", "prompt"]
        assert "The sampler 'DPM++ SDE' is not supported here" in body["ignored"][0]["reason"]
        assert "sks has the hash ffffffffffff in the image" in body["warnings"][0]
        (recipe,) = context.store.get(body["request_id"]).recipes
        assert (recipe.prompt, recipe.sampler, recipe.steps, recipe.base_model) == (
            "a (red:1.2) ball",
            "ddpm",
            20,
            "tiny",
        )
        assert recipe.adapters == (replace(SKS, multiplier=0.5),)


def test_missing_loras_of_a_text_are_named(client):
    text = (
        "a ball <lora:none:1> <lora:../sks:1>\n"
        'Steps: 2, Sampler: Euler, Seed: 1, Lora hashes: "none: 0123456789ab"'
    )
    _, code, details = error(send(client, png_with_parameters(text)))
    assert (code, details["missing"]) == (
        "LORA_BYTES_MISSING",
        [{"sha256": "0123456789ab", "name": "none"}, {"sha256": "", "name": "../sks"}],
    )


def test_a_value_out_of_range_is_listed_as_ignored(client):
    answer = client.post(
        "/v1/replay", json={"parameters": "a ball\nSteps: 500, Sampler: Euler, Seed: 1"}
    )
    assert answer.status_code == 200
    (ignored,) = answer.json()["ignored"]
    assert ignored["name"] == "Steps"
    assert "steps is 500; it must be" in ignored["reason"]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"text", b"GIF89a", b"\x89PNG\r\n\x1a\n", image_of()[:300]]
)
def test_a_file_that_is_not_an_image_is_rejected(client, content):
    status, code, _ = error(send(client, content))
    assert (status, code) == (400, "IMAGE_WITHOUT_RECIPE")


def test_an_image_with_an_altered_recipe_is_rejected(client):
    record = json.dumps({"recipe": RECIPE.to_dict() | {"seed": 1}, "digest": RECIPE.digest})
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("fidelora", record)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    assert error(send(client, buffer.getvalue()))[1] == "IMAGE_WITHOUT_RECIPE"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body"]),
        ({"recipe": {}, "parameters": "x"}, ["body"]),
        ({"recipe": {}}, ["body", "recipe", "format"]),
        ({"recipe": RECIPE.to_dict() | {"steps": 0}}, ["body", "recipe", "steps"]),
        ({"recipe": RECIPE.to_dict() | {"model": "gpt"}}, ["body", "recipe", "model"]),
        ({"recipe": RECIPE.to_dict(), "fidelity": "best"}, ["body", "fidelity"]),
        ({"recipe": RECIPE.to_dict(), "base_model": "mine"}, ["body", "base_model"]),
        ([], ["body"]),
    ],
)
def test_an_invalid_body_is_422_and_named(client, body, place):
    answer = client.post("/v1/replay", json=body)
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, place)


def test_forms_and_bodies_of_other_kinds_are_rejected(client):
    assert client.post("/v1/replay", data={"image": "text"}).status_code == 415
    no_file = client.post("/v1/replay", files={"picture": b"x"})
    assert (no_file.status_code, no_file.json()["detail"][0]["loc"]) == (422, ["body", "image"])
    of_its_own = client.post("/v1/replay", content=b"x", headers={"Content-Type": "image/png"})
    assert error(of_its_own)[:2] == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert error(send(client, image_of(), strength="1"))[:2] == (400, "FIELD_NOT_SUPPORTED")
    assert error(client.post("/v1/replay", json={"recipe": RECIPE.to_dict(), "seed": 5}))[:2] == (
        400,
        "FIELD_NOT_SUPPORTED",
    )
    assert (
        client.post(
            "/v1/replay", content=b"{", headers={"Content-Type": "application/json"}
        ).status_code
        == 422
    )
    answer = client.post(
        "/v1/replay", content=b'"' + b"x" * 2**21, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["detail"]["error"]["code"]) == (413, "BODY_TOO_LARGE")


def test_too_many_loras_are_rejected(client):
    answer = send(client, image_of(replace(RECIPE, adapters=(SKS,) * 65)))
    assert answer.status_code == 422
    assert "65 LoRAs; at most 64 are allowed" in answer.text


def test_a_full_queue_and_a_stopping_server_reject_requests(client, context):
    for _ in range(2):
        send(client, image_of())
    assert error(send(client, image_of()))[:2] == (429, "QUEUE_FULL")
    context.stopping.set()
    assert error(send(client, image_of()))[:2] == (503, "SERVER_STOPPING")


def test_an_api_key_is_required_if_the_server_has_keys(tmp_path):
    context = context_in(tmp_path)
    key = context.keys.add("me")
    client = client_of(context)
    assert error(send(client, image_of()))[:2] == (401, "UNAUTHORIZED")
    client.headers["Authorization"] = f"Bearer {key}"
    assert send(client, image_of()).status_code == 200


def test_an_idempotency_key_makes_one_request(client, context):
    def again(content: bytes, **fields: str) -> Any:
        return client.post(
            "/v1/replay", files={"image": content}, data=fields, headers={"Idempotency-Key": "k"}
        )

    first, second = again(image_of()).json(), again(image_of()).json()
    assert first["request_id"] == second["request_id"]
    assert error(again(image_of(), output_format="webp"))[:2] == (409, "IDEMPOTENCY_KEY_REUSED")
    assert len(context.store.list().jobs) == 1


# --- the client ---------------------------------------------------------------------------------


def test_the_client_sends_files_bytes_and_recipes(context, tmp_path):
    file = tmp_path / "ball.png"
    file.write_bytes(image_of())
    worker = ManualWorker(context)
    with listening(context) as url, Client(url) as client:
        for image in (file, str(file), file.read_bytes(), RECIPE):
            accepted = client.replay(image, output_format="webp")
            assert context.store.get(accepted.request_id).recipes == (RECIPE,)
            worker.succeed(worker.claim(), image_format="webp")
        with pytest.raises(ImageRecordError, match=r"none\.png cannot be read"):
            client.replay(tmp_path / "none.png")
        with pytest.raises(ApiError) as caught:
            client.replay(replace(RECIPE, base_model="other"))
        assert (caught.value.code, caught.value.details) == (
            "BASE_MODEL_DIFFERS",
            {"differs": {"base_model": {"recipe": "other", "server": "tiny"}}},
        )

        async def ask() -> Any:
            async with AsyncClient(url) as asynchronous:
                return await asynchronous.replay(file, fidelity="fast")

        assert [(one.name, one.now) for one in asyncio.run(ask()).changes] == [("fidelity", "fast")]
