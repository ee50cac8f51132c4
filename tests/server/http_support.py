"""A server's application in this process, on a store in memory; its jobs are moved along by the tests themselves."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient
from tests.support import LORA

from fidelora.jobs.job import Failure, Job, JobProgress, Output
from fidelora.jobs.memory import MemoryStore
from fidelora.models import all_models
from fidelora.recipe import file_sha256
from fidelora.server.app import make_app, parts_around
from fidelora.server.parts import Parts
from fidelora.settings import Settings

NUMERICS = {"base_model": "tiny", "dtype": "float32", "vae_dtype": "float32", "text_encoder_dtype": "float32"}
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


def parts_in(folder: Path, **given: Any) -> Parts:
    return parts_around(
        MemoryStore(), settings_for(folder, **given), dict.fromkeys(all_models(), NUMERICS), "http://127.0.0.1:8000"
    )


def client_of(parts: Parts, **given: Any) -> TestClient:
    return TestClient(make_app(parts), base_url="http://127.0.0.1:8000", raise_server_exceptions=False, **given)


def now() -> datetime:
    return datetime.now(UTC)


class ByHand:
    """A worker that does what the test says."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def claim(self) -> Job:
        job = self._parts.store.claim("by hand", now(), 60)
        assert job is not None
        return job

    def step(self, job: Job, step: int, steps: int = 25, preview: str = "") -> Job:
        return self._parts.store.renew(job.id, job.epoch, JobProgress(0, 1, step, steps, 1.5, preview), now(), 60)

    def succeed(self, job: Job, content: bytes = b"an image", image_format: str = "png") -> Job:
        path = self._parts.settings.data_dir / f"{job.id}_output_0.{image_format}"
        path.write_bytes(content)
        output = Output(str(path), image_format, 512, 512, 42, file_sha256(path), len(content))
        return self._parts.store.succeed(job.id, job.epoch, [output] * len(job.recipes), {"denoise": 1.0}, now())

    def fail(self, job: Job) -> Job:
        return self._parts.store.fail(job.id, job.epoch, Failure("NUMERICS", "The model produced NaN."), now())
