"""A server that lives as long as the demo needs it, and what it makes of recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fidelora.api import InferenceRequest, request_for
from fidelora.cli.console import fail
from fidelora.client import Client
from fidelora.recipe import Recipe
from fidelora.settings import Settings

_ANSWER_S = 120.0
_STOP_S = 20.0


def through_server(
    url: str, recipes: Sequence[Recipe], adapter: Path, out: Path
) -> list[NDArray[np.uint8]]:
    """Upload `adapter`, ask for the images of `recipes`, and save them in `out`.

    Args:
        recipes: of one base model and one precision, each with that adapter.

    Returns:
        The pixels of each.
    """
    with Client(url) as client:
        path = client.upload_lora(adapter).path
        result = client.generate(
            InferenceRequest.model_validate(request_for(recipes, path)), timeout_s=_ANSWER_S
        )
        pixels = []
        for file in client.save_images(result, out):
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB")))
    return pixels


@contextmanager
def running_server(base_model: str, dtype: str, device: str) -> Iterator[Callable[[], str]]:
    """A server on a free port of this machine, with a data folder that goes with it; it starts while other work is done.

    Yields:
        What waits until the server listens, and returns its URL.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fidelora-demo-") as data,
        Path(data, "log").open("wb") as log,
    ):
        command = [
            sys.executable,
            "-m",
            "fidelora",
            "serve",
            "--base-model",
            base_model,
            "--device",
            device,
        ]
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0"],
            env=_environment()
            | {"FIDELORA_DATA_DIR": data, "FIDELORA_DTYPE": dtype, "FIDELORA_LOG_FORMAT": "json"},
            cwd=data,  # away from a .env that is meant for another server
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            yield partial(_url, process, Path(data, "log"))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """Ours, without what is set for a server."""
    names = {str(field.validation_alias) for field in Settings.model_fields.values()}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith("FIDELORA_")
    }


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens; it says so once."""
    while True:
        ended = process.poll() is not None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for line in lines:
            if (
                line.endswith("\n")
                and line.startswith("{")
                and (entry := json.loads(line)).get("event") == "listening"
            ):
                return str(entry["url"])
        if ended:
            fail(
                f"The demo's server did not start: {lines[-1].strip() if lines else 'it said nothing'}",
                1,
            )
        time.sleep(0.1)
