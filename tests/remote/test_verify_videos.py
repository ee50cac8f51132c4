"""`fidelora verify --against` with samples that are videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.serve_support import Server
from tests.support import GOLDEN_JOBS, TINY_WAN21

RUN = GOLDEN_JOBS / "wan21_video_f32"
COMMAND = ("verify", "--base-model", str(TINY_WAN21), "--json", "--device", "cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("against-videos")
    (data / "loras").mkdir()
    shutil.copyfile(RUN / "wan21_video_f32.safetensors", data / "loras" / "wan.safetensors")
    started = Server(data, f"wan21_1b={TINY_WAN21}", OMP_NUM_THREADS="2")
    yield started
    started.close()


def edited(folder: Path, old: str, new: str) -> Path:
    """Return a copy of the training run with another configuration."""
    run = folder / "run"
    shutil.copytree(RUN, run)
    config = run / "config.yaml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    return run


def test_our_server_makes_the_videos_of_a_run(server, fidelora, tmp_path):
    options = ("--against", server.url, "--save-images", str(tmp_path))
    code, out, _ = fidelora(*COMMAND, str(RUN), *options)
    found = json.loads(out)["samples"]
    assert code == 0
    assert {one["verdict"] for one in found} <= {"identical", "rounding"}
    assert [(one["width"], one["height"]) for one in found] == [(64, 64), (64, 64)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6_0.webp", "6_1.webp"]


@pytest.mark.parametrize(
    ("old", "new"), [("seed: 42", "seed: 43"), ("num_frames: 9", "num_frames: 13")]
)
def test_other_frames_of_a_server_are_a_mismatch(server, fidelora, tmp_path, old, new):
    code, out, _ = fidelora(*COMMAND, str(edited(tmp_path, old, new)), "--against", server.url)
    assert (code, json.loads(out)["samples"][0]["verdict"]) == (1, "mismatch")


@pytest.mark.parametrize("api", ["inference", "a1111", "openai"])
def test_videos_through_other_apis_are_refused(server, fidelora, api):
    code, _, error = fidelora(*COMMAND, str(RUN), "--against", server.url, "--api", api)
    assert code == 2
    assert "Sample 0 is a video" in error
