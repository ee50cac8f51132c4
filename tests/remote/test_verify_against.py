"""`fidelora verify --against` with servers of each API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import httpx2
import pytest
from tests.explain.other_programs import OtherProgram, comfyui_noise, png
from tests.remote.comfyui import ComfyUI
from tests.server.serve_support import Server
from tests.support import GOLDEN_JOBS, LORA, TINY_BASE

from fidelora import Engine
from fidelora.errors import ApiError, UsageError
from fidelora.remote.connection import Connection
from fidelora.remote.programs import Names, connect
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")
NAME = "lora_linear_f32"
RUN = str(GOLDEN_JOBS / NAME)
Verify = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("against")
    (data / "loras").mkdir()
    shutil.copyfile(LORA, data / "loras" / LORA.name)
    started = Server(data, OMP_NUM_THREADS="2")
    started.ready()
    yield started
    started.close()


@pytest.fixture
def verify(fidelora) -> Verify:
    def run(*arguments: str) -> tuple[int, Any, str]:
        code, out, error = fidelora(
            "verify", RUN, "--base-model", str(TINY_BASE), "--json", "--device", "cpu", *arguments
        )
        return code, json.loads(out) if out else None, error

    return run


def drawn(graph: Mapping[str, Any], guidance: float | None = None) -> bytes:
    """Return ComfyUI's picture for a graph of the run's prompts."""
    return _drawn(json.dumps(graph, sort_keys=True), guidance)


@cache
def _drawn(graph_json: str, guidance: float | None) -> bytes:
    """Draw each picture once, because several tests request the same ones."""
    graph = json.loads(graph_json)
    sampler = graph["3"]["inputs"]
    size = graph["5"]["inputs"]
    plans = plan_samples(read_run(GOLDEN_JOBS / NAME), 6, base_model=str(TINY_BASE))
    recipe = next(one.recipe for one in plans if one.recipe.seed == sampler["seed"])
    program = OtherProgram(Engine(device="cpu"), recipe, whole=True, noise=comfyui_noise)
    pixels = program.picture(
        sampler=sampler["sampler_name"], schedule=sampler["scheduler"], steps=sampler["steps"],
        guidance_scale=guidance or sampler["cfg"], width=size["width"], height=size["height"],
        prompt=graph["6"]["inputs"]["text"], negative_prompt=graph["7"]["inputs"]["text"],
        strength=graph["10"]["inputs"]["strength_model"],
    )  # fmt: skip
    return png(pixels)


@pytest.mark.parametrize("api", [None, "inference", "a1111", "openai"])
def test_our_server_makes_the_samples_with_each_api(server, verify, api):
    options = ["--api", api] if api else []
    code, found, _ = verify("--against", server.url, *options)
    assert (code, found["api"]) == (0, api or "fidelora")
    assert {one["verdict"] for one in found["samples"]} <= {"identical", "rounding"}
    assert [one["index"] for one in found["samples"]] == [0, 1, 2]


@pytest.mark.parametrize("is_combo", [False, True])
def test_comfyui_is_found_and_makes_the_expected_pictures(verify, tmp_path, is_combo):
    comfyui = ComfyUI(drawn, is_combo=is_combo)
    code, found, _ = verify("--against", comfyui.url, "--save-images", str(tmp_path))
    comfyui.close()
    assert (code, found["api"], found["verdict"]) == (0, "comfyui", "expected")
    first = found["samples"][0]
    assert first["sampling"] == "euler, normal"
    assert first["from_expected"] < 0.1
    assert first["mean"] == pytest.approx(first["expected_mean"], abs=0.1)
    graph = comfyui.graphs[0]
    assert graph["4"]["inputs"]["ckpt_name"] == "models/tiny-sd15.safetensors"
    assert graph["10"]["inputs"]["lora_name"] == "people/lora_linear_f32.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6_0.png", "6_1.png", "6_2.png"]


def test_another_guidance_in_comfyui_is_a_mismatch(verify):
    comfyui = ComfyUI(lambda graph: drawn(graph, guidance=9.0))
    code, found, _ = verify("--against", comfyui.url)
    assert (code, found["verdict"]) == (1, "mismatch")
    code, found, _ = verify("--against", comfyui.url, "--tolerance", "255")
    comfyui.close()
    assert (code, found["verdict"]) == (0, "expected")


def test_errors_of_comfyui_are_reported(verify):
    def fail(_: Mapping[str, Any]) -> bytes:
        raise RuntimeError("out of memory")

    comfyui = ComfyUI(fail)
    code, _, error = verify("--against", comfyui.url)
    assert code == 2
    assert "KSampler: out of memory" in error
    code, _, error = verify("--against", comfyui.url, "--server-model", "x.safetensors")
    comfyui.close()
    assert code == 2
    assert "'x.safetensors' not in list" in error


def test_the_key_is_read_from_the_environment(verify, monkeypatch):
    comfyui = ComfyUI(drawn)
    monkeypatch.setenv("VERIFY_API_KEY", "secret")
    verify("--against", comfyui.url)
    comfyui.close()
    assert set(comfyui.authorizations) == {"Bearer secret"}


def test_a_missing_file_in_comfyui_is_named(verify, tmp_path):
    comfyui = ComfyUI(drawn)
    other = shutil.copytree(TINY_BASE, tmp_path / "another")
    code, _, error = verify("--against", comfyui.url, "--base-model", str(other))
    comfyui.close()
    assert code == 2
    assert "no file named another; set --server-model to one of: other.safetensors" in error


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8188", "is not the address of a server"),
        ("ftp://host", "is not the address of a server"),
        ("http://me:secret@host", "must not contain a password"),
        ("http://host/?token=secret", "must not contain a password"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(url, message):
    with pytest.raises(UsageError, match=message) as raised:
        Connection(url, timeout_s=1)
    assert "secret" not in str(raised.value)


def test_redirects_are_not_followed():
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.host)
        return httpx2.Response(302, headers={"Location": "http://other.test/"})

    with (
        Connection(
            "http://named.test", key="k", timeout_s=1, transport=httpx2.MockTransport(answer)
        ) as connection,
        pytest.raises(ApiError, match="Redirects are not followed"),
    ):
        connect(connection, None, Names())
    assert set(asked) == {"named.test"}


@pytest.mark.parametrize(
    ("paths", "api"),
    [
        ({"/system_stats": {"system": {}}}, "comfyui"),
        ({"/sdapi/v1/samplers": []}, "a1111"),
        ({"/v1/models": {"models": []}}, "inference"),
        ({"/v1/models": {"data": []}}, "openai"),
        ({"/openapi.json": {"info": {"title": "Fidelora"}}}, "fidelora"),
    ],
)
def test_the_api_of_a_server_is_found(paths, api):
    def answer(request: httpx2.Request) -> httpx2.Response:
        found = paths.get(request.url.path)
        return httpx2.Response(404) if found is None else httpx2.Response(200, json=found)

    transport = httpx2.MockTransport(answer)
    with Connection("http://named.test", timeout_s=1, transport=transport) as connection:
        assert connect(connection, None, Names()).api == api


def test_another_kind_of_server_is_refused(verify):
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, text="<html>"))
    with (
        Connection("http://named.test", timeout_s=1, transport=transport) as connection,
        pytest.raises(ApiError, match="none of the supported APIs"),
    ):
        connect(connection, None, Names())
    code, _, error = verify("--against", "http://127.0.0.1:1")
    assert code == 2
    assert "cannot be reached" in error


def test_the_options_against_and_doctor_cannot_be_combined(verify):
    code, _, error = verify("--against", "http://127.0.0.1:1", "--doctor")
    assert code == 2
    assert "cannot be combined" in error
