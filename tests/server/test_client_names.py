"""Names in requests that no file can have are always an error of the client (4xx), never of the
server (5xx)."""

from __future__ import annotations

import errno
import urllib.parse
from typing import Any

import pytest
from tests.server.http_support import MINIMAL, client_of, context_in, png_with_parameters
from tests.support import LORA

from fidelora.loras.hub import HubFile
from fidelora.recipe import AdapterRef, Recipe

NAMES = {
    "256 bytes": "a" * 256,
    "5,000 bytes": "a" * 5000,
    "256 bytes of emojis": "🎨" * 64,
    "a long folder": "a" * 300 + "/b",
    "many folders": "a/" * 3000 + "b",
    "NUL": "a\0b",
    "control characters": "a\n\x1b\x7fb",
    "a line of dots": "." * 300,
}


@pytest.fixture
def context(tmp_path):
    return context_in(tmp_path, lora_hosts="huggingface.co,*.example.com")


@pytest.fixture
def client(context, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with client_of(context) as client:
        yield client


def refused(answer: Any) -> bool:
    return 400 <= answer.status_code < 500 and len(answer.content) < 4096


def quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


@pytest.fixture(params=list(NAMES.values()), ids=list(NAMES))
def name(request):
    return request.param


def test_names_in_requests_are_refused(client, name):
    for path in (
        f"{name}.safetensors",
        f"uploads/{name}.safetensors",
        f"/{name}.safetensors",
        f"https://{name}.example.com/x.safetensors",
        f"https://other.host/{name}.safetensors",
        f"hf:owner/name/{name}.safetensors",
        f"hf:owner/{name}/x.safetensors",
        f"hf:owner/name/x.safetensors@{name}",
        name,
    ):
        answer = client.post("/v1/inference", json=MINIMAL | {"loras": [{"path": path}]})
        assert refused(answer), (path[:100], answer.text[:300])
    for fields in (
        {"model": name},
        {"loras": [{"path": "sks.safetensors", "sha256": name}]},
        {"prompts": [{"prompt": "a", "sampler": name}]},
        {"output_format": name},
        {name: 1},
    ):
        answer = client.post("/v1/inference", json=MINIMAL | fields)
        assert refused(answer), (str(fields)[:100], answer.text[:300])


def test_names_in_urls_are_refused(client, name):
    for path in (
        f"/v1/requests/{quoted(name)}/status",
        f"/v1/requests/{quoted(name)}/result",
        f"/v1/requests/{quoted(name)}/events",
        f"/v1/requests/{quoted(name)}/images/0",
        f"/v1/requests?cursor={quoted(name)}",
        f"/v1/requests?status={quoted(name)}",
        f"/v1/models/{quoted(name)}",
        f"/{quoted(name)}",
        f"/sdapi/v1/{quoted(name)}",
    ):
        assert refused(client.get(path)), path[:100]
    for path in (f"/v1/requests/{quoted(name)}", f"/v1/loras/{quoted(name)}"):
        assert refused(client.delete(path)), path[:100]
    for file in (f"{name}.safetensors", f"key-{'0' * 16}/{name}.safetensors"):
        assert refused(client.delete(f"/v1/loras/{quoted(file)}"))
        assert refused(client.delete(f"/v1/loras/uploads/{quoted(file)}"))
    assert client.get(f"/v1/loras?cursor={quoted(name)}").status_code in (200, 422)


def test_names_of_uploads_are_refused(client, context, name):
    content = LORA.read_bytes()
    named = {"name": f"{name}.safetensors"}
    answer = client.post("/v1/loras", files={"file": ("x", content)}, data=named)
    assert refused(answer), answer.text[:300]
    if "\0" not in name and "\n" not in name:  # not valid in a header
        answer = client.post("/v1/loras", files={"file": (named["name"], content)})
        # A form's file name has no folders.
        assert refused(answer) or answer.json()["path"] == "uploads/b.safetensors"
    uploads = context.settings.loras / "uploads"
    assert [one.name for one in uploads.glob("*") if one.name != "b.safetensors"] == []


def test_idempotency_keys_are_accepted_or_refused(client, name):
    if not name.isascii() or not name.isprintable():
        return  # not valid in a header
    key = {"Idempotency-Key": name}
    assert refused(client.post("/v1/inference", json=MINIMAL, headers=key))
    short = {"Idempotency-Key": name[:255]}
    assert client.post("/v1/inference", json=MINIMAL, headers=short).status_code == 200


def test_names_in_images_and_recipes_are_refused(client, name):
    ref = AdapterRef("0" * 64, name=name)
    recipe = Recipe(prompt="a", base_model="tiny", adapters=(ref,)).to_dict()
    body = {"recipe": recipe, "base_model": "server"}
    assert refused(client.post("/v1/replay", json=body))
    text = f"a <lora:{name}:1>\nSteps: 2, Sampler: DDPM, Seed: 1, Size: 64x64"
    assert refused(client.post("/v1/replay", json={"parameters": text}))
    text = f"a\nSteps: 2, Sampler: {name}, Seed: 1, Size: 64x64"
    ignored = client.post("/v1/replay", json={"parameters": text})
    assert ignored.status_code == 200, "the image was refused because of its sampler"
    answer = client.post("/v1/replay", files={"image": (name, b"no image")})
    assert refused(answer)
    answer = client.post("/v1/replay", files={"image": (name, png_with_parameters())})
    # The name of an image has no meaning, but the header of a form's part has a largest size.
    assert refused(answer) if len(name) > 4000 else answer.status_code == 200


def test_names_in_the_other_apis_are_refused(client, name):
    image = {"prompt": "a", "model": "sd15"}
    for body in ({"model": name}, {"size": name}, {"output_format": name}, {"quality": name}):
        answer = client.post("/v1/images/generations", json=image | body)
        assert refused(answer), (str(body)[:100], answer.text[:300])
    lora = {"loras": [{"path": f"{name}.safetensors"}]}
    assert refused(client.post("/v1/images/generations", json=image | lora))
    for body in (
        {"prompt": f"a <lora:{name}:1>"},
        {"sampler_name": name},
        {"scheduler": name},
        {"override_settings": {"sd_model_checkpoint": name}},
    ):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "steps": 1} | body)
        assert refused(answer), (str(body)[:100], answer.text[:300])
    assert refused(client.post("/sdapi/v1/options", json={"sd_model_checkpoint": name}))


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ])
def test_an_os_error_about_a_name_is_an_error_of_the_client(client, context, monkeypatch, number):
    """This holds for every route. The message contains neither the path nor the error."""

    def fails(*values: Any, **named: Any) -> Any:
        raise OSError(number, "File name too long", "/root/of/the/server")

    monkeypatch.setattr(context.store, "list", fails)
    answer = client.get("/v1/requests")
    assert answer.status_code == 400
    assert answer.json()["detail"]["error"]["code"] == "NAME_INVALID"
    assert "/root" not in answer.text


def test_other_os_errors_are_errors_of_the_server(client, context, monkeypatch):
    def fails(*values: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "/root/of/the/server")

    monkeypatch.setattr(context.store, "list", fails)
    answer = client.get("/v1/requests")
    assert (answer.status_code, "/root" in answer.text) == (500, False)


@pytest.mark.parametrize("part", ["a" * 256, "ä" * 128, "..", "x/../y"])
def test_no_part_of_a_hub_file_is_longer_than_a_name(part):
    for place in (
        f"hf:owner/name/{part}/x.safetensors",
        f"hf:owner/name/x.safetensors@{part}",
        f"hf:owner/{part}/x.safetensors",
    ):
        with pytest.raises(Exception, match="is not a file on the hub"):
            HubFile.parse(place)
    assert HubFile.parse("hf:owner/name/x.safetensors@refs/pr/1").revision == "refs/pr/1"
