"""Temporary server of `fidelora demo`."""

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

_RESULT_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.1


def through_server(
    url: str, recipes: Sequence[Recipe], adapter: Path, out: Path
) -> list[NDArray[np.uint8]]:
    """Upload `adapter`, request the images of `recipes`, and save them in `out`.

    Args:
        recipes: all with the same base model and dtype, each with this adapter.

    Returns:
        The pixels of each image, uint8 RGB [height, width, 3].
    """
    with Client(url) as client:
        path = client.upload_lora(adapter).path
        result = client.generate(
            InferenceRequest.model_validate(request_for(recipes, [path])),
            timeout_s=_RESULT_TIMEOUT_S,
        )
        pixels = []
        for file in client.save_images(result, out):
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB")))
    return pixels


@contextmanager
def running_server(base_model: str, dtype: str, device: str) -> Iterator[Callable[[], str]]:
    """Run a server on a free local port, with a temporary data folder.

    Yields:
        A function that waits until the server listens and returns its URL.
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
            | {
                "FIDELORA_DATA_DIR": data,
                "FIDELORA_DTYPE": dtype,
                "FIDELORA_LOG_FORMAT": "json",
                "FIDELORA_PAGE": "false",  # the demo uses only the API, and the page loads slowly
            },
            cwd=data,  # avoids the .env file of another server
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            yield partial(_wait_for_url, process, Path(data, "log"))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """Return the environment without the settings of a server."""
    names = {str(field.validation_alias) for field in Settings.model_fields.values()}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith("FIDELORA_")
    }


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the URL from the log; wait until the server listens."""
    while True:
        # Poll first: the log of a process that has ended is complete.
        exited = process.poll() is not None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for line in lines:
            if (
                line.endswith("\n")
                and line.startswith("{")
                and (entry := json.loads(line)).get("event") == "listening"
            ):
                return str(entry["url"])
        if exited:
            reason = lines[-1].strip() if lines else "its log is empty"
            fail(f"The demo's server did not start: {reason}", 1)
        time.sleep(_POLL_S)
