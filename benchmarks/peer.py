"""The baseline as a measured process: diffusers with a PEFT adapter, in float32, not tuned.

The adapter is loaded with `load_lora_weights` and not fused, because a server has to be able to
switch it.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import torch
from benchmarks.operators import step_seconds
from benchmarks.processes import answer_requests, disk_reads, memory
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

GUIDANCE = 6.0


class Peer:
    """One pipeline with its current adapter."""

    def __init__(self, folder: str) -> None:
        self._pipe = load_pipeline(folder)
        self._adapter: str | None = None
        self._text_done = 0.0
        encode = self._pipe.encode_prompt

        def encode_and_time(*arguments: Any, **options: Any) -> Any:
            encoded = encode(*arguments, **options)
            self._text_done = time.perf_counter()
            return encoded

        self._pipe.encode_prompt = encode_and_time

    def adapter(self, path: str | None) -> dict[str, float]:
        """Load this adapter instead of the current one; return seconds, 0 if unchanged."""
        start = time.perf_counter()
        if path != self._adapter:
            if self._adapter is not None:
                self._pipe.unload_lora_weights()
            if path is not None:
                self._pipe.load_lora_weights(path)
            self._adapter = path
        return {"seconds": time.perf_counter() - start}

    def image(
        self, prompt: str, size: int, steps: int, seed: int, latents_only: bool = False
    ) -> dict[str, float]:
        """Return the seconds of each part of one image; `step` is the mean of its steps."""
        step_done = 0.0

        def note(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal step_done
            step_done = time.perf_counter()
            return tensors

        self._touch()
        reads, start = disk_reads(), time.perf_counter()
        result = self._pipe(
            prompt,
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent" if latents_only else "pil",
            callback_on_step_end=note,
        )
        decoded = time.perf_counter()
        seconds = {
            "text": self._text_done - start,
            "step": (step_done - self._text_done) / steps,
            "disk": disk_reads() - reads,
        }
        if latents_only:
            return seconds
        _png(result.images[0])
        end = time.perf_counter()
        return seconds | {
            "decode": decoded - step_done,
            "encode": end - decoded,
            "total": end - start,
        }

    def operators(self, path: str, size: int) -> dict[str, float]:
        """Return the seconds of a step for each kind of operator."""
        self.adapter(path)
        return step_seconds(lambda steps: self.image("a thing", size, steps, 0, latents_only=True))

    def _touch(self) -> None:
        """Read every weight into the page cache.

        Weights are mapped from files, and the system may have evicted pages meanwhile.
        """
        for part in (self._pipe.text_encoder, self._pipe.unet, self._pipe.vae):
            for weight in part.parameters():
                weight.detach().sum()

    def fuse(self, path: str) -> dict[str, float]:
        """Return the seconds to load an adapter, to fuse it, and to undo both."""
        self.adapter(None)
        start = time.perf_counter()
        self._pipe.load_lora_weights(path)
        loaded = time.perf_counter()
        self._pipe.fuse_lora(lora_scale=0.7)
        fused = time.perf_counter()
        self._pipe.unfuse_lora()
        self._pipe.unload_lora_weights()
        return {"load": loaded - start, "fuse": fused - loaded, "undo": time.perf_counter() - fused}

    def choose(self, paths: list[str]) -> dict[str, float]:
        """Return the seconds to switch between adapters that are all loaded (`set_adapters`)."""
        self.adapter(None)
        for number, path in enumerate(paths):
            self._pipe.load_lora_weights(path, adapter_name=f"adapter_{number}")
        self._pipe.set_adapters("adapter_0", 0.7)
        start = time.perf_counter()
        self._pipe.set_adapters("adapter_1", 0.7)
        seconds = time.perf_counter() - start
        self._pipe.unload_lora_weights()
        return {"seconds": seconds}


def load_pipeline(folder: str) -> Any:
    """Return the pipeline of the folder, which has the trainer's sampler."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    )
    assert isinstance(pipe.scheduler, DDPMScheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    peer = Peer(sys.argv[1])
    handlers = {
        name: getattr(peer, name) for name in ("adapter", "image", "operators", "fuse", "choose")
    }
    answer_requests({"memory": memory, **handlers})


if __name__ == "__main__":
    main()
