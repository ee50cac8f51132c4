"""The recipe: everything that defines an image, and nothing else.

It does not contain the device, the offload mode, paths of adapter files or the name of the output
file. A recipe is complete as soon as it is created: for fields that the caller leaves out, the
constructor uses the defaults of the model family, so other code need not check for missing fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fidelora.adapter_ref import MAX_ALPHA, MAX_MULTIPLIER, AdapterRef
from fidelora.checks import MAX_PROMPT_CHARACTERS, check_text, shown
from fidelora.errors import RecipeError, WeightsFileError
from fidelora.families import get_family
from fidelora.families.emphasis import Emphasis
from fidelora.recipe_fields import (
    ADAPTER_FIELDS,
    LOCATIONS,
    MAX_FPS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
    MIN_SIZE,
    AdapterMode,
    Dtype,
    Fidelity,
    Noise,
    Prediction,
    Quantization,
    check_recipe,
    short_name,
)
from fidelora.sampling.spacings import TimestepSpacing

__all__ = [
    "FORMAT",
    "FROM_MODEL",
    "LOCATIONS",
    "MAX_ALPHA",
    "MAX_FPS",
    "MAX_FRAMES",
    "MAX_GUIDANCE",
    "MAX_MULTIPLIER",
    "MAX_SEED",
    "MAX_SIZE",
    "MAX_STEPS",
    "MIN_SIZE",
    "AdapterMode",
    "AdapterRef",
    "Dtype",
    "Fidelity",
    "Noise",
    "Prediction",
    "Quantization",
    "Recipe",
    "differ_in_prompts_and_seed",
    "file_sha256",
    "may_share_batch",
    "replace_trigger",
    "short_name",
]

FORMAT = 2
"""Version of the JSON form, increased when the meaning of a field changes. Format 1 had no
`base_sha256` and contained the paths of local files."""

_OMITTED_DEFAULTS: Mapping[str, Any] = {
    "negative_prompt_2": None,
    "guidance_rescale": 0.0,
    "emphasis": "none",
    "timestep_spacing": "default",
    "eta": None,
    "vae_tiling": False,
    "history": (),
    "quantization": "none",
    "text_encoder_quantization": "none",
    "training_adapters": (),
    "frames": 1,
    "fps": 16,
}
"""Default values of fields that older recipes do not contain. The JSON form omits a field that has
its default value, so that the digests of older recipes stay valid."""


class _FromModel:
    """Default of a field that is filled in from the model family."""

    def __repr__(self) -> str:
        return "the model's default"


FROM_MODEL: Any = _FromModel()


def replace_trigger(prompt: str, trigger: str) -> str:
    """Replace `[trigger]` and `[name]` in `prompt` by `trigger`, as the trainer does.

    The prompt is returned unchanged if `trigger` is empty or the prompt has no placeholder.

    Raises:
        RecipeError: the result would be longer than a prompt may be.
    """
    if not trigger:
        return prompt
    # Checked before the replacement: a long trigger in many places would take gigabytes.
    counts = {placeholder: prompt.count(placeholder) for placeholder in ("[name]", "[trigger]")}
    length = len(prompt) + sum(
        count * (len(trigger) - len(placeholder)) for placeholder, count in counts.items()
    )
    if length > MAX_PROMPT_CHARACTERS and any(counts.values()):
        raise RecipeError(
            f"With the trigger word in {sum(counts.values()):,} places, the prompt has {length:,} "
            f"characters; the maximum is {MAX_PROMPT_CHARACTERS:,}.",
            field="prompt",
        )
    return prompt.replace("[name]", trigger).replace("[trigger]", trigger)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex.

    Raises:
        WeightsFileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsFileError(f"{path} cannot be read: {error.strerror or error}.") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """Everything that defines one image or video. Equal recipes define the same image.

    `base_sha256` identifies the base model by the content of its weight files. If it is set,
    `base_model`, `variant`, `config` and `vae` serve only to locate the files.

    Attributes:
        prompt: text to encode, with `[trigger]` already replaced.
        negative_prompt: text that guidance steers away from; unused without guidance.
        negative_prompt_2: negative prompt of the second text encoder, for families with two; None
            uses `negative_prompt`. The two differ in the trainer's samples if the flag `--n` is
            set, which changes only the first one.
        emphasis: syntax of the prompts. `none` treats brackets as text. `original`, `no_norm` and
            `ignore` are modes of AUTOMATIC1111's web UI (see `Emphasis`): they parse brackets, and
            encode long prompts in chunks instead of truncating them.
        model: id of the model family.
        base_model: hub id (`owner/name`, `owner/name@revision`), diffusers folder or single
            .safetensors file. The JSON form shortens paths in this field, `config` and `vae` to
            their last component.
        base_sha256: content hash of the base model (`ContentHashes.sha256_of`); may be empty. The
            engine adds it to the recipe of the finished image. If the hash is given, the engine
            rejects a base model with another hash.
        variant: variant of the weight files in a diffusers folder: `fp16` for
            `*.fp16.safetensors`, empty for files without a variant.
        config: folder in the diffusers layout with the configurations for a single-file checkpoint;
            empty for those of the family.
        vae: hub id, folder or file of a VAE that replaces the base model's; empty for no
            replacement.
        width, height: pixels, 64..4096, rounded down to a multiple of the family's divisor; by
            default the size that the base model was trained at.
        frames: number of frames of a video, 1..1001; 1 for a still image. Rounded as the trainer
            does (`Family.usable_frames`). Only for families that make videos.
        fps: frames per second of a video, 1..120; always 16 for a still image.
        steps: 1..150; some samplers have a lower maximum or a higher minimum.
        guidance_scale: 0..100; values up to 1 disable guidance, unless the denoiser gets the scale
            as an input (`flux`, `flex1`).
        guidance_rescale: 0..1; share of the guided prediction that is rescaled to the standard
            deviation of the prediction for the prompt, to avoid overexposure.
        seed: 0..2**63-1.
        sampler: one of the family's samplers.
        timestep_spacing: rule by which the sampler's timesteps are chosen. `default` is the
            trainer's rule. Most few-step LoRAs need `trailing` (as in diffusers) or `sgm_uniform`
            (SGM Uniform of ComfyUI and Forge), which only some samplers support.
        eta: 0..1; strength of the noise that the sampler adds in each step (`gamma` in the paper of
            TCD). None uses the default of the sampler. Only for samplers with this option.
        prediction: quantity that the denoiser was trained to predict.
        adapters: adapters, in the order in which they are applied.
        adapter_mode: `merged` adds the adapters to the weights; `live` applies them at each call
            and leaves the weights unchanged. The trainer merges if all samples of a training run
            share one multiplier. The results of the two modes differ by rounding errors.
        history: adapters that the trainer merged into the base model and subtracted again for
            earlier rounds of samples, in order. Each time, the rounded weights change a little.
            Only for merged adapters in `exact`.
        noise: algorithm that draws half-precision noise on the CPU: `modern` is that of
            torch >= 2.12, `legacy` that of torch <= 2.11. In float32, both give the same noise.
        dtype: dtype of the denoiser and the latents.
        vae_dtype, text_encoder_dtype: dtypes of the VAE and the text encoders; by default `dtype`.
        vae_tiling: True decodes in overlapping tiles of 256 pixels, as the trainer does with
            `low_vram`. Only images with a longer side differ.
        fidelity: `exact` reproduces the trainer's images bit for bit. `fast` computes in the
            fastest way on the device: adapters are merged, and the denoiser and decoder may use
            another precision. The initial noise, the sampler, the dtype of the latents and the text
            encoding are as in `exact`.
        quantization: `qfloat8` and `float8` store the weights of the denoiser's linear layers in
            float8, as AI Toolkit does for a `qtype` of this name. Needs fidelity `exact`, and live
            adapters.
        text_encoder_quantization: the same for the text encoders.
        training_adapters: LoRAs for training only, such as that of Z-Image Turbo, which the trainer
            merges into the base model. While it makes samples, it also applies them live with the
            opposite multiplier, so that only the rounding of the changed weights remains.

    Raises:
        RecipeError: a field is out of range or not supported by the model family.
    """

    prompt: str
    negative_prompt: str = ""
    negative_prompt_2: str | None = None
    emphasis: Emphasis = "none"
    model: str = "sd15"
    base_model: str = FROM_MODEL
    base_sha256: str = ""
    variant: str = ""
    config: str = ""
    vae: str = ""
    width: int = FROM_MODEL
    height: int = FROM_MODEL
    steps: int = FROM_MODEL
    guidance_scale: float = FROM_MODEL
    guidance_rescale: float = 0.0
    seed: int = FROM_MODEL
    sampler: str = FROM_MODEL
    timestep_spacing: TimestepSpacing = "default"
    eta: float | None = None
    prediction: Prediction = "epsilon"
    adapters: tuple[AdapterRef, ...] = ()
    adapter_mode: AdapterMode = "merged"
    history: tuple[AdapterRef, ...] = ()
    noise: Noise = "modern"
    dtype: Dtype = "float32"
    vae_dtype: Dtype = FROM_MODEL
    text_encoder_dtype: Dtype = FROM_MODEL
    vae_tiling: bool = False
    fidelity: Fidelity = "exact"
    quantization: Quantization = "none"
    text_encoder_quantization: Quantization = "none"
    training_adapters: tuple[AdapterRef, ...] = ()
    frames: int = 1
    fps: int = 16

    def __post_init__(self) -> None:
        check_text("model", self.model)
        spec = get_family(self.model)
        self._fill_in(base_model=spec.base_model)
        check_text("base_model", self.base_model)
        self._fill_in(
            width=spec.size_of(self.base_model),
            height=spec.size_of(self.base_model),
            steps=spec.default_steps,
            guidance_scale=spec.default_guidance_scale,
            seed=spec.default_seed,
            sampler=spec.default_sampler,
            vae_dtype=self.dtype,
            text_encoder_dtype=self.dtype,
        )
        if spec.stages:
            self._fill_in_stages()
        check_recipe(self, spec)
        for name in ("width", "height"):
            size = getattr(self, name)
            object.__setattr__(self, name, size - size % spec.resolution_divisor)
        if spec.makes_videos:
            object.__setattr__(self, "frames", spec.usable_frames(self.frames))
        if self.frames == 1:
            object.__setattr__(self, "fps", _OMITTED_DEFAULTS["fps"])
        for name in ("guidance_scale", "guidance_rescale"):
            # `+ 0.0` turns -0.0 into 0.0, as in `AdapterRef`.
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        if self.eta is not None:
            default = spec.samplers[self.sampler].eta
            object.__setattr__(self, "eta", None if self.eta == default else float(self.eta) + 0.0)
        if self.negative_prompt_2 == self.negative_prompt:
            object.__setattr__(self, "negative_prompt_2", None)
        object.__setattr__(self, "base_model", spec.canonical_base(self.base_model))
        for name in ADAPTER_FIELDS:
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _fill_in(self, **defaults: object) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is FROM_MODEL:
                object.__setattr__(self, name, value)

    def _fill_in_stages(self) -> None:
        """Set the stage of each adapter without one, if its name contains the stage."""
        for name in ADAPTER_FIELDS:
            refs = getattr(self, name)
            if refs and isinstance(refs, list | tuple):
                filled = tuple(
                    replace(ref, stage=ref.named_stage)
                    if isinstance(ref, AdapterRef) and ref.stage is None
                    else ref
                    for ref in refs
                )
                object.__setattr__(self, name, filled)

    @property
    def files(self) -> tuple[AdapterRef, ...]:
        """All adapters whose files are needed."""
        return (*self.training_adapters, *self.history, *self.adapters)

    def to_json(self) -> str:
        """Return the whole recipe as JSON on one line, with short names instead of paths."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_dict(self, *, paths: bool = False) -> dict[str, Any]:
        """Return the whole recipe as JSON-ready data, which `from_dict` reads.

        Args:
            paths: True keeps the full paths in `base_model`, `config` and `vae`, for stores on
                this machine. By default paths are shortened, because recipes are shared with
                images.
        """
        plain: dict[str, Any] = {"format": FORMAT}
        for entry in fields(self):
            plain[entry.name] = getattr(self, entry.name)
        if not paths:
            plain |= {name: short_name(plain[name]) for name in LOCATIONS}
        for name, default in _OMITTED_DEFAULTS.items():
            if plain[name] == default:
                del plain[name]
        for field_name in ADAPTER_FIELDS & plain.keys():
            plain[field_name] = [
                {"sha256": ref.sha256, "multiplier": ref.multiplier, "name": ref.name}
                | ({} if ref.alpha is None else {"alpha": ref.alpha})
                | ({} if ref.word is None else {"word": ref.word})
                | ({} if ref.stage is None else {"stage": ref.stage})
                for ref in plain[field_name]
            ]
        return plain

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe that `to_json` wrote, in this version or an older one.

        Raises:
            RecipeError: the text is not JSON, or a field is missing, unknown or out of range.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError("The recipe is not JSON.") from error
        return cls.from_dict(plain)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Read a recipe that `to_dict` wrote, in this version or an older one.

        Missing fields are errors, except for fields that older versions did not write.

        Raises:
            RecipeError: a field is missing, unknown or out of range.
        """
        if not isinstance(plain, Mapping):
            raise RecipeError("A recipe must be a JSON object.")
        # Recipes written before `fidelity` existed are exact.
        values = {"fidelity": "exact", **_OMITTED_DEFAULTS, **plain}
        version = values.pop("format", None)
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise RecipeError(
                f"This version of Fidelora reads recipes of the formats 1 to {FORMAT}, "
                f"but the recipe's format is {shown(version)}.",
                field="format",
            )
        if version == 1:
            values.setdefault("base_sha256", "")
        known = {entry.name for entry in fields(cls)}
        if missing := sorted(known - values.keys()):
            raise RecipeError(f"The recipe lacks {', '.join(missing)}.", field=missing[0])
        if unknown := sorted(map(str, values.keys() - known)):
            raise RecipeError(
                f"The recipe has unknown fields: {', '.join(unknown)}.", field=unknown[0]
            )
        for name in ADAPTER_FIELDS & plain.keys():
            values[name] = _read_refs(name, values[name])
        return cls(**values)

    @property
    def digest(self) -> str:
        """Sha256 in hex of the fields that define the image.

        Equal recipes have the same digest on every machine. If `base_sha256` is empty, the location
        of the base model is hashed instead, as in format 1.
        """
        canonical = json.dumps(
            self._identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self.digest)

    def _identity(self) -> dict[str, Any]:
        """Return the fields that define the image as JSON-ready data."""
        plain = self.to_dict(paths=True)
        for name in ADAPTER_FIELDS & plain.keys():
            for adapter in plain[name]:
                del adapter["name"]
        if self.fidelity == "exact":
            del plain["fidelity"]  # keeps the digests of recipes from before `fidelity` existed
        if self.base_sha256:
            for name in LOCATIONS:
                del plain[name]
        else:
            del plain["base_sha256"]
            plain["format"] = 1
        return plain


def _read_refs(name: str, plain: object) -> tuple[AdapterRef, ...]:
    # A path is not allowed: a received recipe must not refer to files on this machine.
    parts, optional = {"sha256", "multiplier", "name"}, {"alpha", "word", "stage"}
    if not isinstance(plain, list) or not all(
        isinstance(ref, Mapping) and ref.keys() - optional == parts for ref in plain
    ):
        raise RecipeError(
            f"{name} must be a list of objects with sha256, multiplier and name.", field=name
        )
    return tuple(AdapterRef(**ref) for ref in plain)


def may_share_batch(first: Recipe, second: Recipe) -> bool:
    """Return True if both recipes are `fast` and differ only in prompts and seed.

    Images in `exact` never share a batch, because their last bits depend on the batch size.
    """
    return first.fidelity == "fast" and differ_in_prompts_and_seed(first, second)


def differ_in_prompts_and_seed(first: Recipe, second: Recipe) -> bool:
    """Return True if two recipes are equal in all fields other than the prompts and the seed."""
    own = ("prompt", "negative_prompt", "negative_prompt_2", "seed")
    return replace(second, **{name: getattr(first, name) for name in own}) == first
