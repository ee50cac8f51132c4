"""How a picture was made, as far as its file contains it. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Program = Literal[
    "A1111", "Forge", "SD.Next", "ComfyUI", "SwarmUI", "Fooocus", "InvokeAI", "NovelAI",
    "diffusers", "Fidelora", "unknown",
]  # fmt: skip
"""Programs whose pictures are read. `diffusers` stands for scripts, whose pictures contain no
settings."""


@dataclass(frozen=True)
class UsedLora:
    """A LoRA that was applied to a picture.

    Attributes:
        name: name of the file, without folder and suffix.
        strength: multiplier in the denoiser.
        text_strength: multiplier in the text encoders; 0 if it is not applied there.
        hash: first digits of its hash; empty if unknown.
    """

    name: str
    strength: float = 1.0
    text_strength: float = 1.0
    hash: str = ""


@dataclass(frozen=True)
class UsedModel:
    """A base model or VAE.

    Attributes:
        name: name of the file or folder.
        hash: first digits of the sha256 of its file; empty if unknown.
    """

    name: str = ""
    hash: str = ""


@dataclass(frozen=True)
class Reading:
    """Settings in a picture's file, in the words of the program that made it.

    None or an empty value stands for a setting that the file does not contain.

    Attributes:
        program: program that made the picture.
        version: its version.
        sampler, scheduler: names in the program.
        emphasis: rule for brackets in prompts (`prompts.TextRule`).
        clip_skip: number of the text encoder's layer, counted from the last one (1).
        noise_source: `cpu` or `gpu`; where the initial noise was drawn.
        seed_delta: see `SimulatedNoise`.
        batch, index: number of images that were made from one seed, and position among them.
        loras: LoRAs in the order in which they were applied; None if they are unknown.
        dtype: precision of the denoiser.
        unsupported: sentences about settings that change the picture and are not simulated.
    """

    program: Program
    version: str = ""
    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    scheduler: str | None = None
    eta: float | None = None
    emphasis: str | None = None
    clip_skip: int | None = None
    noise_source: str | None = None
    seed_delta: int = 0
    batch: int | None = None
    index: int | None = None
    loras: tuple[UsedLora, ...] | None = None
    base_model: UsedModel = UsedModel()
    vae: UsedModel = UsedModel()
    dtype: str | None = None
    unsupported: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if the file contains no settings of the picture."""
        return self.prompt is None and self.seed is None and self.steps is None


def stem(name: str) -> str:
    r"""Return the name of a file without its suffix and its folders (separated by `/` or `\`)."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    for suffix in (".safetensors", ".ckpt", ".pt", ".bin", ".sft"):
        last = last.removesuffix(suffix)
    return last
