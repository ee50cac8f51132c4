"""A server's application in this process, on a store in memory; its jobs are moved along by the tests themselves."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
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

NUMERICS = {
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
    """Settings of a server whose data is in `folder`, with one LoRA there."""
    settings = Settings(data_dir=folder / "data", **given)
    settings.loras.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(LORA, settings.loras / "sks.safetensors")
    return settings


def context_in(folder: Path, **given: Any) -> ServerContext:
    return context_with_store(
        MemoryStore(),
        settings_for(folder, **given),
        dict.fromkeys(all_families(), NUMERICS),
        "http://127.0.0.1:8000",
    )


def client_of(context: ServerContext, **given: Any) -> TestClient:
    return TestClient(
        make_app(context), base_url="http://127.0.0.1:8000", raise_server_exceptions=False, **given
    )


def now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def listening(context: ServerContext) -> Iterator[str]:
    """The application behind a real socket; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(make_app(context), port=0, log_config=None))
    started = threading.Event()
    original = server.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(20)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        context.stopping.set()
        server.should_exit = True
        thread.join()


class ByHand:
    """A worker that does what the test says."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def claim(self) -> Job:
        job = self.claim_one()
        assert job is not None
        return job

    def claim_one(self) -> Job | None:
        """The next job, if there is one."""
        return self._context.store.claim("by hand", now(), 60)

    def step(self, job: Job, step: int, steps: int = 25, preview: str = "") -> Job:
        return self._context.store.renew(
            job.id, job.epoch, JobProgress(0, 1, step, steps, 1.5, preview), now(), 60
        )

    def succeed(self, job: Job, content: bytes = b"an image", image_format: str = "png") -> Job:
        path = self._context.settings.data_dir / f"{job.id}_output_0.{image_format}"
        path.write_bytes(content)
        output = Output(str(path), image_format, 512, 512, 42, file_sha256(path), len(content))
        return self._context.store.succeed(
            job.id, job.epoch, [output] * len(job.recipes), {"denoise": 1.0}, now()
        )

    def fail(self, job: Job) -> Job:
        return self._context.store.fail(
            job.id, job.epoch, Failure("NUMERICS", "The model produced NaN."), now()
        )


@contextmanager
def at_work(worker: ByHand, content: bytes = b"an image") -> Iterator[None]:
    """While the block runs, every job succeeds soon, on another thread."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.002):
            if (job := worker.claim_one()) is not None:
                worker.succeed(job, content, job.image_format)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def aside(call: Callable[[], Any]) -> Future[Any]:
    """A call on another thread, whose result or error is asked for later."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(call)
    executor.shutdown(wait=False)
    return future


def only_job(context: ServerContext) -> Job:
    """The one job that was submitted, once it is there."""
    (job,) = until(lambda: context.store.list().jobs, 20)
    assert isinstance(job, Job)
    return job


def an_image(text: str = "a ball\nSteps: 2, Sampler: ddpm, Seed: 1, Size: 64x64") -> bytes:
    """A small PNG with AUTOMATIC1111's parameters."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("parameters", text)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def pixels(content: bytes) -> NDArray[np.uint8]:
    """Of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))
