"""Limits of what one request may ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fidelora import Recipe
from fidelora.errors import RequestError
from fidelora.server.size_limits import SizeLimits
from fidelora.workers.attempt import AttemptReport, pixel_steps

IMAGE = Recipe(prompt="a ball", width=512, height=512, steps=50)
PIXEL_STEPS = 512 * 512 * 50
VIDEO_PIXELS = 10 * 512 * 512


def report(seconds: float, model: str = "sd15", pixel_steps: int = PIXEL_STEPS) -> AttemptReport:
    timings = {"denoise": seconds} if seconds else {}
    return AttemptReport(
        "a", "succeeded", "", 0.0, 1, 50, timings, 0, 0, pixel_steps=pixel_steps, model=model
    )


def test_the_largest_image_is_allowed_and_one_pixel_row_more_is_not():
    limits = SizeLimits(2048 * 2048, VIDEO_PIXELS, 3600)
    limits.check([replace(IMAGE, width=2048, height=2048), replace(IMAGE, width=4096, height=1024)])
    with pytest.raises(RequestError, match="2056 x 2048 pixels is larger than the 4,194,304") as it:
        limits.check([IMAGE, replace(IMAGE, width=2056, height=2048)])
    assert (it.value.code, it.value.details) == ("IMAGE_TOO_LARGE", {"max_pixels": 4_194_304})


def test_nothing_is_refused_for_its_time_before_the_speed_is_known():
    limits = SizeLimits(2048 * 2048, VIDEO_PIXELS, 1.0)
    limits.attempt_ended(report(0.0))
    limits.attempt_ended(report(50.0, pixel_steps=0))  # a failed attempt
    limits.attempt_ended(report(50.0, model="sdxl"))
    limits.check([IMAGE] * 64)


def test_the_fastest_attempt_decides_how_long_a_request_takes():
    limits = SizeLimits(2048 * 2048, VIDEO_PIXELS, 100.0)
    for seconds in (60.0, 10.0, 30.0):
        limits.attempt_ended(report(seconds))
    limits.check([IMAGE] * 10)
    limits.check([replace(IMAGE, width=1024, height=1024, steps=100)])  # 80 seconds
    with pytest.raises(RequestError, match=r"at least 110 seconds, and .* allows 100 ") as it:
        limits.check([IMAGE] * 11)
    assert it.value.code == "REQUEST_TOO_LARGE"
    assert it.value.details == {"estimated_s": 110, "allowed_s": 100.0}


def test_a_video_may_have_fewer_pixels_in_all_frames_than_its_limit():
    limits = SizeLimits(2048 * 2048, VIDEO_PIXELS, 100.0)
    video = Recipe(model="wan21_1b", prompt="a ball", width=512, height=512, steps=50, frames=9)
    limits.check([video])
    with pytest.raises(RequestError, match="13 frames with 512 x 512 pixels is larger than") as it:
        limits.check([replace(video, frames=13)])
    assert it.value.code == "IMAGE_TOO_LARGE"
    assert it.value.details == {"max_video_pixels": VIDEO_PIXELS}


def test_the_time_of_a_video_grows_with_its_frames():
    limits = SizeLimits(2048 * 2048, VIDEO_PIXELS, 100.0)
    limits.attempt_ended(report(20.0, model="wan21_1b"))
    video = Recipe(model="wan21_1b", prompt="a ball", width=512, height=512, steps=50, frames=5)
    limits.check([video])
    with pytest.raises(RequestError, match="at least 180 seconds"):
        limits.check([replace(video, frames=9)])
    assert pixel_steps(video) == 5 * PIXEL_STEPS
