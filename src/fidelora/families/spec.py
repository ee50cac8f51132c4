"""Model families as data. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from fidelora.sampling.spacings import TimestepSpacing

DtypeField = Literal["dtype", "vae_dtype", "text_encoder_dtype"]
Acceleration = Literal["prepacked", "packed", "compiled"]
Stage = Literal["high", "low"]
"""Part of the sampling schedule for which a denoiser was trained: high noise, or low noise."""
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class NoiseSampler:
    """A sampler on a noise schedule, computed by a scheduler of diffusers.

    Attributes:
        name: the name in training configurations, on the command line and in the API.
        scheduler: the class in `diffusers.schedulers`.
        config: the scheduler's configuration.
        max_steps: the largest number of steps that the scheduler supports.
        min_steps: the smallest number of steps for which the schedule is defined.
        spacings: timestep spacings that a recipe can choose, besides `default`.
        eta: default strength (0..1) of the noise that the sampler adds in each step; None if a
            recipe cannot set it.
        in_trainer: True if AI Toolkit has this sampler.
    """

    name: str
    scheduler: str
    config: Mapping[str, Any]
    max_steps: int = 150
    min_steps: ClassVar[int] = 1
    spacings: frozenset[TimestepSpacing] = frozenset()
    eta: float | None = None
    in_trainer: bool = True


@dataclass(frozen=True)
class FlowSampler:
    """Euler steps along a flow, on sigmas from 1 to 0.

    Attributes:
        name: as in `NoiseSampler`.
        config: options of `sampling.schedules.FlowSchedule`: `shift` and others.
        max_steps, min_steps, spacings, eta, in_trainer: as in `NoiseSampler`.
    """

    name: str
    config: Mapping[str, Any]
    max_steps: int = 150
    min_steps: int = 1
    spacings: ClassVar[frozenset[TimestepSpacing]] = frozenset()
    eta: ClassVar[float | None] = None
    in_trainer: ClassVar[bool] = True


Sampler = NoiseSampler | FlowSampler


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a text encoder.

    Attributes:
        folder: its subfolder in a base model's folder.
        bundled: folder in this package for single-file checkpoints, and for base models without a
            tokenizer; None if the family bundles no tokenizer.
        options: values that replace those in the configuration of `bundled`.
    """

    folder: str
    bundled: Path | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: NO_OPTIONS)


@dataclass(frozen=True)
class Part:
    """A part of the base model that has weights.

    Attributes:
        name: its name in diffusers' pipeline, and its subfolder in a diffusers folder.
        role: every family has one decoder, and one denoiser or one for each stage.
        stage: the part of the schedule that a denoiser is used for; None for all of it, and for
            parts of other roles.
        library: the package that has the class: `diffusers`, `transformers`, or a module of this
            project.
        class_name: name of the class, as in `model_index.json`.
        weights: the file name of the weights without its suffix.
        precision: the recipe field with its dtype.
        adapter_prefixes: prefixes of its module names in adapter files; empty if adapters never
            change it.
        submodule: path of the only submodule that the family uses, such as a language model
            without its head; empty for the whole module. The names of weights and modules are
            relative to it.
        optional_prefix: prefix that module names have or do not have, depending on the version of
            the library that wrote the file.
        tokenizer: tokenizer of a text encoder; None for other parts.
        checkpoint_prefix: prefix of its weight names in a single-file checkpoint of the original
            layout.
        is_single_file: True if a hub repository `owner/NAME` has it as NAME.safetensors at its
            root, and a single-file checkpoint contains only this part.
        companion: hub id of the repository that it comes from if the base model is a single-file
            checkpoint without it; empty for parts inside such checkpoints.
        other_names: maps module paths to the names in the original code; None if adapter files do
            not use these names.
        numbers_blocks: True if `other_names` numbers blocks consecutively, so that the names depend
            on the base model's shape.
        accepted_names: maps module paths to names in other code, which adapter files may use, but
            conversion does not write. If the other code splits a module into equal blocks of
            output rows, its path has the name for each block, in order. A name with several blocks
            is repeated. None if no other code has names of its own.
        fused_names: maps names of modules in the original code to the paths of the modules that
            share their output rows, in order; None if the family lacks such names.
        ignored_weights: suffixes of weights that files may contain but the part does not use.
        ignored_prefixes: prefixes of such weights.
        config: values that replace those of the configuration file, for example because the
            trainer's library behaved differently from the installed one.
        implementation: "module:class" of the class that computes this part; empty if it is
            `class_name`. It accepts configurations of `class_name`.
        original: file or folder of this part in a folder of the model's original layout; empty if
            this layout is not supported. The folder of a text encoder also contains its tokenizer.
        convert: "module:function" that returns weights and configuration in the form of
            `implementation`, from those of any supported layout. A file of the original layout has
            no configuration, so the function gets None. Empty if nothing is converted.
        embedding_key: name of its tensor in the files of textual-inversion embeddings; empty if the
            family does not support them.
        quantization: the recipe field that quantises its linear layers; empty if none does.
        whole_layers: patterns (`fnmatch`) of the paths of linear layers that are never quantised.
        rounds_buffers: True if the trainer's `.to(dtype)` also rounded its buffers (rotary tables).
        rounds_quantized_buffers: the same if the part is quantised.
    """

    name: str
    role: Literal["text_encoder", "denoiser", "decoder"]
    library: str
    class_name: str
    weights: str
    precision: DtypeField
    stage: Stage | None = None
    adapter_prefixes: tuple[str, ...] = ()
    submodule: str = ""
    optional_prefix: str = ""
    tokenizer: Tokenizer | None = None
    checkpoint_prefix: str = ""
    is_single_file: bool = False
    companion: str = ""
    other_names: Callable[[Iterable[str]], Mapping[str, str]] | None = None
    numbers_blocks: bool = False
    accepted_names: Callable[[Iterable[str]], Mapping[str, tuple[str, ...]]] | None = None
    fused_names: Callable[[Iterable[str]], Mapping[str, tuple[str, ...]]] | None = None
    ignored_weights: tuple[str, ...] = ()
    ignored_prefixes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=lambda: NO_OPTIONS)
    quantization: Literal["", "quantization", "text_encoder_quantization"] = ""
    whole_layers: tuple[str, ...] = ()
    implementation: str = ""
    original: str = ""
    convert: str = ""
    rounds_buffers: bool = False
    rounds_quantized_buffers: bool = True
    embedding_key: str = ""

    @property
    def title(self) -> str:
        """Its name in texts for users."""
        return "UNet" if self.name == "unet" else self.name.replace("_", " ")

    def ignores(self, weight: str) -> bool:
        """Return True if the part does not use a weight with this name in the file."""
        return weight.endswith(self.ignored_weights) or weight.startswith(self.ignored_prefixes)


@dataclass(frozen=True)
class WrongSchedule:
    """Schedule that other programs use for this family by mistake; the doctor tries it.

    Attributes:
        cause: name of this cause in the doctor's report.
        options: the sampler options that differ.
        fix: a sentence that tells the user what to do.
    """

    cause: str
    options: Mapping[str, Any]
    fix: str


@dataclass(frozen=True)
class OlderTrainer:
    """Sampling behaviour of older releases of AI Toolkit, where it differs from today's.

    Attributes:
        before: the first release with today's behaviour.
        divisor: width and height were rounded down to a multiple of it; 0 for no difference.
        guidance_offset: the recipe's guidance scale minus that of the training configuration.
        sampler: the sampler that was used; empty for no difference.
    """

    before: tuple[int, int, int]
    divisor: int = 0
    guidance_offset: float = 0.0
    sampler: str = ""


@dataclass(frozen=True)
class TrainerSampling:
    """AI Toolkit's way of sampling this family during training.

    Attributes:
        archs: values of `model.arch` in configurations of this family; None stands for a
            configuration without `model.arch`.
        flags: keys of the `model` block by which older configurations name the family.
        text_encoder_qtype: key of the `model` block with the kind of quantisation of the text
            encoders, `qtype` or `qtype_te`; empty if the trainer does not quantise this family.
        default_steps: number of steps that the trainer's user interface sets.
        option: key of the `model` block that selects this family among those with the same arch;
            empty for the family without such an option.
        rescales_guidance: True if the trainer applies `guidance_rescale` of the sample block.
        ignores_sampler: True if the trainer ignores `sample.sampler` and uses its only sampler.
        size_multiple: the trainer fails if a width or height in pixels, rounded down to a multiple
            of 8, is not a multiple of it; 8 if every size works.
        tiles_since: first release of the trainer that decodes in tiles if `model.low_vram` is set;
            None if no release does.
        wrong_schedules: schedules that other programs use by mistake.
        older: differences of older releases, the newest release first.
        whole_layers_since: first release of the trainer that does not quantise
            `Part.whole_layers` of the denoiser; None if no release quantises them, or if the family
            has none.
        assistant_float8: True if the trainer quantises the denoiser with `float8` in place of
            `qfloat8` in runs with an assistant LoRA (`training_adapters`).
    """

    archs: tuple[str | None, ...]
    flags: tuple[str, ...] = ()
    text_encoder_qtype: Literal["", "qtype", "qtype_te"] = ""
    default_steps: int = 30
    option: str = ""
    rescales_guidance: bool = False
    ignores_sampler: bool = False
    size_multiple: int = 8
    tiles_since: tuple[int, ...] | None = None
    wrong_schedules: tuple[WrongSchedule, ...] = ()
    older: tuple[OlderTrainer, ...] = ()
    whole_layers_since: tuple[int, ...] | None = None
    assistant_float8: bool = False


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        id: the name in recipes, on the command line and in the API.
        base_model: hub id of the default base; `base_aliases` are other ids of the same weights.
        extras: hub id of a base model with the parts that the default base lacks; empty if it has
            all parts.
        resolution_divisor: width and height, in pixels, are rounded down to a multiple of it.
        api_divisor: the same for requests over HTTP, if the documented API of
            `ai-toolkit-inference` has another divisor than the trainer.
        default_size: width and height, in pixels, that the default base was trained at.
        base_sizes: the same for bundled bases that were trained at another size, by name.
        uses: the optional recipe fields that have an effect for this family.
        parts: parts in the order of use.
        text, denoiser, latents: "module:class" of the implementations of `families.protocols`.
        checkpoint: module that converts single-file checkpoints; empty if they are not supported.
        layout: folder with the configurations of the default base's parts.
        accelerations: optimisations of `accel` that this family supports.
        trainer_sampling: AI Toolkit's way of sampling this family.
        adapter_base_versions: values of `ss_base_model_version` in adapter files of this family.
        latent_preview: red, green and blue, -1..1, that one unit of each latent channel adds.
        frames_per_latent: frames of a video that one latent frame stands for, after the first frame
            of the video; 0 for families that make only still images.
        default_frames, default_fps: frames and frames per second of requests over HTTP that omit
            them; None for families that make only still images.
        rounds_training_changes: True if the trainer rounds the change of a training adapter to the
            dtype of the base model before it adds it (PEFT); False if it rounds only the sum.
    """

    id: str
    title: str
    base_model: str
    resolution_divisor: int
    default_size: int
    default_steps: int
    default_guidance_scale: float
    default_seed: int
    default_sampler: str
    samplers: Mapping[str, Sampler]
    uses: frozenset[str]
    parts: tuple[Part, ...]
    text: str
    denoiser: str
    latents: str
    layout: Path
    trainer_sampling: TrainerSampling
    adapter_base_versions: tuple[str, ...]
    latent_preview: tuple[tuple[float, float, float], ...]
    api_divisor: int | None = None
    frames_per_latent: int = 0
    default_frames: int | None = None
    default_fps: int | None = None
    rounds_training_changes: bool = False
    base_aliases: tuple[str, ...] = ()
    extras: str = ""
    base_sizes: Mapping[str, int] = field(default_factory=lambda: NO_OPTIONS)
    checkpoint: str = ""
    accelerations: frozenset[Acceleration] = field(default_factory=frozenset)

    @property
    def text_encoders(self) -> tuple[Part, ...]:
        """The parts that encode prompts."""
        return tuple(part for part in self.parts if part.role == "text_encoder")

    @property
    def request_divisor(self) -> int:
        """The divisor of width and height, in pixels, in requests over HTTP."""
        return self.api_divisor or self.resolution_divisor

    @property
    def uses_negative_prompt(self) -> bool:
        """True if a negative prompt has an effect."""
        return "negative_prompt" in self.uses

    @property
    def negative_prompt_note(self) -> str:
        """A sentence for requests with a negative prompt that has no effect, else ""."""
        if self.uses_negative_prompt:
            return ""
        return f"The negative prompt has no effect: {self.title} does not use one."

    @property
    def makes_videos(self) -> bool:
        """True if the family makes videos, and still images as videos of one frame."""
        return self.frames_per_latent > 0

    def usable_frames(self, frames: int) -> int:
        """Return the number of frames that a video has if `frames` are requested.

        As in diffusers' `WanPipeline`, the result is one more than a multiple of
        `frames_per_latent`. With 4 frames per latent, 2 and 3 become 1, but 4 becomes 5. Only for
        families that make videos.
        """
        step = self.frames_per_latent
        return frames if frames % step == 1 else frames // step * step + 1

    @property
    def supports_embeddings(self) -> bool:
        """True if the family's `text` implements `families.protocols.ExtendableText`."""
        return any(part.embedding_key for part in self.parts)

    @property
    def denoisers(self) -> tuple[Part, ...]:
        """The denoiser, or the denoisers of all stages, those for more noise first."""
        return tuple(part for part in self.parts if part.role == "denoiser")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that have a denoiser each; empty for a family with one denoiser."""
        return tuple(part.stage for part in self.denoisers if part.stage is not None)

    def part(self, role: Literal["denoiser", "decoder"]) -> Part:
        """Return the part with this role, the first one of several denoisers."""
        return next(part for part in self.parts if part.role == role)

    def size_of(self, base_model: str) -> int:
        """Return the width and height, in pixels, that a base model was trained at."""
        return self.base_sizes.get(base_model, self.default_size)

    def canonical_base(self, base_model: str) -> str:
        """Return `base_model`, or the default base's id if `base_model` is an alias of it.

        An id may end in `@revision`, which is kept.
        """
        name, at, revision = base_model.partition("@")
        return self.base_model + at + revision if name in self.base_aliases else base_model
