"""`POST /v1/explain` on a real server, and the client's method for it."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.explain.other_programs import png
from tests.server.serve_support import Server
from tests.support import GOLDEN_JOBS, TINY_BASE

from fidelora import Engine
from fidelora.client import Client
from fidelora.errors import ApiError
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")
RUN = GOLDEN_JOBS / "lora_linear_f32"
SAMPLE = sorted((RUN / "samples").iterdir())[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("explain")
    shutil.copytree(RUN, data / "runs" / "ball")
    started = Server(
        data, TINY_BASE, OMP_NUM_THREADS="2", FIDELORA_JOBS_PATH=str(data / "runs"),
        FIDELORA_JOB_MAX_MB="1",
    )  # fmt: skip
    started.ready()
    yield started
    started.close()


def packed(folder: Path) -> Path:
    path = folder / "run.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in RUN.rglob("*"):
            archive.write(file, f"output/{file.relative_to(RUN)}")
    return path


def test_a_sample_is_recognised_in_a_run_of_the_server(server):
    with Client(server.url) as client:
        found = client.explain(SAMPLE, "ball")
    assert (found.same, found.differences) == (True, [])
    assert (found.picture, found.sample.index) == (SAMPLE.name, 1)


def test_a_difference_is_explained_with_a_zip_and_settings(server, tmp_path):
    recipe = plan_samples(read_run(RUN), 6, base_model=str(TINY_BASE))[1].recipe
    pixels = Engine(device="cpu").generate(replace(recipe, guidance_scale=9.0)).pixels
    known: dict[str, Any] = {
        "program": "diffusers", "prompt": recipe.prompt, "steps": recipe.steps,
        "sampler": recipe.sampler, "guidance": 9.0, "seed": recipe.seed,
    }  # fmt: skip
    with Client(server.url) as client:
        found = client.explain(
            png(pixels), packed(tmp_path), index=1, negative=recipe.negative_prompt, clip_skip=0,
            **known,
        )  # fmt: skip
        with pytest.raises(ApiError, match="clip_skip"):
            client.explain(png(pixels), packed(tmp_path), clip_skip=13, **known)
    assert (found.same, found.program, found.explained) == (False, "diffusers", True)
    assert [(one.cause, one.theirs, one.ours) for one in found.differences] == [
        ("guidance", "9", "4.5")
    ]


def test_nothing_remains_on_the_server(server):
    with Client(server.url) as client:
        client.explain(SAMPLE, "ball")
    assert list((server.data / "explanations").iterdir()) == []


@pytest.mark.parametrize(
    ("run", "message"), [("none", "not on this server"), ("../loras", "not on this server")]
)
def test_a_run_that_does_not_exist_is_refused(server, run, message):
    with Client(server.url) as client, pytest.raises(ApiError, match=message) as raised:
        client.explain(SAMPLE, run)
    assert (raised.value.status, raised.value.code) == (400, "EXPLANATION_FAILED")


def test_files_that_cannot_be_used_are_refused_without_paths(server, tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no zip")
    with Client(server.url) as client:
        with pytest.raises(ApiError, match="zip cannot be unpacked") as raised:
            client.explain(SAMPLE, broken)
        assert str(server.data) not in str(raised.value)
        with pytest.raises(ApiError, match="not a PNG, JPEG or WebP image") as raised:
            client.explain(b"no picture", "ball")
        assert raised.value.code == "EXPLANATION_FAILED"
        assert str(server.data) not in str(raised.value)
        with pytest.raises(ApiError, match="no sample to compare with"):
            client.explain(SAMPLE, "ball", index=99)


def test_a_zip_over_the_limit_is_refused(server, tmp_path):
    large = tmp_path / "large.zip"
    large.write_bytes(bytes(2**20 + 1))
    with Client(server.url) as client, pytest.raises(ApiError, match="too large") as raised:
        client.explain(SAMPLE, large)
    assert raised.value.code == "BODY_TOO_LARGE"


def test_a_run_has_to_be_sent_or_named(server):
    answer = httpx2.post(f"{server.url}/v1/explain", files={"picture": SAMPLE.read_bytes()})
    assert answer.status_code == 422
    assert "either run (a zip) or run_name" in answer.text


def test_options_in_texts_remain_texts(server):
    with Client(server.url) as client:
        found = client.explain(SAMPLE, "ball", prompt="--help", index=1)
    assert found.same
