"""The HTTP API, route by route: the documented contract, the additions to it, and the errors."""

from __future__ import annotations

import json
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.server.http_support import MINIMAL, ManualWorker, client_of, context_in, now
from tests.support import GOLDEN_JOBS, LOKR, LORA

from fidelora.errors import JobStoreError
from fidelora.families import all_families
from fidelora.jobs.job import Status
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import WorkerState
from fidelora.recipe import file_sha256
from fidelora.server.app import clean, context_with_store
from fidelora.server.context import ServerContext

SECRET = "hf_do_not_tell"


@pytest.fixture
def context(tmp_path) -> ServerContext:
    return context_in(tmp_path)


@pytest.fixture
def client(context):
    with client_of(context) as made:
        yield made


@pytest.fixture
def worker(context) -> ManualWorker:
    return ManualWorker(context)


def submit(client: TestClient, body: Any = None, **headers: str) -> str:
    answer = client.post("/v1/inference", json=body or MINIMAL, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def error(answer: Any) -> tuple[int, str]:
    content = answer.json()["detail"]["error"]
    assert set(content) == {"code", "message", "details"}
    assert content["message"].endswith(".")
    return answer.status_code, content["code"]


def with_prompt(**fields: Any) -> dict[str, Any]:
    return MINIMAL | {"prompts": [MINIMAL["prompts"][0] | fields]}


# --- the documented contract --------------------------------------------------------------------


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "healthy"}
    assert [client.head(path).status_code for path in ("/health", "/ready")] == [200, 200]
    answer = client.get("/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["sd15"]  # the configured ones
    models = answer["models"]
    assert [model["configured"] for model in models] == [model["id"] == "sd15" for model in models]
    assert [model["id"] for model in models] == list(all_families())
    assert models[0] == {
        "id": "sd15",
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "resolution_divisor": 8,
        "default_steps": 25,
        "default_guidance_scale": 6.0,
        "requires_control_image": False,
        "is_video_model": False,
        "default_num_frames": None,
        "default_fps": None,
        "configured": True,
    }


def test_a_request_from_its_acceptance_to_its_image(client, worker, context):
    answer = client.post("/v1/inference", json=MINIMAL).json()
    request_id = answer["request_id"]
    url = f"http://127.0.0.1:8000/v1/requests/{request_id}"
    assert set(answer) == {"request_id", "status", "status_url", "result_url", "created_at"}
    assert (answer["status"], answer["status_url"], answer["result_url"]) == (
        "queued",
        f"{url}/status",
        f"{url}/result",
    )

    status = client.get(f"/v1/requests/{request_id}/status").json()
    assert (status["status"], status["queue_position"], status["started_at"], status["error"]) == (
        "in_queue",
        0,
        None,
        None,
    )
    assert client.get(f"/v1/requests/{request_id}/result").json()["outputs"] is None

    job = worker.claim()
    worker.step(job, 5)
    status = client.get(f"/v1/requests/{request_id}/status").json()
    assert status["status"] == "in_progress"
    assert status["progress"] == {
        "image": 0,
        "images": 1,
        "step": 5,
        "steps": 25,
        "fraction": 0.2,
        "eta_s": 1.5,
    }

    done = worker.succeed(job)
    result = client.get(f"/v1/requests/{request_id}/result").json()
    (image,) = result["outputs"]["images"]
    assert (result["status"], result["error"], result["outputs"]["videos"]) == (
        "succeeded",
        None,
        [],
    )
    assert result["metadata"]["model"] == "sd15"
    assert result["metadata"]["timings"] == {"denoise": 1.0}
    assert (image["format"], image["width"], image["height"], image["seed"]) == (
        "png",
        512,
        512,
        42,
    )
    assert (image["file_path"], image["sha256"]) == (
        done.outputs[0].file_path,
        done.outputs[0].sha256,
    )
    assert image["recipe"]["prompt"] == "a photo of sks"
    assert image["recipe"]["adapters"] == [
        {"sha256": file_sha256(LORA), "multiplier": 1.0, "name": "sks"}
    ]
    assert (image["recipe"]["width"], image["recipe"]["height"], image["recipe"]["base_model"]) == (
        1024,
        1024,
        "tiny",
    )

    picture = client.get(image["url"])
    assert picture.content == b"an image"
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert picture.headers["etag"] == f'"{image["sha256"]}"'


def test_a_failure_has_a_message(client, worker):
    request_id = submit(client)
    worker.fail(worker.claim())
    for part in ("status", "result"):
        answer = client.get(f"/v1/requests/{request_id}/{part}").json()
        assert (answer["status"], answer["error"]) == ("failed", "The model produced NaN.")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (MINIMAL | {"model": "gpt"}, "MODEL_NOT_FOUND"),
        (MINIMAL | {"loras": []}, "LORA_FILE_REQUIRED"),
        (MINIMAL | {"loras": [{"path": "none.safetensors"}]}, "LORA_NOT_FOUND"),
        (
            MINIMAL | {"loras": [{"path": "sks.safetensors", "transformer": "low"}]},
            "MOE_FORMAT_NOT_SUPPORTED",
        ),
        (with_prompt(ctrl_img="a.png"), "FIELD_NOT_SUPPORTED"),
        (with_prompt(num_frames=5), "FIELD_NOT_SUPPORTED"),
        (with_prompt(fps=5), "FIELD_NOT_SUPPORTED"),
        (with_prompt(wdth=5), "FIELD_NOT_SUPPORTED"),
        (MINIMAL | {"steps": 5}, "FIELD_NOT_SUPPORTED"),
        (with_prompt(network_multiplier=[1, 1]), "MULTIPLIERS_DO_NOT_MATCH"),
        (MINIMAL | {"loras": [{"path": "sks.safetensors", "sha256": "0" * 64}]}, "LORA_CHANGED"),
    ],
)
def test_unsupported_requests_are_400_with_a_code(client, context, body, code):
    assert error(client.post("/v1/inference", json=body)) == (400, code)
    assert context.store.count(Status.IN_QUEUE) == 0


def test_a_body_that_is_not_json_is_named(client):
    for content, headers, message in (
        (b'{"model": "sd15"}', {}, "sent with the header `Content-Type: application/json`"),
        (b"[]", {"Content-Type": "application/json"}, "The body must be a JSON object"),
        (b'{"model"', {"Content-Type": "application/json"}, "not valid JSON: Expecting ':'"),
    ):
        answer = client.post("/v1/inference", content=content, headers=headers)
        assert answer.status_code == 422
        assert message in answer.json()["detail"][0]["msg"]


def test_an_unknown_model_error_lists_the_models(client):
    answer = client.post("/v1/inference", json=MINIMAL | {"model": "gpt"}).json()
    assert answer["detail"]["error"]["details"] == {"supported_models": list(all_families())}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "model"]),
        (MINIMAL | {"prompts": []}, ["body", "prompts"]),
        ({key: value for key, value in MINIMAL.items() if key != "loras"}, ["body", "loras"]),
        *((with_prompt(**{field: value}), ["body", "prompts", 0, field]) for field, value in [
            ("width", 63), ("width", 4097), ("height", 63), ("height", 4097),
            ("guidance_scale", -0.1), ("guidance_scale", 20.1),
            ("sample_steps", 0), ("sample_steps", 151), ("seed", -2), ("sampler", "dpm++"),
            ("prompt", "x" * 10_001), ("neg", "x" * 10_001), ("prompt", "\ud800"),
            ("network_multiplier", 5.1),
        ]),
        (
            MINIMAL | {"loras": [{"path": "a.safetensors", "network_multiplier": -5.1}]},
            ["body", "loras", 0, "network_multiplier"],
        ),
        (MINIMAL | {"output_format": "gif"}, ["body", "output_format"]),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_422_and_named(client, context, body, place):
    answer = client.post(
        "/v1/inference", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert place in [entry["loc"][: len(place)] for entry in answer.json()["detail"]]
    assert context.store.count(Status.IN_QUEUE) == 0


def test_an_unknown_sampler_error_lists_the_samplers(client):
    (entry,) = client.post("/v1/inference", json=with_prompt(sampler="dpm++")).json()["detail"]
    assert "euler_a" in entry["msg"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"[]",
        b"\xff",
        b'{"model": NaN}',
        b'{"prompts": [{"width": Infinity}]}',
        b"[" * 100_000,
    ],
)
def test_malformed_bodies_are_rejected(client, content):
    assert client.post(
        "/v1/inference", content=content, headers={"content-type": "application/json"}
    ).status_code in (400, 422)


def test_the_trigger_word_of_the_lora_is_reported(client, worker):
    note = "[trigger] is 'sks', the trigger word in the metadata of the LoRA sks."
    body = {name: value for name, value in MINIMAL.items() if name != "trigger_word"}
    queued = client.post("/v1/inference", json=body).json()
    assert queued["notes"] == [note]
    worker.succeed(worker.claim())
    result = client.get(f"/v1/requests/{queued['request_id']}/result").json()
    assert result["notes"] == [note]
    assert result["outputs"]["images"][0]["recipe"]["prompt"] == "a photo of sks"
    assert "notes" not in client.post("/v1/inference", json=MINIMAL).json()


def test_a_request_can_name_the_kind_of_device(context, client):
    request = MINIMAL | {"device": "cuda"}
    assert "notes" not in client.post("/v1/inference", json=request).json()  # no worker is known
    context.store.report_worker(WorkerState("w", "cpu"))
    answer = client.post("/v1/inference", json=request).json()
    assert answer["notes"] == [
        "No worker has a device of the kind cuda at the moment (there are cpu), so the request "
        "waits for one."
    ]
    assert context.store.get(answer["request_id"]).device_kind == "cuda"
    assert context.store.claim("w", None, 60, device_kind="cpu") is None
    refused = client.post("/v1/inference", json=MINIMAL | {"device": "tpu"})
    assert refused.status_code == 422


def test_defaults_seeds_and_the_trigger_of_a_prompt(client, context):
    prompts = [
        {"prompt": "[trigger]"},
        {"prompt": "[trigger]", "trigger_word": "xyz", "seed": 7, "width": 519},
        {"prompt": "a", "seed": -1},
    ]
    first, second, third = context.store.get(submit(client, MINIMAL | {"prompts": prompts})).recipes
    assert (first.prompt, first.seed, first.steps, first.guidance_scale, first.sampler) == (
        "sks",
        42,
        25,
        6.0,
        "ddpm",
    )
    assert (second.prompt, second.seed, second.width) == ("xyz", 7, 512)
    assert 0 <= third.seed < 2**32


def test_noise_matches_the_trainer_of_the_lora(client, context, tmp_path):
    from safetensors.numpy import load_file, save_file

    software = json.dumps({"name": "ai-toolkit", "version": "0.7.1"})
    save_file(load_file(LORA), context.settings.loras / "old.safetensors", {"software": software})
    (old,) = context.store.get(
        submit(client, MINIMAL | {"loras": [{"path": "old.safetensors"}]})
    ).recipes
    (new,) = context.store.get(submit(client)).recipes
    assert (old.noise, new.noise) == ("legacy", "modern")


# --- additions ----------------------------------------------------------------------------------


def test_requests_are_listed_newest_first_page_by_page(client, worker):
    ids = [submit(client) for _ in range(5)]
    worker.fail(worker.claim())
    first = client.get("/v1/requests", params={"limit": 2}).json()
    second = client.get("/v1/requests", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    third = client.get("/v1/requests", params={"limit": 2, "cursor": second["next_cursor"]}).json()
    assert [
        entry["request_id"] for page in (first, second, third) for entry in page["requests"]
    ] == ids[::-1]
    assert third["next_cursor"] is None
    failed = client.get("/v1/requests", params={"status": "failed"}).json()["requests"]
    assert [entry["request_id"] for entry in failed] == ids[:1]
    assert error(client.get("/v1/requests", params={"cursor": "unknown"})) == (
        400,
        "CURSOR_NOT_KNOWN",
    )
    assert client.get("/v1/requests", params={"limit": 0}).status_code == 422


def test_queued_and_running_requests_can_be_canceled(client, worker):
    queued, running, done = submit(client), submit(client), submit(client)
    assert client.delete(f"/v1/requests/{queued}").json()["status"] == "canceled"
    job = worker.claim()
    assert job.id == running
    assert client.delete(f"/v1/requests/{running}").json()["status"] == "in_progress"
    assert worker.step(job, 1).cancel_requested
    worker.succeed(worker.claim())
    assert client.delete(f"/v1/requests/{done}").json()["status"] == "succeeded"
    assert error(client.delete("/v1/requests/unknown")) == (404, "REQUEST_NOT_FOUND")


def test_an_idempotency_key_returns_the_same_request(client, context):
    key = {"Idempotency-Key": "mine"}
    random = with_prompt(seed=-1)
    first = submit(client, random, **key)
    assert submit(client, random, **key) == first
    # The token is not part of the compared request.
    assert submit(client, random | {"hf_token": SECRET}, **key) == first
    (context.settings.loras / "sks.safetensors").unlink()
    assert submit(client, random, **key) == first  # found before any LoRA is read
    assert error(client.post("/v1/inference", json=with_prompt(seed=1), headers=key)) == (
        409,
        "IDEMPOTENCY_KEY_REUSED",
    )
    assert (
        client.post(
            "/v1/inference", json=random, headers={"Idempotency-Key": "x" * 256}
        ).status_code
        == 422
    )
    assert context.store.count(Status.IN_QUEUE) == 1


def test_a_hundred_duplicates_at_once_make_one_request(tmp_path):
    seed = context_in(tmp_path)
    context = context_with_store(
        SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite"), seed.settings, {}, seed.base_url
    )
    with client_of(context) as client, ThreadPoolExecutor(20) as threads:
        ids = set(threads.map(lambda _: submit(client, **{"Idempotency-Key": "mine"}), range(100)))
        assert len(ids) == 1
        assert context.store.count(Status.IN_QUEUE) == 1


def test_a_full_queue_sends_retry_after(tmp_path):
    with client_of(context_in(tmp_path, queue_size=2)) as client:
        submit(client)
        key = {"Idempotency-Key": "second"}
        second = submit(client, **key)
        answer = client.post("/v1/inference", json=MINIMAL)
        assert error(answer) == (429, "QUEUE_FULL")
        assert int(answer.headers["retry-after"]) > 0
        assert submit(client, **key) == second  # a queued request is still found


def events(lines: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return (id, data) of each event of a finished stream."""
    fields = [
        dict(line.split(": ", 1) for line in block.split("\n") if line[:1] != ":")
        for block in lines.strip().split("\n\n")
    ]
    return [(int(event["id"]), json.loads(event["data"])) for event in fields if "id" in event]


def test_events_end_with_the_request(client, worker):
    request_id = submit(client)
    job = worker.claim()
    threading.Timer(0.3, lambda: worker.succeed(worker.step(job, 3))).start()
    answer = client.get(f"/v1/requests/{request_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    assert [data["status"] for _, data in seen] == ["in_progress", "succeeded"]
    assert [number for number, _ in seen] == sorted({number for number, _ in seen})
    assert seen[-1][1]["progress"]["step"] == 3

    again = client.get(
        f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": str(seen[0][0])}
    )
    assert events(again.text) == seen[-1:]
    assert error(client.get("/v1/requests/unknown/events")) == (404, "REQUEST_NOT_FOUND")


def test_a_reconnecting_client_gets_only_new_events(client, worker, context):
    request_id = submit(client)
    job = worker.step(worker.claim(), 3)
    threading.Timer(0.3, lambda: worker.succeed(job)).start()
    answer = client.get(
        f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": str(job.version)}
    )
    assert [data["status"] for _, data in events(answer.text)] == ["succeeded"]


def test_events_carry_previews_on_request(client, worker):
    request_id = submit(client)
    job = worker.step(worker.claim(), 3, preview="cGljdHVyZQ==")
    threading.Timer(0.3, lambda: worker.succeed(job)).start()
    seen = events(client.get(f"/v1/requests/{request_id}/events", params={"previews": True}).text)
    assert [data["preview"] for _, data in seen] == ["cGljdHVyZQ==", None]
    assert client.get(f"/v1/requests/{request_id}/status").json()["preview"] is None
    assert "preview" not in client.get(f"/v1/requests/{request_id}/status").json()["progress"]


def test_events_end_with_the_server(client, context):
    request_id = submit(client)
    threading.Timer(0.3, context.stopping.set).start()
    assert [
        data["status"] for _, data in events(client.get(f"/v1/requests/{request_id}/events").text)
    ] == ["in_queue"]


def test_missing_images_are_404_or_410(client, worker):
    request_id = submit(client)
    assert error(client.get(f"/v1/requests/{request_id}/images/0")) == (404, "IMAGE_NOT_FOUND")
    done = worker.succeed(worker.claim())
    assert error(client.get(f"/v1/requests/{request_id}/images/1")) == (404, "IMAGE_NOT_FOUND")
    assert client.get(f"/v1/requests/{request_id}/images/-1").status_code == 422
    from pathlib import Path

    Path(done.outputs[0].file_path).write_bytes(b"another")
    assert error(client.get(f"/v1/requests/{request_id}/images/0")) == (410, "IMAGE_GONE")
    Path(done.outputs[0].file_path).unlink()
    assert error(client.get(f"/v1/requests/{request_id}/images/0")) == (410, "IMAGE_GONE")


def test_several_loras_and_a_multiplier_for_each_prompt(client, context):
    (context.settings.loras / "b.safetensors").write_bytes(LOKR.read_bytes())
    loras = [{"path": "sks.safetensors", "network_multiplier": 0.5}, {"path": "b.safetensors"}]
    prompts = [{"prompt": "a"}, {"prompt": "b", "network_multiplier": [1.5, -1]}]
    first, second = context.store.get(
        submit(client, MINIMAL | {"loras": loras, "prompts": prompts})
    ).recipes
    assert [ref.multiplier for ref in first.adapters] == [0.5, 1.0]
    assert [ref.multiplier for ref in second.adapters] == [1.5, -1.0]
    assert {first.adapter_mode, second.adapter_mode} == {"live"}


# --- LoRAs as a resource ------------------------------------------------------------------------


def upload(client: TestClient, content: bytes, name: str = "new.safetensors") -> Any:
    return client.post("/v1/loras", files={"file": (name, content)})


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


# --- limits, keys, secrets ----------------------------------------------------------------------


def test_bodies_have_a_limit_with_and_without_content_length(client):
    large = b" " * (2**20 + 1)
    headers = {"content-type": "application/json"}
    assert error(client.post("/v1/inference", content=large, headers=headers)) == (
        413,
        "BODY_TOO_LARGE",
    )
    announced = client.post(
        "/v1/inference", content=b"{}", headers=headers | {"content-length": str(2**30)}
    )
    assert error(announced) == (413, "BODY_TOO_LARGE")  # before any of it was received
    pieces = (large[:100_000] for _ in range(20))
    assert error(client.post("/v1/inference", content=pieces, headers=headers)) == (
        413,
        "BODY_TOO_LARGE",
    )


def test_the_trigger_word_is_not_inserted_into_too_long_prompts(client, context):
    """The text would have 1.6 GB."""
    long = MINIMAL | {"trigger_word": "x" * 40_000, "prompts": [{"prompt": "[trigger]" * 40_000}]}
    answer = client.post("/v1/inference", json=long)
    assert answer.status_code == 422
    assert "With the trigger word in 40,000 places" in answer.text
    assert context.store.list().jobs == ()


def test_errors_are_short(client):
    many = MINIMAL | {"prompts": [{"prompt": "a", "steps" + "x" * 60: 1, "width": 1}] * 64}
    for body in (many, MINIMAL | {"loras": [{"path": "x" * 5_000}] * 50}):
        answer = client.post("/v1/inference", json=body)
        assert answer.status_code == 422
        assert len(answer.content) < 20_000
        assert len(answer.json()["detail"]) <= 20
    answer = client.post("/v1/inference", json=MINIMAL | {"x" * 100_000: 1})
    assert answer.status_code == 400
    assert len(answer.content) < 5_000


def test_loras_times_prompts_have_a_limit(client, context):
    lora = MINIMAL["loras"][0]
    body = MINIMAL | {"loras": [lora] * 33, "prompts": [{"prompt": "a ball"}] * 32}
    answer = client.post("/v1/inference", json=body)
    assert answer.status_code == 422
    assert "33 LoRAs and 32 prompts; LoRAs times prompts must be at most 1,024" in answer.text
    assert context.store.list().jobs == ()


def test_uploads_have_a_limit_of_their_own(tmp_path):
    with client_of(context_in(tmp_path, lora_max_mb=1)) as client:
        assert upload(client, LORA.read_bytes()).status_code == 201
        assert error(upload(client, bytes(3 * 2**20))) == (413, "BODY_TOO_LARGE")


def test_with_a_key_all_but_the_probes_need_one(client, context):
    submit(client)
    key = context.keys.add("a client")
    assert key not in (context.settings.data_dir / "api_keys.json").read_text()
    for path in ("/v1/models", "/v1/requests", "/v1/loras", "/metrics"):
        answer = client.get(path)
        assert error(answer) == (401, "UNAUTHORIZED")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for wrong in (f"Bearer {key}x", f"Basic {key}", key, "Bearer", "Bearer \xff"):
            assert (
                client.get(path, headers={"Authorization": wrong.encode("latin-1")}).status_code
                == 401
            )
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    context.keys.remove("a client")
    assert client.get("/v1/models").status_code == 200


def test_idempotency_keys_are_scoped_to_api_keys(client, context):
    keys = [
        {"Authorization": f"Bearer {context.keys.add(name)}", "Idempotency-Key": "same"}
        for name in ("one", "two")
    ]
    assert submit(client, **keys[0]) != submit(client, **keys[1])
    assert submit(client, **keys[0]) == submit(client, **keys[0])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_without_keys_other_hostnames_are_rejected(client, host):
    assert error(client.get("/v1/models", headers={"Host": host})) == (400, "HOST_NOT_ALLOWED")


def test_the_name_of_this_machine_in_a_container_is_explained(client):
    answer = client.get("/v1/models", headers={"Host": "host.docker.internal:8000"})
    assert error(answer) == (400, "HOST_NOT_ALLOWED")
    assert "Programs in a container use that name for this machine" in answer.text


@pytest.mark.parametrize("peer", ["192.0.2.7", "10.0.0.1", "::ffff:192.0.2.7", "2001:db8::1", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_keys_other_machines_are_refused(context, peer, method):
    """Also after the last key was removed, and whatever the headers claim."""
    client = client_of(context, client=(peer, 50000))
    key = context.keys.add("one")
    bearer = {"Authorization": f"Bearer {key}"}
    assert client.get("/v1/models", headers=bearer).status_code == 200
    context.keys.remove("one")
    headers = {**bearer, "Host": "localhost", "X-Forwarded-For": "127.0.0.1"}
    answer = client.request(method, "/v1/models", headers=headers)
    assert error(answer) == (403, "CALLER_NOT_ALLOWED")
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_keys_this_machine_is_served(context, peer):
    assert client_of(context, client=(peer, 1)).get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"]
)
def test_without_keys_names_of_this_machine_are_accepted(client, host):
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1.evil.example", "null", "http://[", ""]
)
def test_without_keys_pages_of_other_sites_are_rejected(client, origin):
    assert error(client.post("/v1/loras", files={"file": b""}, headers={"Origin": origin})) == (
        400,
        "HOST_NOT_ALLOWED",
    )


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:1"]
)
def test_without_keys_pages_of_this_machine_are_accepted(client, origin):
    assert client.get("/v1/models", headers={"Origin": origin}).status_code == 200


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
CHAT = "https://chat.example"


@pytest.mark.parametrize("with_key", [True, False])
def test_allowed_origins_may_call_the_server_from_a_browser(tmp_path, with_key):
    context = context_in(tmp_path, cors_origins="https://other.example, https://chat.example/")
    key = {"Authorization": f"Bearer {context.keys.add('one')}"} if with_key else {}
    client = client_of(context)
    asked = client.options("/v1/inference", headers={"Origin": CHAT, **PREFLIGHT})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == CHAT
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    answer = client.get("/v1/models", headers={"Origin": CHAT, **key})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, CHAT)
    other = client.get("/v1/models", headers={"Origin": "https://evil.example", **key})
    assert "access-control-allow-origin" not in other.headers
    assert other.status_code == (200 if with_key else 400)


def test_a_star_allows_all_origins_on_servers_with_keys_only(tmp_path):
    context = context_in(tmp_path, cors_origins="*")
    client = client_of(context)
    assert client.get("/v1/models", headers={"Origin": CHAT}).status_code == 400
    key = {"Authorization": f"Bearer {context.keys.add('one')}"}
    answer = client.get("/v1/models", headers={"Origin": CHAT, **key})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_by_default_no_origin_is_allowed(client):
    answer = client.options("/v1/inference", headers={"Origin": CHAT, **PREFLIGHT})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.status_code >= 400


@pytest.mark.parametrize("value", ["chat.example", "https://chat.example/path", "https://"])
def test_an_invalid_origin_stops_the_server(tmp_path, value):
    with pytest.raises(ValueError, match="is not an origin"):
        context_in(tmp_path, cors_origins=value)


def test_a_token_is_not_stored_logged_or_returned(client, context, caplog, capsys):
    caplog.set_level("DEBUG")
    request_id = submit(client, MINIMAL | {"hf_token": SECRET})
    number = 4567891234
    bodies = [
        {"hf_token": SECRET},
        {"hf_token": {"a": SECRET}},
        {"hf_token": number},
        MINIMAL | {"hf_token": SECRET, "model": "gpt"},
        MINIMAL | {"hf_token": SECRET, "loras": [{"path": "https://e.com/a?t=" + SECRET}]},
    ]
    texts = [client.post("/v1/inference", json=body).text for body in bodies]
    texts = [text.replace(str(number), SECRET) for text in texts]
    texts += [
        client.get(f"/v1/requests/{request_id}/status").text,
        str(context.store.get(request_id)),
        caplog.text,
        "".join(capsys.readouterr()),
        client.get("/metrics").text,
    ]
    assert [text for text in texts if SECRET in text] == []


def test_a_stopping_server_rejects_new_requests_only(client, context):
    request_id = submit(client, **{"Idempotency-Key": "mine"})
    context.stopping.set()
    answer = client.post("/v1/inference", json=MINIMAL)
    assert error(answer) == (503, "SERVER_STOPPING")
    assert int(answer.headers["retry-after"]) > 0
    assert submit(client, **{"Idempotency-Key": "mine"}) == request_id
    assert client.get(f"/v1/requests/{request_id}/status").json()["status"] == "in_queue"
    assert (client.get("/ready").status_code, client.get("/ready").json()["status"]) == (
        503,
        "stopping",
    )
    assert client.get("/health").status_code == 200


def test_an_unavailable_store_is_503_and_a_bug_is_500(client, context, monkeypatch):
    def broken(*_args, **_kwargs):
        raise JobStoreError

    def faulty(*_args, **_kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(context.store, "list", broken)
    assert error(client.get("/v1/requests")) == (503, "STORE_UNAVAILABLE")
    monkeypatch.setattr(context.store, "list", faulty)
    answer = client.get("/v1/requests")
    assert error(answer) == (500, "INTERNAL")
    assert "a bug" not in answer.text


def test_unknown_paths_and_methods_are_404_and_405(client):
    assert error(client.get("/nothing")) == (404, "NOT_FOUND")
    answer = client.put("/v1/inference")
    assert error(answer) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "POST"


def test_calls_have_an_id(client):
    assert (
        client.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    made = client.get("/health", headers={"X-Request-ID": "no\tid"}).headers["x-request-id"]
    assert made not in ("no\tid", "")


# --- operations ---------------------------------------------------------------------------------


def test_metrics_count(client, context):
    from fidelora.workers.attempt import AttemptReport

    submit(client)
    client.get("/v1/requests/unknown/status")
    timings = {"load": 0.2, "adapters": 0.1, "denoise": 5.0, "decode": 0.1}
    context.metrics.attempt_ended(
        AttemptReport("a", "succeeded", "", 3.0, 2, 50, timings, 1, 2, claim_s=0.004)
    )
    context.metrics.attempt_ended(AttemptReport("b", "failed", "TIMEOUT", None, 0, 0, {}, 1, 0))
    lines = dict(
        line.rsplit(" ", 1)
        for line in client.get("/metrics").text.splitlines()
        if not line.startswith("#")
    )
    assert float(lines['fidelora_requests{status="in_queue"}']) == 1
    assert float(lines["fidelora_images_total"]) == 2
    assert float(lines['fidelora_failures_total{code="TIMEOUT"}']) == 1
    assert float(lines["fidelora_queue_wait_seconds_sum"]) == 3
    assert float(lines['fidelora_claim_seconds_bucket{le="0.005"}']) == 1
    assert float(lines["fidelora_claim_seconds_count"]) == 1
    assert 0 < float(lines["fidelora_queue_age_seconds"]) < 3600
    free, size = (
        float(lines[f'fidelora_disk_{one}_bytes{{folder="data"}}']) for one in ("free", "size")
    )
    assert 0 < free <= size
    assert float(lines["fidelora_step_seconds_sum"]) == pytest.approx(0.1)
    assert float(lines["fidelora_adapter_switch_seconds_sum"]) == pytest.approx(0.1)
    assert (
        float(lines['fidelora_adapter_cache_total{result="hit"}']),
        float(lines['fidelora_adapter_cache_total{result="miss"}']),
    ) == (2, 2)
    route = 'method="GET",route="/v1/requests/{request_id}/status",status="404"'
    assert float(lines[f"fidelora_http_requests_total{{{route}}}"]) == 1


def test_a_lora_that_a_request_names_many_times_is_read_once(client, context, monkeypatch):
    resolve, resolved = context.resolver.resolve, []

    async def count(path: str, **given: Any) -> Any:
        resolved.append(path)
        return await resolve(path, **given)

    monkeypatch.setattr(context.resolver, "resolve", count)
    loras = [{"path": "sks.safetensors", "network_multiplier": each / 100} for each in range(100)]
    request_id = submit(client, MINIMAL | {"loras": loras})
    (recipe,) = context.store.get(request_id).recipes
    assert [ref.multiplier for ref in recipe.adapters] == [each / 100 for each in range(100)]
    assert resolved == ["sks.safetensors"]


def test_workers_are_listed_with_their_requests(client, context):
    assert client.get("/v1/workers").json() == {"workers": []}
    worker = ManualWorker(context)
    request_id = submit(client)
    job = worker.claim()
    busy = WorkerState(
        job.worker or "", "cuda:0", "1.2", loaded=frozenset("ba"), models=("sdxl", "sd15")
    )
    context.store.report_worker(busy)
    context.store.report_worker(WorkerState("z", "cpu", "1.2", idle_since=now()))
    first, second = client.get("/v1/workers").json()["workers"]
    assert (first["device"], first["request_id"], first["idle_s"]) == ("cuda:0", request_id, None)
    assert (first["adapters"], first["merged_adapters"]) == (["a", "b"], [])
    assert first["models"] == ["sdxl", "sd15"]
    assert (second["name"], second["request_id"]) == ("z", None)
    assert second["idle_s"] < 60


def test_old_requests_are_removed_with_their_images(tmp_path):
    from datetime import timedelta
    from pathlib import Path

    context = context_in(tmp_path, keep_days=1, keep_requests=2)
    worker = ManualWorker(context)
    with client_of(context) as client:
        ids = [submit(client) for _ in range(5)]
        waiting = ids[-1]
        done = [worker.succeed(worker.claim()) for _ in range(4)]
        clean(context)
        left = {entry["request_id"] for entry in client.get("/v1/requests").json()["requests"]}
        assert left == {done[2].id, done[3].id, waiting}
        assert [Path(job.outputs[0].file_path).exists() for job in done] == [
            False,
            False,
            True,
            True,
        ]
        context.store.remove_finished(before=now() + timedelta(days=1), keep=10)
        assert [entry["request_id"] for entry in client.get("/v1/requests").json()["requests"]] == [
            waiting
        ]
