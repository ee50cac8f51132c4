"""Access of API keys to requests and uploads: their own, or all with an admin key."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from tests.server.http_support import (
    MINIMAL,
    ManualWorker,
    in_thread,
    jobs_succeeding,
    now,
    only_job,
    png_with_parameters,
)
from tests.support import GOLDEN_JOBS, LORA

from fidelora.jobs.job import Status, new_job
from fidelora.recipe import AdapterRef, Recipe, file_sha256

LOKR = GOLDEN_JOBS / "lokr_full" / "lokr_full.safetensors"
TXT2IMG = {"prompt": "a ball", "steps": 2, "width": 64, "height": 64}


@pytest.fixture
def keys(context):
    """Headers with the keys of two users and an admin, by name."""
    secrets = {
        "alice": context.keys.add("alice"),
        "bob": context.keys.add("bob"),
        "admin": context.keys.add("admin", is_admin=True),
    }
    return {name: {"Authorization": f"Bearer {secret}"} for name, secret in secrets.items()}


def error(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["detail"]["error"]["code"]


def submit(client: Any, key: Any, body: Any = MINIMAL) -> str:
    answer = client.post("/v1/inference", json=body, headers=key)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def upload(client: Any, key: Any, content: bytes, name: str = "own.safetensors") -> Any:
    return client.post("/v1/loras", files={"file": (name, content)}, headers=key)


def with_lora(path: str) -> dict[str, Any]:
    return MINIMAL | {"loras": [{"path": path}]}


PATHS = [
    ("GET", "status"),
    ("GET", "result"),
    ("GET", "events"),
    ("GET", "images/0"),
    ("DELETE", ""),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_request_of_another_key_does_not_exist(client, context, keys, method, path):
    request_id = submit(client, keys["alice"])
    job = ManualWorker(context).succeed(ManualWorker(context).claim())
    assert (job.id, job.owner) == (request_id, context.keys.all()[1].id)
    url = f"/v1/requests/{request_id}/{path}".rstrip("/")
    unknown = f"/v1/requests/{'0' * 32}/{path}".rstrip("/")
    foreign = client.request(method, url, headers=keys["bob"])
    assert error(foreign) == (404, "REQUEST_NOT_FOUND")
    assert foreign.content == client.request(method, unknown, headers=keys["bob"]).content
    for name in ("alice", "admin"):
        assert client.request(method, url, headers=keys[name]).status_code == 200


def test_another_key_cannot_cancel_a_request(client, context, keys):
    request_id = submit(client, keys["alice"])
    assert client.delete(f"/v1/requests/{request_id}", headers=keys["bob"]).status_code == 404
    assert context.store.get(request_id).status is Status.IN_QUEUE
    client.delete(f"/v1/requests/{request_id}", headers=keys["admin"])
    assert context.store.get(request_id).status is Status.CANCELED


def test_workers_are_listed_for_admin_keys_only(client, keys):
    assert error(client.get("/v1/workers", headers=keys["alice"])) == (403, "ADMIN_KEY_REQUIRED")
    assert client.get("/v1/workers").status_code == 401
    assert client.get("/v1/workers", headers=keys["admin"]).json() == {"workers": []}


def test_the_list_has_the_requests_of_the_key(client, context, keys):
    old = context.store.add(new_job((Recipe(prompt="from before"),), now())).id
    ids = {name: submit(client, keys[name]) for name in ("alice", "bob")}

    def listed(name: str, **query: Any) -> Any:
        return client.get("/v1/requests", headers=keys[name], params=query).json()

    for name, request_id in ids.items():
        assert [one["request_id"] for one in listed(name)["requests"]] == [request_id]
    everything = [one["request_id"] for one in listed("admin")["requests"]]
    assert everything == [ids["bob"], ids["alice"], old]
    foreign = client.get("/v1/requests", params={"cursor": ids["bob"]}, headers=keys["alice"])
    assert error(foreign) == (400, "CURSOR_NOT_KNOWN")


def test_requests_without_an_owner_belong_to_admins(client, context, keys):
    """Requests that older versions stored, or that were made without keys, have no owner."""
    old = context.store.add(new_job((Recipe(prompt="from before"),), now()))
    url = f"/v1/requests/{old.id}/status"
    assert error(client.get(url, headers=keys["alice"])) == (404, "REQUEST_NOT_FOUND")
    assert client.get(url, headers=keys["admin"]).status_code == 200
    context.keys.set_admin("alice", True)
    assert client.get(url, headers=keys["alice"]).status_code == 200
    context.keys.set_admin("alice", False)
    assert client.get(url, headers=keys["alice"]).status_code == 404


def test_a_new_key_of_the_same_name_has_nothing_of_the_old(client, context, keys):
    submission = {"Idempotency-Key": "mine"}
    request_id = submit(client, keys["alice"] | submission)
    uploaded = upload(client, keys["alice"], LOKR.read_bytes()).json()["path"]
    context.keys.remove("alice")
    new = {"Authorization": f"Bearer {context.keys.add('alice')}"}
    assert client.get(f"/v1/requests/{request_id}/status", headers=new).status_code == 404
    assert client.post("/v1/inference", json=with_lora(uploaded), headers=new).status_code == 400
    assert submit(client, new | submission) != request_id


def test_without_keys_everything_is_visible(client, context):
    foreign = context.store.add(new_job((Recipe(prompt="a"),), now(), owner="0" * 16))
    mine = submit(client, {})
    assert context.store.get(mine).owner == ""
    assert client.get(f"/v1/requests/{foreign.id}/status").status_code == 200
    assert len(client.get("/v1/requests").json()["requests"]) == 2
    path = upload(client, {}, LOKR.read_bytes()).json()["path"]
    assert path == "uploads/own.safetensors"
    folder = context.settings.loras / "uploads" / ("key-" + "0" * 16)
    folder.mkdir()
    shutil.copyfile(LORA, folder / "other.safetensors")
    paths = [one["path"] for one in client.get("/v1/loras").json()["loras"]]
    assert f"uploads/{folder.name}/other.safetensors" in paths
    submit(client, {}, with_lora(f"uploads/{folder.name}/other.safetensors"))


def test_idempotency_keys_belong_to_an_api_key(client, keys):
    ids = [submit(client, keys[name] | {"Idempotency-Key": "same"}) for name in keys]
    assert len(set(ids)) == 3
    assert submit(client, keys["alice"] | {"Idempotency-Key": "same"}) == ids[0]
    other = MINIMAL | {"prompts": [{"prompt": "another"}]}
    assert submit(client, keys["bob"] | {"Idempotency-Key": "of bob"}, other)


def test_the_key_file_of_an_older_version_has_no_admins(client, context):
    key = context.keys.add("old")
    path = context.settings.data_dir / "api_keys.json"
    path.write_text(path.read_text().replace(',\n      "admin": false', ""))
    assert '"admin"' not in path.read_text()
    foreign = context.store.add(new_job((Recipe(prompt="a"),), now()))
    answer = client.get(
        f"/v1/requests/{foreign.id}/status", headers={"Authorization": f"Bearer {key}"}
    )
    assert answer.status_code == 404


def test_the_owner_reveals_nothing_of_the_key(context):
    secret = context.keys.add("alice")
    key = context.keys.find(secret)
    assert len(key.id) == 16
    assert key.id not in secret
    assert key.id not in key.sha256


# --- uploads --------------------------------------------------------------------------------------


def paths_of(client: Any, key: Any) -> list[str]:
    loras = client.get("/v1/loras", headers=key).json()["loras"]
    return [one["path"] for one in loras if one["uploaded"]]


def spellings(path: str, root: Any) -> list[str]:
    return [path, f"./{path}", path.replace("/", "//", 1), str(root / path)]


def test_an_upload_of_another_key_does_not_exist(client, context, keys):
    path = upload(client, keys["alice"], LOKR.read_bytes()).json()["path"]
    assert path == f"uploads/key-{context.keys.all()[1].id}/own.safetensors"
    assert paths_of(client, keys["alice"]) == paths_of(client, keys["admin"]) == [path]
    assert paths_of(client, keys["bob"]) == []
    for name in spellings(path, context.settings.loras):
        body = with_lora(name)
        for key in ("alice", "admin"):
            submit(client, keys[key], body)
        foreign = client.post("/v1/inference", json=body, headers=keys["bob"])
        assert error(foreign) == (400, "LORA_NOT_FOUND")
        unknown = with_lora(name.replace("own", "xyz"))
        expected = client.post("/v1/inference", json=unknown, headers=keys["bob"]).text
        assert foreign.text == expected.replace("xyz", "own")
    submit(client, keys["bob"])  # the folder's own LoRA


def test_two_keys_can_upload_files_of_the_same_name(client, keys):
    contents = {"alice": LOKR.read_bytes(), "bob": LORA.read_bytes()}
    answers = {name: upload(client, keys[name], content) for name, content in contents.items()}
    assert [one.status_code for one in answers.values()] == [201, 201]
    assert answers["alice"].json()["path"] != answers["bob"].json()["path"]
    assert upload(client, keys["alice"], contents["alice"]).status_code == 200
    assert error(upload(client, keys["alice"], contents["bob"])) == (409, "LORA_EXISTS")


@pytest.mark.parametrize("form", ["whole", "without uploads/"])
def test_a_key_can_delete_only_its_own_uploads(client, keys, form):
    path = upload(client, keys["alice"], LOKR.read_bytes()).json()["path"]
    url = f"/v1/loras/{path if form == 'whole' else path.removeprefix('uploads/')}"
    assert error(client.delete(url, headers=keys["bob"])) == (404, "UPLOAD_NOT_FOUND")
    short = "/v1/loras/own.safetensors"
    assert error(client.delete(short, headers=keys["bob"])) == (404, "UPLOAD_NOT_FOUND")
    assert paths_of(client, keys["alice"]) == [path]
    assert client.delete(url, headers=keys["alice"]).status_code == 204
    upload(client, keys["alice"], LOKR.read_bytes())
    assert client.delete(url, headers=keys["admin"]).status_code == 204
    upload(client, keys["alice"], LOKR.read_bytes())
    assert client.delete(short, headers=keys["alice"]).status_code == 204


def test_uploads_made_without_keys_belong_to_every_key(client, context, keys):
    """They were made by an older version, or before the server had keys."""
    uploads = context.settings.loras / "uploads"
    uploads.mkdir(exist_ok=True)
    shutil.copyfile(LOKR, uploads / "old.safetensors")
    for key in keys.values():
        submit(client, key, with_lora("uploads/old.safetensors"))
    for request in client.get("/v1/requests", headers=keys["admin"]).json()["requests"]:
        client.delete(f"/v1/requests/{request['request_id']}", headers=keys["admin"])
    for name in ("old.safetensors", "uploads/old.safetensors"):
        answer = client.delete(f"/v1/loras/{name}", headers=keys["alice"])
        assert error(answer) == (404, "UPLOAD_NOT_FOUND")
    assert client.delete("/v1/loras/old.safetensors", headers=keys["admin"]).status_code == 204


def replay(client: Any, key: Any, ref: AdapterRef) -> Any:
    recipe = Recipe(prompt="a", base_model="tiny", adapters=(ref,), width=64, height=64)
    body = {"recipe": recipe.to_dict(), "base_model": "server"}
    return client.post("/v1/replay", json=body, headers=key)


def test_a_hash_gives_no_access_to_the_upload_of_another_key(client, context, keys):
    """Images contain the hashes of their LoRAs, and a used LoRA is in the adapter cache."""
    path = upload(client, keys["alice"], LOKR.read_bytes()).json()["path"]
    submit(client, keys["alice"], with_lora(path))
    ref = AdapterRef(file_sha256(LOKR), name="own")
    assert context.cache.find(ref.sha256) is not None
    assert error(replay(client, keys["bob"], ref)) == (400, "LORA_BYTES_MISSING")
    assert replay(client, keys["alice"], ref).status_code == 200
    assert replay(client, keys["admin"], ref).status_code == 200
    url = {"path": "https://example.com/x.safetensors", "sha256": ref.sha256}
    body = MINIMAL | {"loras": [url]}
    answer = client.post("/v1/inference", json=body, headers=keys["bob"])
    assert error(answer) == (400, "LORA_URL_NOT_ALLOWED")
    upload(client, keys["bob"], LOKR.read_bytes(), "the-same-file.safetensors")
    assert replay(client, keys["bob"], ref).status_code == 200


# --- the other APIs -------------------------------------------------------------------------------


def test_prompts_find_only_uploads_of_the_same_key(client, context, keys):
    for name in ("alice", "bob"):
        upload(client, keys[name], LOKR.read_bytes(), f"of-{name}.safetensors")
        upload(client, keys[name], LOKR.read_bytes(), "both.safetensors")
    body = TXT2IMG | {"prompt": "a <lora:of-alice:1>"}
    answer = client.post("/sdapi/v1/txt2img", json=body, headers=keys["bob"])
    assert (answer.status_code, answer.json()["error"]) == (400, "LORA_NOT_FOUND")
    sha256 = f"a <lora:{file_sha256(LOKR)[:12]}:1>"
    names = [one["name"] for one in client.get("/sdapi/v1/loras", headers=keys["bob"]).json()]
    assert sorted(names) == ["both", "of-bob", "sks"]
    with jobs_succeeding(ManualWorker(context), png_with_parameters()):
        for prompt in ("a <lora:both:1>", "a <lora:of-bob:1>", sha256):
            answer = client.post(
                "/sdapi/v1/txt2img", json=TXT2IMG | {"prompt": prompt}, headers=keys["bob"]
            )
            assert answer.status_code == 200, answer.text


def test_parameters_find_only_uploads_of_the_same_key(client, keys):
    upload(client, keys["alice"], LOKR.read_bytes(), "of-alice.safetensors")
    text = "a <lora:of-alice:1>\nSteps: 2, Sampler: DDPM, Seed: 1, Size: 64x64"
    answers = {
        name: client.post("/v1/replay", json={"parameters": text}, headers=keys[name])
        for name in ("alice", "bob")
    }
    assert answers["alice"].status_code == 200, answers["alice"].text
    assert error(answers["bob"]) == (400, "LORA_BYTES_MISSING")


def test_progress_and_interrupt_concern_only_requests_of_the_key(client, context, keys):
    running = in_thread(
        lambda: client.post("/sdapi/v1/txt2img", json=TXT2IMG, headers=keys["alice"])
    )
    job = only_job(context)
    claimed = ManualWorker(context).claim()
    ManualWorker(context).step(claimed, 1, 2)
    for name in ("bob", "admin"):
        progress = client.get("/sdapi/v1/progress", headers=keys[name]).json()
        assert progress["state"]["job_count"] == 0
        client.post("/sdapi/v1/interrupt", headers=keys[name])
        client.post("/sdapi/v1/skip", headers=keys[name])
        assert not context.store.get(job.id).cancel_requested
    assert client.get("/sdapi/v1/progress", headers=keys["alice"]).json()["state"]["job_count"]
    client.post("/sdapi/v1/interrupt", headers=keys["alice"])
    assert context.store.get(job.id).cancel_requested
    context.store.stop(job.id, claimed.epoch, now())
    assert running.result(60).status_code == 409


def test_an_image_of_the_openai_api_belongs_to_its_key(client, context, keys):
    body = {"prompt": "a ball", "model": "sd15", "response_format": "url"}
    with jobs_succeeding(ManualWorker(context)):
        answer = client.post("/v1/images/generations", json=body, headers=keys["alice"])
    assert answer.status_code == 200, answer.text
    url = answer.json()["data"][0]["url"].removeprefix(context.base_url)
    assert client.get(url, headers=keys["alice"]).status_code == 200
    assert error(client.get(url, headers=keys["bob"])) == (404, "REQUEST_NOT_FOUND")


def test_a_replayed_image_belongs_to_its_key(client, context, keys):
    text = "a ball\nSteps: 2, Sampler: DDPM, Seed: 1, Size: 64x64"
    answer = client.post("/v1/replay", json={"parameters": text}, headers=keys["alice"])
    request_id = answer.json()["request_id"]
    status = f"/v1/requests/{request_id}/status"
    assert client.get(status, headers=keys["alice"]).status_code == 200
    assert client.get(status, headers=keys["bob"]).status_code == 404


def test_every_route_with_a_request_id_checks_the_key(client, context, keys):
    """Routes that are added later are tested, too."""
    schema = client.get("/openapi.json").json()
    routes = [
        (method, path)
        for path, methods in schema["paths"].items()
        for method in methods
        if "{request_id}" in path
    ]
    assert len(routes) >= 5
    request_id = submit(client, keys["alice"])
    ManualWorker(context).succeed(ManualWorker(context).claim())
    for method, path in routes:
        url = path.replace("{request_id}", request_id).replace("{index}", "0")
        answer = client.request(method, url, headers=keys["bob"])
        assert error(answer) == (404, "REQUEST_NOT_FOUND"), (method, path)


def test_a_stream_belongs_to_the_key_of_its_request(client, context, keys):
    request_id = submit(client, keys["alice"])
    claimed = ManualWorker(context).claim()
    url = f"/v1/requests/{request_id}/events"
    reading = in_thread(lambda: client.get(url, headers=keys["alice"]))
    assert client.get(url, headers=keys["bob"]).status_code == 404
    ManualWorker(context).succeed(claimed)
    assert '"succeeded"' in reading.result(60).text
