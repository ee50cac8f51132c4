"""What the rest of Fidelora has to know of a model family, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

LAYOUTS = Path(__file__).parent / "sd" / "layouts"
"""One folder per family: the diffusers layout without weights (configurations and tokenizer), for single-file checkpoints."""


@dataclass(frozen=True)
class Sampler:
    """A sampler as the trainer names it.

    Attributes:
        name: the name in training configurations, on the command line and in the API.
        scheduler: the class in `diffusers.schedulers` that does the server_defaults.
        options: what the scheduler's configuration has beside `Family.scheduler_config`.
        max_steps: the largest number of steps that the scheduler can do.
    """

    name: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    max_steps: int = 150


@dataclass(frozen=True)
class Component:
    """A part of the base model that has weights.

    Attributes:
        name: the attribute and the subfolder in a diffusers folder (`unet`, `vae`, `text_encoder`).
        library: the package that has the class, `diffusers` or `transformers`.
        class_name: the class, named in the folder's `model_index.json` too.
        weights: file name of the weights without its ending.
        precision: the field of a recipe that says its dtype.
        adapter_prefixes: how adapter files begin the names of this component's modules; empty if adapters never touch it.
        optional_prefix: a prefix that module names may have or lack, by the version of the library that wrote the file.
        tokenizer: the subfolder of the tokenizer that a text encoder reads with; empty for other parts.
        checkpoint_prefix: how the names of its weights begin in a checkpoint of the original layout, one file for all.
        original_names: whether adapter files may also call its modules as the original code did (`input_blocks_4_1_proj_in`).
    """

    name: str
    library: str
    class_name: str
    weights: str
    precision: Literal["dtype", "vae_dtype", "text_encoder_dtype"]
    checkpoint_prefix: str
    adapter_prefixes: tuple[str, ...] = ()
    optional_prefix: str = ""
    tokenizer: str = ""
    original_names: bool = False


@dataclass(frozen=True)
class Family:
    """One model family. Sizes in pixels; `scheduler_config` is what every sampler of the family starts from."""

    id: str
    title: str
    base_model: str
    base_aliases: tuple[str, ...]
    resolution_divisor: int
    default_size: int
    default_steps: int
    default_guidance_scale: float
    default_seed: int
    default_sampler: str
    samplers: Mapping[str, Sampler]
    scheduler_config: Mapping[str, Any]
    components: tuple[Component, ...]
    """In the order of their work."""
    conditioning: str
    """How prompts become what the UNet is given: a name in `engine.conditioning`."""
    trainer_archs: tuple[str | None, ...]
    """What the trainer's configurations call it in `model.arch`; None if it is what a job that says nothing trains."""
    trainer_flags: tuple[str, ...]
    """Older configurations name a family by a flag in their `model` block."""
    guidance_rescale_in_previews: bool
    """Whether the trainer's previews of this family follow the sample block's `guidance_rescale`."""
    upcasts_vae: bool
    """Whether a VAE in float16 whose configuration says `force_upcast` computes in float32, as the family's pipeline has it."""
    adapter_base_versions: tuple[str, ...]
    """Values of `ss_base_model_version` in adapter files of this family."""
    latent_colours: tuple[tuple[float, float, float], ...]
    """Red, green and blue, -1..1, that one unit of each latent channel adds, roughly: for previews while an image is made."""

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The parts that read prompts."""
        return tuple(component for component in self.components if component.tokenizer)

    @property
    def layout(self) -> Path:
        """The folder with this family's configurations and tokenizer."""
        return LAYOUTS / self.id

    def canonical_base(self, base_model: str) -> str:
        """The base's own name if `base_model` is one of its aliases, with or without `@revision`, else `base_model` as it is."""
        name, at, revision = base_model.partition("@")
        return self.base_model + at + revision if name in self.base_aliases else base_model
