"""OpenVINO as a measured process: the UNet of diffusers with a fused adapter, converted once.

    python -m benchmarks.openvino FOLDER

A converted model has its weights built in, so each adapter needs its own conversion. `measure`
compares its steps with those of both fidelities, in turns.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any, cast

import torch
from benchmarks import full_size
from benchmarks.peer import GUIDANCE, load_pipeline
from benchmarks.processes import MeasuredProcess, answer_requests, memory, rounds
from benchmarks.report import Findings, Row, Settings
from torch import Tensor, nn

STEPS = 2
PRECISIONS = {"exact": "f32", "fast": "bf16"}
_TOKENS = 77


def measure(settings: Settings) -> Findings:
    found = Findings()
    if importlib.util.find_spec("openvino") is None:
        found.notes.append("OpenVINO: not installed (`pip install --group bench`).")
        return found
    base, lora = str(full_size.base(settings.folder)), str(full_size.adapter(settings.folder))
    size = 128 if settings.quick else 256
    with MeasuredProcess("benchmarks.openvino", base) as theirs:
        spent = theirs.ask("convert", path=lora, size=size)
        for way, precision in PRECISIONS.items():
            spent |= theirs.ask("compile", precision=precision)
            measured: dict[str, list[float]] = {"theirs": [], "ours": []}
            with MeasuredProcess("benchmarks.ours", way, base) as ours:
                for number in rounds(0.0 if settings.quick else 40.0, least=2, most=5):
                    request: dict[str, Any] = {"size": size, "steps": STEPS, "seed": number}
                    results = (
                        theirs.ask("step", **request),
                        ours.ask("image", prompt=f"thing {number}", adapter=lora, **request),
                    )
                    if number > 0:  # the first round includes one-time costs
                        for name, result in zip(measured, results, strict=True):
                            measured[name].append(result["step"])
            found.raw[way] = measured | {"seconds before the first step": spent}
            found.add_times(
                f"step at {size}, adapter: {way}, peer OpenVINO in {precision}",
                measured["theirs"],
                measured["ours"],
            )
            seconds = f"{sum(spent.values()):.1f} s"
            found.rows.append(
                Row(f"OpenVINO in {precision}: fuse, convert and compile", seconds, "-", "-", 1)
            )
    found.notes.append(
        "OpenVINO: the UNet of diffusers with a fused adapter, converted for one size. It has to "
        "be converted and compiled again for every adapter."
    )
    return found


class _Prediction(nn.Module):
    """The UNet with plain tensors as inputs and output."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self._unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return cast(Tensor, self._unet(latents, timestep, text, return_dict=False)[0])


class OpenVino:
    """A UNet that is converted with an adapter, and compiled for one precision at a time."""

    def __init__(self, folder: str) -> None:
        self._pipe = load_pipeline(folder)
        self._model: Any = None
        self._compiled: Any = None

    def convert(self, path: str, size: int) -> dict[str, float]:
        """Return the seconds to fuse this adapter, and to convert the UNet for images of a size."""
        import openvino  # type: ignore[import-not-found]  # optional

        start = time.perf_counter()
        self._pipe.load_lora_weights(path)
        self._pipe.fuse_lora()
        self._pipe.unload_lora_weights()
        fused = time.perf_counter()
        width = self._pipe.unet.config.cross_attention_dim
        latents, text = (
            torch.zeros(2, 4, size // 8, size // 8),
            torch.zeros(2, _TOKENS, width),
        )
        example = (latents, torch.tensor(1), text)
        shapes = [tuple(one.shape) for one in example]
        with torch.no_grad():
            self._model = openvino.convert_model(
                _Prediction(self._pipe.unet).eval(), example_input=example, input=shapes
            )
        return {"fuse": fused - start, "convert": time.perf_counter() - fused}

    def compile(self, precision: str) -> dict[str, float]:
        """Return the seconds to compile the converted UNet for `f32` or `bf16`."""
        import openvino

        self._compiled = None
        start = time.perf_counter()
        self._compiled = openvino.Core().compile_model(
            self._model, "CPU", {"INFERENCE_PRECISION_HINT": precision}
        )
        return {"compile": time.perf_counter() - start}

    @torch.no_grad()
    def step(self, size: int, steps: int, seed: int) -> dict[str, float]:
        """Return the seconds of one step with guidance, without text encoding and decoding."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 4, size // 8, size // 8, generator=generator)
        text = torch.randn(2, _TOKENS, self._pipe.unet.config.cross_attention_dim)
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(steps)
        start = time.perf_counter()
        for timestep in scheduler.timesteps:
            inputs = (torch.cat([latents] * 2), timestep, text)
            result = self._compiled([one.numpy() for one in inputs])[0]
            negative, positive = torch.from_numpy(result).chunk(2)
            predicted = negative + GUIDANCE * (positive - negative)
            latents = scheduler.step(predicted, timestep, latents, generator=generator).prev_sample
        return {"step": (time.perf_counter() - start) / steps}


def main() -> None:
    peer = OpenVino(sys.argv[1])
    handlers = {name: getattr(peer, name) for name in ("convert", "compile", "step")}
    answer_requests({"memory": memory, **handlers})


if __name__ == "__main__":
    main()
