"""`fidelora serve` end to end: a real process that makes images, stops and is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.server.serve_support import DEADLINE_S, Server, until
from tests.support import LORA, MINIATURE_LORA, TINY_BASE
from tools.miniature.judge import score
from tools.miniature.world import Scene, Thing

from fidelora.client import Client
from fidelora.images.read import read_record
from fidelora.jobs.sql import SqlStore

pytestmark = pytest.mark.timeout(600)  # waits up to `DEADLINE_S` at each step


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    shutil.copyfile(LORA, tmp_path / "loras" / "sks.safetensors")
    return tmp_path


@pytest.fixture
def start(data):
    started: list[Server] = []

    def begin(base: Path | str = TINY_BASE, **settings: str) -> Server:
        started.append(Server(data, base, **settings))
        return started[-1]

    yield begin
    for server in started:
        server.close()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_documented_request_makes_the_command_lines_image(start, data):
    # With the page, as by default: it must not keep the server from stopping.
    server = start(BASE_URL="http://localhost:8000", FIDELORA_PAGE="true")
    body = {
        "model": "sd15",
        "trigger_word": "sks",
        "loras": [{"path": "sks.safetensors", "network_multiplier": 1.0}],
        # The documented request has the default size and steps, which take much longer.
        "prompts": [
            {
                "prompt": "a photo of [trigger]",
                "width": 320,
                "height": 256,
                "seed": 42,
                "sample_steps": 2,
            }
        ],
    }
    accepted = server.call("/v1/inference", body)
    assert accepted["status"] == "queued"
    assert (
        accepted["status_url"]
        == f"http://localhost:8000/v1/requests/{accepted['request_id']}/status"
    )
    server.wait(accepted["request_id"], "succeeded", "failed", "canceled")
    result = server.call(f"/v1/requests/{accepted['request_id']}/result")
    assert result["status"] == "succeeded", result["error"]
    (image,) = result["outputs"]["images"]
    file = data / "outputs" / f"{accepted['request_id']}_output_0.png"
    assert (
        image["file_path"],
        image["format"],
        image["width"],
        image["height"],
        image["seed"],
    ) == (
        str(file),
        "png",
        320,
        256,
        42,
    )
    assert file.stat().st_mode & 0o044, "other users cannot read the file"
    assert server.terminate() == 0

    out = data / "cli.png"
    command = [
        sys.executable, "-m", "fidelora", "generate", "a photo of [trigger]", "--trigger", "sks",
        "--lora", str(data / "loras" / "sks.safetensors"),
        "--width", "320", "--height", "256", "--steps", "2",
        "--base-model", str(TINY_BASE), "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, check=True, env=environment, timeout=DEADLINE_S)
    assert np.array_equal(pixels(file), pixels(out))
    assert read_record(file)["digest"] == read_record(out)["digest"]
    assert out.read_bytes() == file.read_bytes()


def test_bundled_base_model_draws_the_prompts(start, data):
    """The bundled base model and its uploaded LoRA make images that a judge recognises."""
    server = start("fidelora:miniature")
    scenes = {
        "a red star on a white background": Scene((Thing("star", "red"),), "white"),
        "a yellow circle on a blue background": Scene((Thing("circle", "yellow"),), "blue"),
        "a green square on a black background": Scene((Thing("square", "green"),), "black"),
        "a blue [trigger] on a white background": Scene((Thing("moon", "blue"),), "white"),
        "a large yellow [trigger] on a purple background": Scene(
            (Thing("moon", "yellow"),), "purple"
        ),
    }
    with Client(server.url) as client:
        lora = client.upload_lora(MINIATURE_LORA)
        result = client.generate(
            list(scenes),
            lora.path,
            trigger_word="sks",
            width=128,
            height=128,
            seed=1,
            timeout_s=DEADLINE_S,
        )
        files = client.save_images(result, data / "saved")
    right = [score(pixels(file), scene) for file, scene in zip(files, scenes.values(), strict=True)]
    assert sum(one.shape and one.colour and one.background for one in right) >= 4, right


def test_a_running_request_is_canceled_soon(tiny_server):
    server = tiny_server
    request_id = server.submit(width=512, height=512, sample_steps=150)
    before = until(lambda: (found := server.status(request_id))["progress"] and found)
    server.call(f"/v1/requests/{request_id}", method="DELETE")
    after = server.wait(request_id, "canceled")
    ended = until(  # the log is read in a thread
        lambda: [
            entry
            for entry in server.log
            if entry.get("request_id") == request_id and "job ends" in entry["event"]
        ]
    )
    assert ended[0]["event"] == "job ends: canceled"
    # The reported step can be half a second old, so the request was at this step or later.
    assert after["progress"]["step"] <= before["progress"]["step"] + 10
    assert after["error"] is None
    done = server.submit()
    server.wait(done, "succeeded")


def test_sigterm_requeues_a_long_request_and_finishes_a_short_one(start, data):
    server = start(FIDELORA_STOP_GRACE="0")
    server.ready()
    long = server.submit(width=512, height=512, sample_steps=150)
    until(lambda: server.status(long)["progress"])
    assert server.terminate() == 0
    store = SqlStore(f"sqlite:///{data}/jobs.sqlite")
    job = store.get(long)
    assert (job.status.value, job.attempts) == ("in_queue", 0)
    assert list((data / "outputs").iterdir()) == []

    again = start(FIDELORA_STOP_GRACE="100")
    again.call(f"/v1/requests/{long}", method="DELETE")
    again.ready()
    short = again.submit(sample_steps=60)
    waiting = again.submit()
    until(lambda: again.status(short)["status"] == "in_progress")
    assert again.terminate() == 0
    assert store.get(short).status.value == "succeeded"
    assert store.get(waiting).status.value == "in_queue"
    store.close()


def test_a_second_signal_ends_the_grace_period(start, data):
    server = start(FIDELORA_STOP_GRACE="1000")
    server.ready()
    long = server.submit(width=512, height=512, sample_steps=150)
    until(lambda: server.status(long)["progress"])
    server.process.send_signal(signal.SIGINT)
    until(lambda: any(entry["event"] == "stopping" for entry in server.log))
    assert server.terminate_repeatedly() == 0
    store = SqlStore(f"sqlite:///{data}/jobs.sqlite")
    assert (store.get(long).status.value, store.get(long).attempts) == ("in_queue", 0)
    store.close()


def test_a_stopping_server_serves_status_and_rejects_requests(start):
    server = start(FIDELORA_STOP_GRACE="100")
    server.ready()
    request_id = server.submit(width=512, height=512, sample_steps=150)
    until(lambda: server.status(request_id)["progress"])
    server.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            server.submit()
        except urllib.error.HTTPError as error:
            return error.code == 503
        return False

    until(refused)
    assert server.status(request_id)["status"] == "in_progress"
    with pytest.raises(urllib.error.HTTPError, match="503"):
        server.call("/ready")
    server.call(f"/v1/requests/{request_id}", method="DELETE")  # or it would run for a minute
    assert server.process.wait(90) == 0


def test_a_worker_that_is_killed_costs_an_attempt(tiny_server):
    server = tiny_server
    request_id = server.submit(width=512, height=512, sample_steps=60)
    until(lambda: server.status(request_id)["progress"])
    children = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "spawn_main"],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    until(lambda: server.status(request_id)["status"] == "in_queue")
    until(lambda: server.status(request_id)["status"] == "in_progress")
    server.call(f"/v1/requests/{request_id}", method="DELETE")
    server.wait(request_id, "canceled")


def refused(data: Path, *options: str) -> tuple[int, str]:
    """Run a server that cannot start; returns its exit code and the last line on stderr."""
    environment = os.environ | {
        "FIDELORA_DATA_DIR": str(data),
        "DEVICE": "cpu",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-m", "fidelora", "serve", "--port", "0", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=data, timeout=60
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        (["--host", "0.0.0.0"], {}, "the server needs an API key"),
        (["--base-model", "/nowhere"], {}, "base model /nowhere was not found"),
        (["--device", "cuda:7"], {}, "cuda:7 was requested"),
        ([], {"INFERENCE_TIMEOUT": "0"}, "INFERENCE_TIMEOUT"),
        ([], {"FIDELORA_STORE_URL": "sqlite:////nowhere/at/all.sqlite"}, "cannot be used"),
    ],
)
def test_unusable_settings_end_the_start_with_an_error(
    fidelora, data, monkeypatch, options, settings, words
):
    monkeypatch.setattr("fidelora.server.run.configure_logs", lambda *_: None)  # changes all logs
    monkeypatch.chdir(data)
    for name, value in ({"FIDELORA_DATA_DIR": str(data), "DEVICE": "cpu"} | settings).items():
        monkeypatch.setenv(name, value)
    if "--base-model" not in options:
        options = [*options, "--base-model", str(TINY_BASE)]
    code, _, err = fidelora("serve", "--port", "0", *options)
    last = err.strip().splitlines()[-1]
    assert code in (1, 2)
    assert last.startswith("error: ")
    assert words in last


def test_a_data_folder_and_a_port_have_only_one_server(tiny_server, data):
    code, last = refused(tiny_server.data, "--base-model", str(TINY_BASE))
    assert (code, "Another server uses the data folder" in last) == (2, True)
    port = tiny_server.url.rsplit(":", 1)[1]
    code, last = refused(data, "--base-model", str(TINY_BASE), "--port", port)
    assert (code, "cannot listen on" in last) == (2, True)


def test_ready_reports_a_base_model_that_cannot_be_loaded(start, data):
    base = shutil.copytree(TINY_BASE, data / "base")
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    server = start(base)

    def reason() -> str:
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.call("/ready")
        return str(json.load(caught.value)["reason"])

    assert "is a web page" in until(reason)
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.submit()
    assert refused.value.code == 503
    assert "is a web page" in json.load(refused.value)["detail"]["error"]["message"]
    shutil.copytree(TINY_BASE, base, dirs_exist_ok=True)
    server.ready()  # the next worker loads the repaired base
    server.wait(server.submit(), "succeeded")
    told = ("listening", "not ready, trying again", "ready")
    until(  # the log is read in a thread
        lambda: (
            tuple(dict.fromkeys(entry["event"] for entry in server.log if entry["event"] in told))
            == told
        )
    )


def test_api_keys_are_managed_on_the_command_line(fidelora, data, monkeypatch):
    monkeypatch.setenv("FIDELORA_DATA_DIR", str(data))

    def keys(*arguments: str) -> str:
        _, out, error = fidelora("keys", *arguments)
        return str(out + error).strip()

    key = keys("add", "my app")
    assert key.startswith("fl_")
    assert key not in (data / "api_keys.json").read_text()
    assert keys("list") == "my app"
    assert "exists already" in keys("add", "my app")
    assert keys("admin", "my app") == ""
    assert keys("list") == "my app (admin)"
    keys("admin", "my app", "--off")
    assert re.fullmatch("[0-9a-f]{16}  my app", keys("list", "--ids"))
    keys("add", "boss", "--admin")
    assert keys("list") == "boss (admin)\nmy app"
    assert "does not exist" in keys("admin", "nobody")
    keys("remove", "boss")
    assert "This was the last key" in keys("remove", "my app")
    assert keys("list") == ""
    assert "does not exist" in keys("remove", "my app")
    assert json.loads((data / "api_keys.json").read_text())["keys"] == []
