"""`/v1/loras`, and the sources of LoRAs that a request can name."""

from __future__ import annotations

import json
import struct

import pytest
from tests.server.http_support import (
    MINIMAL,
    error,
    submit,
    upload,
)
from tests.support import GOLDEN_JOBS, LOKR, LORA

from fidelora.recipe import file_sha256


def test_loras_are_listed_with_their_header_data(client, context):
    (context.settings.loras / "more").mkdir()
    (context.settings.loras / "more" / "lokr.safetensors").write_bytes(LOKR.read_bytes())
    (context.settings.loras / "broken.safetensors").write_bytes(b"<html>")
    (context.settings.loras / "notes.txt").write_text("no adapter")
    (context.settings.loras / "out.safetensors").symlink_to(LORA)  # a link out of the folder
    listed = {entry["path"]: entry for entry in client.get("/v1/loras").json()["loras"]}
    assert set(listed) == {"sks.safetensors", "more/lokr.safetensors", "broken.safetensors"}
    sks = listed["sks.safetensors"]
    assert (sks["type"], sks["ranks"], sks["modules"], sks["trigger"], sks["step"]) == (
        "lora",
        [8],
        120,
        "sks",
        6,
    )
    assert (sks["base"], sks["trainer"], sks["problems"]) == ("sd_1.5", "ai-toolkit 0.12.26", [])
    assert sks["sha256"] == file_sha256(LORA)
    assert listed["more/lokr.safetensors"]["type"] == "lokr"
    assert "web page" in listed["broken.safetensors"]["problems"][0]

    page = client.get("/v1/loras", params={"limit": 2}).json()
    rest = client.get("/v1/loras", params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert [entry["path"] for entry in page["loras"] + rest["loras"]] == sorted(listed)
    assert rest["next_cursor"] is None


def test_a_lora_of_another_family_is_reported_at_once(client):
    flux = GOLDEN_JOBS / "flux_bf16_save_f32" / "flux_bf16_save_f32.safetensors"
    body = upload(client, flux.read_bytes(), "flux.safetensors").json()
    (problem,) = body["problems"]
    assert body["models"] == []
    assert problem.startswith("It is an adapter for FLUX.1, and this server has no such base model")
    assert "`--base-model flux=BASE`" in problem
    assert "FIDELORA_BASE_MODEL" in problem
    listed = {one["path"]: one for one in client.get("/v1/loras").json()["loras"]}
    assert listed["uploads/flux.safetensors"]["problems"] == [problem]
    sks = listed["sks.safetensors"]
    assert (sks["models"], sks["problems"]) == (["sd15"], [])


def test_an_embedding_is_listed_and_used(client, context):
    content = (GOLDEN_JOBS / "embed" / "zrkk.safetensors").read_bytes()
    listed = upload(client, content, "zrkk.safetensors").json()
    assert (listed["type"], listed["tokens"], listed["modules"]) == ("embedding", 4, 0)
    assert (listed["trigger"], listed["step"]) == ("zrkk", 12)
    request_id = submit(client, MINIMAL | {"loras": [{"path": "uploads/zrkk.safetensors"}]})
    (ref,) = context.store.get(request_id).recipes[0].adapters
    assert (ref.word, ref.multiplier) == ("zrkk", 1)
    half = [{"path": "uploads/zrkk.safetensors", "multiplier": 0.5}]
    assert client.post("/v1/inference", json=MINIMAL | {"loras": half}).status_code == 400


def test_an_upload_can_be_named_without_its_folder(client, context):
    upload(client, LOKR.read_bytes())
    request_id = submit(client, MINIMAL | {"loras": [{"path": "new.safetensors"}]})
    (ref,) = context.store.get(request_id).recipes[0].adapters
    assert (ref.name, ref.sha256) == ("new", file_sha256(LOKR))
    (context.settings.loras / "more").mkdir()
    (context.settings.loras / "more" / "new.safetensors").write_bytes(LORA.read_bytes())
    answer = client.post("/v1/inference", json=MINIMAL | {"loras": [{"path": "new.safetensors"}]})
    assert error(answer) == (400, "LORA_NOT_FOUND")
    message = answer.json()["detail"]["error"]["message"]
    assert "use one of the paths more/new.safetensors, uploads/new.safetensors" in message
    # A file in the folder itself has this path, whatever the other folders contain.
    (context.settings.loras / "new.safetensors").write_bytes(LORA.read_bytes())
    submit(client, MINIMAL | {"loras": [{"path": "new.safetensors"}]})


def test_an_upload_is_used_and_deleted(client, context, worker):
    answer = upload(client, LOKR.read_bytes())
    assert (answer.status_code, answer.json()["path"], answer.json()["uploaded"]) == (
        201,
        "uploads/new.safetensors",
        True,
    )
    assert upload(client, LOKR.read_bytes()).status_code == 200
    assert error(upload(client, LORA.read_bytes())) == (409, "LORA_EXISTS")

    request_id = submit(client, MINIMAL | {"loras": [{"path": "uploads/new.safetensors"}]})
    assert error(client.delete("/v1/loras/new.safetensors")) == (409, "LORA_IN_USE")
    client.delete(f"/v1/requests/{request_id}")
    assert client.delete("/v1/loras/new.safetensors").status_code == 204
    assert error(client.delete("/v1/loras/new.safetensors")) == (404, "UPLOAD_NOT_FOUND")
    assert error(
        client.post(
            "/v1/inference", json=MINIMAL | {"loras": [{"path": "uploads/new.safetensors"}]}
        )
    ) == (
        400,
        "LORA_NOT_FOUND",
    )
    assert list((context.settings.loras / "uploads").iterdir()) == []
    assert not context.cache.path(file_sha256(LOKR)).exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        ".hidden.safetensors",
        "x.ckpt",
        "",
        "a/b.safetensors",
        "x\0.safetensors",
        "\u202egpj.safetensors",
        "x\x9b31m.safetensors",
    ],
)
def test_an_upload_stays_in_its_folder(client, context, name):
    answer = client.post(
        "/v1/loras", files={"file": ("a.safetensors", LORA.read_bytes())}, data={"name": name}
    )
    if name == "":  # no name: the file's own
        assert answer.status_code == 201
        return
    assert error(answer) == (400, "UPLOAD_NAME_INVALID")
    assert sorted(path.name for path in context.settings.loras.rglob("*.safetensors")) == [
        "sks.safetensors"
    ]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>", LORA.read_bytes()[:-1]])
def test_an_invalid_upload_is_rejected_and_leaves_no_file(client, context, content):
    answer = upload(client, content)
    assert error(answer) == (400, "LORA_INVALID")
    assert "new.safetensors" in answer.json()["detail"]["error"]["message"]
    assert list((context.settings.loras / "uploads").iterdir()) == []


def test_texts_of_files_never_break_the_list(client, context, tmp_path):
    """Metadata with lone surrogates, also inside JSON, and links in a circle."""
    metadata = {"name": "\ud800", "training_info": '{"step": 1' + "0" * 30 + ', "epoch": 2}'}
    header = {"__metadata__": metadata, "emb_params": EMBEDDING_ENTRY}
    raw = json.dumps(header).encode()
    content = struct.pack("<Q", len(raw)) + raw + bytes(64)
    assert upload(client, content, "odd.safetensors").status_code == 201
    loop = context.settings.loras / "loop.safetensors"
    loop.symlink_to(loop)
    folder = context.settings.loras / "folder"
    folder.symlink_to(folder)
    listed = client.get("/v1/loras")
    assert listed.status_code == 200
    paths = [one["path"] for one in listed.json()["loras"]]
    assert "uploads/odd.safetensors" in paths
    assert "loop.safetensors" not in paths
    assert client.get("/sdapi/v1/loras").status_code == 200
    for name in ("loop.safetensors", "folder/a.safetensors"):
        body = MINIMAL | {"loras": [{"path": name}]}
        assert error(client.post("/v1/inference", json=body)) == (400, "LORA_NOT_FOUND")


EMBEDDING_ENTRY = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}


def test_files_that_were_not_uploaded_are_not_deleted(client, context):
    for name in ("sks.safetensors", "..%2Fsks.safetensors", "uploads%2F..%2Fsks.safetensors"):
        assert client.delete(f"/v1/loras/{name}").status_code in (404, 405)
    assert (context.settings.loras / "sks.safetensors").is_file()


# --- sources of LoRAs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "../sks.safetensors",
        "a/../../sks.safetensors",
        "/etc/passwd",
        str(LORA),
        "out.safetensors",
        "sks.safetensors/",
        "sks.ckpt",
        "\0.safetensors",
        "x" * 300 + ".safetensors",
        "hf:owner/name/../x.safetensors",
        "hf:nonsense",
    ],
)
def test_lora_names_cannot_leave_the_folder(client, context, place):
    (context.settings.loras / "out.safetensors").symlink_to(LORA)
    assert error(client.post("/v1/inference", json=MINIMAL | {"loras": [{"path": place}]})) == (
        400,
        "LORA_NOT_FOUND",
    )


@pytest.mark.parametrize(
    "place",
    [
        "https://example.com/x.safetensors",
        "http://127.0.0.1/x",
        "file:///etc/passwd",
        "hf:owner/name/x.safetensors",
    ],
)
def test_nothing_is_fetched_unless_the_operator_allows_it(client, place):
    answer = client.post("/v1/inference", json=MINIMAL | {"loras": [{"path": place}]})
    assert error(answer) == (400, "LORA_URL_NOT_ALLOWED")


def test_a_file_that_is_replaced_while_its_request_waits(client, context):
    submit(client)
    path = context.settings.loras / "sks.safetensors"
    path.rename(path.with_suffix(".old"))
    path.write_bytes(LOKR.read_bytes())
    assert context.cache.find(file_sha256(LORA)) is not None  # the accepted request can still run
    (recipe,) = context.store.get(submit(client)).recipes
    assert recipe.adapters[0].sha256 == file_sha256(LOKR)
