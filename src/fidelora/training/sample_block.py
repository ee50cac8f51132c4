"""Samples in a training run's configuration: the blocks `sample` and `first_sample`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fidelora.errors import TrainingRunError
from fidelora.training.config_file import number_of


@dataclass(frozen=True)
class SampleItem:
    """An item of the sample block, with the block's values as defaults.

    Flags in the prompt are not parsed here.
    """

    prompt: str
    neg: str
    width: int
    height: int
    seed: int | None
    guidance_scale: float
    sample_steps: int
    network_multiplier: float
    guidance_rescale: float = 0.0
    num_frames: int = 1
    fps: int = 16


def sample_settings(block: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of `TrainingRun` that a block of sample settings defines.

    Args:
        name: name of the block in error messages.

    Raises:
        TrainingRunError: a value is not valid.
    """
    return {
        "sampler": str(block.get("sampler", "ddpm")),
        "seed": number_of(int, block.get("seed", 0), f"{name}.seed"),
        "walk_seed": bool(block.get("walk_seed", False)),
        "image_format": str(block.get("format", "jpg")),
        "samples": tuple(_items(block, name)),
        "sample_every": max(
            0, number_of(int, block.get("sample_every") or 0, f"{name}.sample_every")
        ),
    }


def _items(sample: Mapping[str, Any], name: str) -> list[SampleItem]:
    """Return the items of a block of samples, with the trainer's defaults.

    The defaults of the trainer's user interface differ, but do not matter here, because it writes
    all values to the configuration.

    Args:
        name: name of the block in error messages.
    """
    defaults = {
        "width": 512, "height": 512, "neg": False, "guidance_scale": 7, "guidance_rescale": 0,
        "sample_steps": 20, "network_multiplier": 1,
    }  # fmt: skip
    block = defaults | {key: value for key, value in sample.items() if key != "samples"}
    prompts = sample.get("prompts") or []
    raw = sample.get("samples") or (
        [{"prompt": prompt} for prompt in prompts] if isinstance(prompts, list) else prompts
    )
    if not isinstance(raw, list) or not all(
        isinstance(item, dict) and isinstance(item.get("prompt"), str) for item in raw
    ):
        raise TrainingRunError(
            f"{name}.samples or {name}.prompts is not a list of items with a prompt each; "
            "correct the configuration."
        )
    # The trainer ignores guidance_rescale of an item.
    rescale = {"guidance_rescale": block["guidance_rescale"]}
    return [
        _item(block | item | rescale, item.get("seed"), f"{name}.samples[{index}]")
        for index, item in enumerate(raw)
    ]


def _item(values: Mapping[str, Any], seed: object, where: str) -> SampleItem:
    return SampleItem(
        prompt=values["prompt"],
        neg=str(values["neg"] or ""),
        width=number_of(int, values["width"], f"{where}.width"),
        height=number_of(int, values["height"], f"{where}.height"),
        seed=None if seed is None else number_of(int, seed, f"{where}.seed"),
        guidance_scale=number_of(float, values["guidance_scale"], f"{where}.guidance_scale"),
        sample_steps=number_of(int, values["sample_steps"], f"{where}.sample_steps"),
        network_multiplier=number_of(
            float, values["network_multiplier"], f"{where}.network_multiplier"
        ),
        guidance_rescale=number_of(float, values["guidance_rescale"], f"{where}.guidance_rescale"),
        num_frames=number_of(int, values.get("num_frames") or 1, f"{where}.num_frames"),
        fps=number_of(int, values.get("fps") or 16, f"{where}.fps"),
    )
