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

from fidelora.api import InferenceRequest, ResultBody, request_for
from fidelora.cli.console import fail
from fidelora.client import Client
from fidelora.environment import PREFIX, names_of
from fidelora.errors import ClientTimeoutError, RequestFailedError
from fidelora.recipe import Recipe
from fidelora.settings import Settings

_PATIENCE_S = 900.0
"""Seconds without any progress after which the demo gives up. Importing torch on a machine that is
busy with other work is the longest step without progress; it took up to two minutes."""
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
        request = InferenceRequest.model_validate(request_for(recipes, [path]))
        result = _wait_for_images(client, client.submit(request).request_id)
        pixels = []
        for file in client.save_images(result, out):
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB")))
    return pixels


def _wait_for_images(
    client: Client, request_id: str, patience_s: float = _PATIENCE_S
) -> ResultBody:
    """Return the result of a request; wait for as long as it makes progress.

    Raises:
        RequestFailedError: the request failed, or the server cannot make images.
        ClientTimeoutError: the status did not change for `patience_s` seconds.
    """
    status, changed = client.status(request_id), time.monotonic()
    while not status.status.final:
        if status.waiting_reason is not None:
            raise RequestFailedError(status.waiting_reason)
        if time.monotonic() - changed > patience_s:
            raise ClientTimeoutError(
                f"The demo's server made no progress in {patience_s:g} seconds; the request is "
                f"{status.status.value}."
            )
        time.sleep(_POLL_S)
        if (new := client.status(request_id)) != status:
            status, changed = new, time.monotonic()
    if status.error is not None:
        raise RequestFailedError(status.error, code=status.error_code or "")
    return client.result(request_id)


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
    names = {name for field in Settings.model_fields.values() for name in names_of(field)}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(PREFIX)
    }


def _wait_for_url(
    process: subprocess.Popen[bytes], log: Path, patience_s: float = _PATIENCE_S
) -> str:
    """Wait until the server listens and return its URL, which it logs.

    Exits if the server ends, or logs nothing for `patience_s` seconds.
    """
    length, changed = 0, time.monotonic()
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
        if len(lines) > length:
            length, changed = len(lines), time.monotonic()
        if time.monotonic() - changed > patience_s:
            fail(
                f"The demo's server did not start; it logged nothing for {patience_s:g} seconds.", 1
            )
        time.sleep(_POLL_S)
