"""A server application in this process with an in-memory store; tests act as its worker."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.testclient import TestClient
from tests.server.serve_support import until
from tests.support import LORA

from fidelora.families import all_families
from fidelora.jobs.job import Failure, Job, JobProgress, Output
from fidelora.jobs.memory import MemoryStore
from fidelora.recipe import file_sha256
from fidelora.server.app import context_with_store, make_app
from fidelora.server.context import ServerContext
from fidelora.settings import Settings

DEADLINE_S = 60.0
"""Seconds to wait for a response of the application; only a failure takes that long."""
SERVER_DEFAULTS = {
    "base_model": "tiny",
    "dtype": "float32",
    "vae_dtype": "float32",
    "text_encoder_dtype": "float32",
}
MINIMAL: dict[str, Any] = {
    "model": "sd15",
    "trigger_word": "sks",
    "loras": [{"path": "sks.safetensors"}],
    "prompts": [{"prompt": "a photo of [trigger]"}],
}


def settings_for(folder: Path, **given: Any) -> Settings:
    """Settings of a server with its data in `folder` and one LoRA."""
    settings = Settings(data_dir=folder / "data", **given)
    settings.loras.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(LORA, settings.loras / "sks.safetensors")
    return settings


def context_in(folder: Path, **given: Any) -> ServerContext:
    return context_with_store(
        MemoryStore(),
        settings_for(folder, **given),
        dict.fromkeys(all_families(), SERVER_DEFAULTS),
        "http://127.0.0.1:8000",
    )


class ClientWithDeadline(TestClient):
    """A test client whose calls fail after `DEADLINE_S`; Starlette's own has no timeouts."""

    def __init__(self, context: ServerContext, **given: Any) -> None:
        super().__init__(
            make_app(context),
            base_url="http://127.0.0.1:8000",
            raise_server_exceptions=False,
            **{"client": ("127.0.0.1", 50000), **given},
        )
        self._context = context

    def request(self, *args: Any, **given: Any) -> Any:
        return within_deadline(
            lambda: super(ClientWithDeadline, self).request(*args, **given), self._context
        )


def client_of(context: ServerContext, **given: Any) -> TestClient:
    return ClientWithDeadline(context, **given)


def within_deadline(call: Callable[[], Any], context: ServerContext) -> Any:
    """Return the result of a call of the application; fail if it takes longer than `DEADLINE_S`."""
    future = in_thread(call)
    try:
        return future.result(DEADLINE_S)
    except TimeoutError:
        if not future.done():
            end_open_calls(context)
            wait([future], DEADLINE_S)  # or the client could not be closed
            raise AssertionError(f"no response within {DEADLINE_S:g} s") from None
        raise


def end_open_calls(context: ServerContext) -> None:
    """Let every call that waits for a job end, so that the test can end, too."""
    context.stopping.set()
    context.store.abandon_expired(now() + timedelta(days=1))


def now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def listening(context: ServerContext) -> Iterator[str]:
    """Serve the application on a real socket; yields its URL."""
    config = uvicorn.Config(
        make_app(context), port=0, log_config=None, timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(config)
    started = threading.Event()
    original = server.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(20)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        end_open_calls(context)
        server.should_exit = True
        thread.join(DEADLINE_S)
    assert not thread.is_alive(), "the server did not stop"


class ManualWorker:
    """A worker that a test controls step by step."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    def claim(self) -> Job:
        job = self.claim_one()
        assert job is not None
        return job

    def claim_one(self) -> Job | None:
        """Claim the next job, if there is one."""
        return self.context.store.claim("manual", now(), 60)

    def step(self, job: Job, step: int, steps: int = 25, preview: str = "") -> Job:
        return self.context.store.renew(
            job.id, job.epoch, JobProgress(0, 1, step, steps, 1.5, preview), now(), 60
        )

    def succeed(self, job: Job, content: bytes = b"an image", image_format: str = "png") -> Job:
        path = self.context.settings.data_dir / f"{job.id}_output_0.{image_format}"
        path.write_bytes(content)
        output = Output(str(path), image_format, 512, 512, 42, file_sha256(path), len(content))
        return self.context.store.succeed(
            job.id, job.epoch, [output] * len(job.recipes), {"denoise": 1.0}, now()
        )

    def fail(self, job: Job) -> Job:
        return self.context.store.fail(
            job.id, job.epoch, Failure("NUMERICS", "The model produced NaN."), now()
        )


@contextmanager
def jobs_succeeding(
    worker: ManualWorker, content: bytes = b"an image", interval_s: float = 0.002
) -> Iterator[None]:
    """While the block runs, let every job succeed soon, on another thread.

    Args:
        interval_s: seconds between two claims.
    """
    over = threading.Event()

    def work() -> None:
        try:
            while not over.wait(interval_s):
                if (job := worker.claim_one()) is not None:
                    worker.succeed(job, content, job.image_format)
        except BaseException:
            end_open_calls(worker.context)  # or they would wait for this thread
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(DEADLINE_S)


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run a call on another thread; wait for it with `result(seconds)`."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def only_job(context: ServerContext) -> Job:
    """Wait for the only job of the store, and return it."""
    (job,) = until(lambda: context.store.list().jobs, 20)
    assert isinstance(job, Job)
    return job


def png_with_parameters(
    text: str = "a ball\nSteps: 2, Sampler: ddpm, Seed: 1, Size: 64x64",
) -> bytes:
    """Return a small PNG with AUTOMATIC1111's parameters."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("parameters", text)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def pixels(content: bytes) -> NDArray[np.uint8]:
    """Return the pixels of an image file, `[height, width, 3]`."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def submit(client: TestClient, body: Any = None, **headers: str) -> str:
    """Send a request that is accepted, and return its id."""
    answer = client.post("/v1/inference", json=body or MINIMAL, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def error(answer: Any) -> tuple[int, str]:
    """Return the status and the code of an error response."""
    content = answer.json()["detail"]["error"]
    assert set(content) == {"code", "message", "details"}
    assert content["message"].endswith(".")
    return answer.status_code, content["code"]


def with_prompt(**fields: Any) -> dict[str, Any]:
    """Return the body of a request with these fields in its prompt."""
    return MINIMAL | {"prompts": [MINIMAL["prompts"][0] | fields]}


def upload(client: TestClient, content: bytes, name: str = "new.safetensors") -> Any:
    """Return the response to an upload of a LoRA."""
    return client.post("/v1/loras", files={"file": (name, content)})
