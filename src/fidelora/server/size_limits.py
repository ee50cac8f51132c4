"""Limits of what one request may ask of the workers: pixels of an image or video, and time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fidelora.errors import RequestError
from fidelora.recipe import Recipe
from fidelora.workers.attempt import AttemptReport, pixel_steps


class SizeLimits:
    """Refuses requests that the workers cannot finish in time, based on finished requests.

    The estimate of a request's time is deliberately low, so that requests that could finish in time
    are not refused: it uses the model's fastest rate measured on any device, at any image size.
    Before the first request of a model has finished, only the number of pixels is checked.

    Args:
        max_pixels: maximum width x height of an image, and of a frame.
        max_video_pixels: maximum width x height x frames of a video.
        timeout_s: time limit of an attempt at a request.
    """

    def __init__(self, max_pixels: int, max_video_pixels: int, timeout_s: float) -> None:
        self._max_pixels = max_pixels
        self._max_video_pixels = max_video_pixels
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._seconds_per_pixel_step: dict[str, float] = {}

    def attempt_ended(self, report: AttemptReport) -> None:
        """Update the rate of the model if the attempt finished images."""
        if report.pixel_steps and (seconds := report.timings.get("denoise")):
            rate = seconds / report.pixel_steps
            with self._lock:
                known = self._seconds_per_pixel_step.get(report.model, rate)
                self._seconds_per_pixel_step[report.model] = min(known, rate)

    def check(self, recipes: Sequence[Recipe]) -> None:
        """Check the images of one request.

        Raises:
            RequestError: an image has too many pixels, or the images together take longer than the
                time limit.
        """
        for recipe in recipes:
            if recipe.width * recipe.height > self._max_pixels:
                raise RequestError(
                    f"An image of {recipe.width} x {recipe.height} pixels is larger than the "
                    f"{self._max_pixels:,} pixels that this server allows (FIDELORA_MAX_PIXELS). "
                    "Request a smaller image.",
                    code="IMAGE_TOO_LARGE",
                    details={"max_pixels": self._max_pixels},
                )
            video_pixels = recipe.width * recipe.height * recipe.frames
            if recipe.frames > 1 and video_pixels > self._max_video_pixels:
                raise RequestError(
                    f"A video of {recipe.frames} frames with {recipe.width} x {recipe.height} "
                    f"pixels is larger than the {self._max_video_pixels:,} pixels that this server "
                    "allows (FIDELORA_MAX_VIDEO_PIXELS). Request fewer frames or a smaller size.",
                    code="IMAGE_TOO_LARGE",
                    details={"max_video_pixels": self._max_video_pixels},
                )
        seconds = self._least_seconds(recipes)
        if seconds > self._timeout_s:
            raise RequestError(
                f"This request would take at least {seconds:,.0f} seconds, and this server allows "
                f"{self._timeout_s:,.0f} (FIDELORA_INFERENCE_TIMEOUT). Request fewer or smaller "
                "images, or fewer steps.",
                code="REQUEST_TOO_LARGE",
                details={"estimated_s": round(seconds), "allowed_s": self._timeout_s},
            )

    def _least_seconds(self, recipes: Sequence[Recipe]) -> float:
        with self._lock:
            rates = dict(self._seconds_per_pixel_step)
        return sum(rates.get(recipe.model, 0.0) * pixel_steps(recipe) for recipe in recipes)
