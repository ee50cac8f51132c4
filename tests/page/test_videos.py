"""The page makes a video, plays it, and offers its file."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect
from tests.server.http_support import pixels
from tests.server.serve_support import Server
from tests.support import TINY_WAN21, WAN21_LORA

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="PyAV (the extra `video`) is not installed"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("video-page")
    (data / "loras").mkdir()
    shutil.copyfile(WAN21_LORA, data / "loras" / "wan.safetensors")
    made = Server(data, f"wan21_1b={TINY_WAN21}", FIDELORA_PAGE="true")
    yield made
    made.close()


@needs_av
def test_a_video_is_played(visitor):
    page = visitor.page
    for name, value in (("steps", 2), ("width", 64), ("height", 64), ("frames", 9), ("fps", 4)):
        visitor.field(name).fill(str(value))
    visitor.field("prompt").fill("a ball")
    visitor["generate"].click()
    video = page.locator("#gallery video").first
    expect(video).to_be_visible()
    video.evaluate("v => new Promise(done => v.readyState ? done() : (v.onloadedmetadata = done))")
    assert video.evaluate("v => [v.videoWidth, v.videoHeight, v.duration]") == [64, 64, 2.25]
    moved = video.evaluate(
        "v => new Promise(d => { v.onseeked = () => d(v.currentTime); v.currentTime = 1; })"
    )
    assert moved == 1
    part = video.evaluate(
        "async v => { const a = await fetch(v.currentSrc, {headers: {Range: 'bytes=4-7'}});"
        " return [a.status, await a.text()]; }"
    )
    assert part == [206, "ftyp"]
    expect(visitor["recipe"]).to_contain_text('"frames": 9')


def test_the_sheet_of_the_compare_tab_has_frames(visitor):
    visitor.choose("loras", "wan.safetensors")
    for name, value in (("steps", 2), ("width", 64), ("height", 64), ("frames", 5), ("fps", 4)):
        visitor.field(name).fill(str(value))
    visitor.field("prompt").fill("a ball")
    visitor.page.get_by_role("tab", name="Compare").click()
    expect(visitor["checkpoints"]).to_contain_text("wan.safetensors")
    expect(visitor["about-compare"]).to_contain_text("64 x 64 · seed 42 · 2 steps")
    visitor.field("multipliers").fill("0, 1")
    visitor["compare"].click()
    expect(visitor["progress-compare"]).to_contain_text("Done.")
    sheet = pixels(visitor.file(visitor["sheet"].locator("img").first))
    assert sheet.shape[1] > 2 * 4 * 64  # two columns of four frames
