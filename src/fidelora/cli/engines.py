"""Engine of a command that only makes images: a resident one, or one in this process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fidelora.cli.console import make_engine, warn
from fidelora.errors import SettingsError
from fidelora.resident import KEEP_VARIABLE
from fidelora.resident.address import socket_path

if TYPE_CHECKING:
    from fidelora.images.write import GeneratedImage
    from fidelora.recipe import Dtype, Recipe
    from fidelora.resident.client import OnSteps, ResidentEngine

_START_S = 120.0  # timeout for the start of a resident engine; imports take most of that time
_POLL_S = 0.02  # time between two attempts to connect to it

T = TypeVar("T")


class ImageMaker(Protocol):
    """The methods of `Engine` that commands use to make images."""

    @property
    def auto_dtype(self) -> Dtype:
        """Default dtype on the engine's device."""

    def max_batch(self, recipe: Recipe) -> int:
        """Return the recommended batch size."""

    def generate(self, recipe: Recipe, on_step: OnSteps | None = None) -> GeneratedImage:
        """Make an image."""

    def generate_batch(
        self, recipes: Sequence[Recipe], on_step: OnSteps | None = None
    ) -> list[GeneratedImage]:
        """Make several images together."""


def image_maker(device: str, offload: str = "none", first: Recipe | None = None) -> ImageMaker:
    """Return a resident engine with this device and offload mode, or a new engine.

    FIDELORA_KEEP_ENGINE is the number of minutes that a new resident engine is kept after its last
    use. If it is not set, a resident engine that is running is used, but none is started. With 0,
    no resident engine is used.

    Args:
        first: recipe of the first image, for a new engine in this process (`make_engine`).

    Raises:
        SettingsError: the value of FIDELORA_KEEP_ENGINE is not valid.
        DeviceError: the device or the offload mode is not available.
    """
    minutes = _minutes_to_keep()
    if minutes == 0:
        return make_engine(device, offload, first)
    from fidelora.resident.client import ResidentEngine

    try:
        path = socket_path(device, offload)
    except SettingsError as error:
        if minutes is not None:
            warn(f"{error} The engine is not kept.")
        return make_engine(device, offload, first)
    found = ResidentEngine.connect(path) if path.exists() else None
    if found is None and minutes is not None:
        found = _start(path, device, offload, minutes)
    if found is None:
        return make_engine(device, offload, first)
    return _WithFallback(found, lambda: make_engine(device, offload, first))


def _minutes_to_keep() -> float | None:
    """Return the value of FIDELORA_KEEP_ENGINE; None if it is not set."""
    text = os.environ.get(KEEP_VARIABLE, "").strip()
    if not text:
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise SettingsError(
            f"{KEEP_VARIABLE} is {text!r}; set it to a number of minutes, or to 0 to keep no "
            "engine."
        )
    return minutes


def _start(path: Path, device: str, offload: str, minutes: float) -> ResidentEngine | None:
    """Start a resident engine and connect to it; warn and return None if it does not start."""
    from fidelora.resident.client import ResidentEngine

    log = path.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "fidelora", "serve", "--local"),
        *("--device", device, "--offload", offload, "--idle", repr(minutes)),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C in the terminal must not end it
        )
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        # The process also ends if another command started an engine first. Use that engine then.
        has_ended = process.poll() is not None
        if (found := ResidentEngine.connect(path)) is not None:
            return found
        if has_ended:
            break
        time.sleep(_POLL_S)
    warn(f"The resident engine did not start; the reason is in its log, {log}.")
    return None


class _WithFallback:
    """A resident engine; if it ends, an engine in this process takes its place."""

    def __init__(self, resident: ResidentEngine, make: Callable[[], ImageMaker]) -> None:
        self._engine: ImageMaker = resident
        self._make = make

    @property
    def auto_dtype(self) -> Dtype:
        return self._engine.auto_dtype

    def max_batch(self, recipe: Recipe) -> int:
        return self._call(lambda engine: engine.max_batch(recipe))

    def generate(self, recipe: Recipe, on_step: OnSteps | None = None) -> GeneratedImage:
        return self._call(lambda engine: engine.generate(recipe, on_step))

    def generate_batch(
        self, recipes: Sequence[Recipe], on_step: OnSteps | None = None
    ) -> list[GeneratedImage]:
        return self._call(lambda engine: engine.generate_batch(recipes, on_step))

    def _call(self, call: Callable[[ImageMaker], T]) -> T:
        from fidelora.resident.messages import EngineLostError, EngineRefusedError

        try:
            return call(self._engine)
        except EngineRefusedError:
            pass
        except EngineLostError:
            warn("The resident engine has ended; this command makes the images itself.")
        self._engine = self._make()
        return call(self._engine)
