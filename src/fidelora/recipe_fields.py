"""Types, limits and checks of recipe fields. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from fidelora.adapter_ref import SHA256, AdapterRef
from fidelora.checks import check_choice, check_range, check_text, shown
from fidelora.errors import RecipeError, UnknownSamplerError
from fidelora.families import Family
from fidelora.families.emphasis import Emphasis, check_emphasis
from fidelora.families.sampler_options import check_sampler_options
from fidelora.sampling.spacings import TimestepSpacing

if TYPE_CHECKING:
    from fidelora.recipe import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]
Noise = Literal["modern", "legacy"]
AdapterMode = Literal["merged", "live"]
Prediction = Literal["epsilon", "v_prediction"]
Fidelity = Literal["exact", "fast"]
Quantization = Literal["none", "qfloat8", "float8"]

MIN_SIZE, MAX_SIZE = 64, 4096  # width and height in pixels
MAX_STEPS = 150
MAX_GUIDANCE = 100.0
MAX_SEED = 2**63 - 1
MAX_FRAMES = 1001  # 4 * 250 + 1, so that a rounded number never exceeds it (`usable_frames`)
MAX_FPS = 120  # frames per second

ADAPTER_FIELDS = frozenset({"adapters", "history", "training_adapters"})

LOCATIONS: tuple[str, ...] = ("base_model", "variant", "config", "vae")
"""Fields that locate the files of the base model. All except `variant` may be local paths, which
the JSON form shortens (`short_name`)."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

_OPTIONAL: Mapping[str, Any] = {
    "negative_prompt": "",
    "negative_prompt_2": None,
    "guidance_rescale": 0.0,
    "emphasis": "none",
    "prediction": "epsilon",
    "noise": "modern",
    "quantization": "none",
    "text_encoder_quantization": "none",
    "training_adapters": (),
    "vae_tiling": False,
    "frames": 1,
    "fps": 16,
}
"""Default values of fields that only some families use (`Family.uses`). The other families reject
any other value."""


_CHOICES: tuple[tuple[str, Any], ...] = (
    ("emphasis", Emphasis),
    ("timestep_spacing", TimestepSpacing),
    ("prediction", Prediction),
    ("adapter_mode", AdapterMode),
    ("noise", Noise),
    ("dtype", Dtype),
    ("vae_dtype", Dtype),
    ("text_encoder_dtype", Dtype),
    ("fidelity", Fidelity),
    ("quantization", Quantization),
    ("text_encoder_quantization", Quantization),
)
"""Types with the allowed values of fields, by name of the field."""


def short_name(location: str) -> str:
    """Return the last component of a path, or a hub id or name of a bundled model unchanged."""
    is_file = location.lower().endswith(".safetensors")
    if _HUB_ID.fullmatch(location) and not location.startswith(".") and not is_file:
        return location
    return re.split(r"[/\\]", location.rstrip("/\\"))[-1]


def check_recipe(recipe: Recipe, spec: Family) -> None:
    """Check all fields of a recipe whose defaults are filled in.

    Args:
        spec: the recipe's model family.

    Raises:
        RecipeError: a field is out of range or not supported by the model family.
    """
    for name in ("prompt", "negative_prompt", *LOCATIONS, "base_sha256", "sampler"):
        check_text(name, getattr(recipe, name))
    if recipe.base_sha256 and not SHA256.fullmatch(recipe.base_sha256):
        raise RecipeError(
            "base_sha256 must be 64 hexadecimal digits in lower case.", field="base_sha256"
        )
    check_range("width", recipe.width, MIN_SIZE, MAX_SIZE, whole=True)
    check_range("height", recipe.height, MIN_SIZE, MAX_SIZE, whole=True)
    check_range("frames", recipe.frames, 1, MAX_FRAMES, whole=True)
    check_range("fps", recipe.fps, 1, MAX_FPS, whole=True)
    check_range("guidance_scale", recipe.guidance_scale, 0.0, MAX_GUIDANCE)
    check_range("guidance_rescale", recipe.guidance_rescale, 0.0, 1.0)
    if recipe.negative_prompt_2 is not None:
        check_text("negative_prompt_2", recipe.negative_prompt_2)
    check_range("seed", recipe.seed, 0, MAX_SEED, whole=True)
    _check_sampler(recipe, spec)
    for name, choices in _CHOICES:
        check_choice(name, getattr(recipe, name), get_args(choices))
    if not isinstance(recipe.vae_tiling, bool):
        raise RecipeError(
            f"vae_tiling must be true or false, not {shown(recipe.vae_tiling)}.", field="vae_tiling"
        )
    check_sampler_options(spec, recipe.sampler, recipe.timestep_spacing, recipe.eta)
    for name, default in _OPTIONAL.items():
        if name not in spec.uses and getattr(recipe, name) != default:
            raise RecipeError(f"{spec.title} does not use {name}; leave it out.", field=name)
    _check_emphasis(recipe)
    if recipe.fidelity == "fast" and recipe.adapter_mode == "live":
        raise RecipeError(
            "Fidelity fast always merges adapters; use adapter_mode merged, or fidelity exact.",
            field="adapter_mode",
        )
    if recipe.quantization != "none" and (
        recipe.fidelity == "fast" or (recipe.adapters and recipe.adapter_mode != "live")
    ):
        raise RecipeError(
            "Adapters cannot be merged into quantised weights; use fidelity exact and adapter_mode "
            "live.",
            field="quantization",
        )
    for name in ADAPTER_FIELDS:
        refs = getattr(recipe, name)
        if isinstance(refs, list | tuple) and all(isinstance(ref, AdapterRef) for ref in refs):
            continue
        raise RecipeError(
            f"{name} must be a tuple of AdapterRef; create each with AdapterRef.from_file(path).",
            field=name,
        )
    _check_embeddings(recipe, spec)
    _check_stages(recipe, spec)
    if recipe.history and (recipe.fidelity, recipe.adapter_mode) != ("exact", "merged"):
        raise RecipeError(
            "history needs fidelity exact and adapter_mode merged; leave history out.",
            field="history",
        )


def _check_sampler(recipe: Recipe, spec: Family) -> None:
    if recipe.sampler not in spec.samplers:
        known = ", ".join(spec.samplers)
        raise UnknownSamplerError(
            f"The sampler {recipe.sampler!r} is not supported for {spec.id}; use one of {known}.",
            field="sampler",
        )
    sampler = spec.samplers[recipe.sampler]
    check_range("steps", recipe.steps, 1, min(MAX_STEPS, sampler.max_steps), whole=True)
    if recipe.steps < sampler.min_steps:
        raise RecipeError(
            f"The schedule of {spec.title} is not defined for {recipe.steps} step: the image would "
            f"be black. Set steps to {sampler.min_steps} or more.",
            field="steps",
        )


def _check_emphasis(recipe: Recipe) -> None:
    if recipe.emphasis == "none":
        return
    if recipe.negative_prompt_2 not in (None, recipe.negative_prompt):
        raise RecipeError(
            "Emphasis does not support a second negative prompt, which could have more or "
            "fewer chunks of 77 tokens than the first; leave negative_prompt_2 out, or set "
            "emphasis to none.",
            field="negative_prompt_2",
        )
    for name in ("prompt", "negative_prompt"):
        check_emphasis(name, getattr(recipe, name))


def _check_embeddings(recipe: Recipe, spec: Family) -> None:
    words = [ref.word.lower() for ref in recipe.files if ref.word is not None]
    if words and not spec.supports_embeddings:
        raise RecipeError(
            f"{spec.title} does not support embeddings; leave out {words[0]}.", field="adapters"
        )
    for name in ("history", "training_adapters"):
        if any(ref.word is not None for ref in getattr(recipe, name)):
            raise RecipeError(
                f"{name} has an embedding, but an embedding changes no weights; leave it out.",
                field=name,
            )
    if twice := next((word for word in words if words.count(word) > 1), None):
        raise RecipeError(
            f"Two embeddings have the word {twice}; leave one of them out.", field="adapters"
        )


def _check_stages(recipe: Recipe, spec: Family) -> None:
    for ref in recipe.files:
        if ref.stage is None and spec.stages:
            raise RecipeError(
                f"{spec.title} has a transformer for high noise and one for low noise, but "
                f"{ref.name or 'an adapter'} does not name one of them. Set stage to high or low, "
                "or use a file whose name contains high_noise or low_noise.",
                field="adapters",
            )
        if ref.stage is not None and not spec.stages:
            raise RecipeError(
                f"{ref.name or 'An adapter'} has the stage {ref.stage}, but {spec.title} has one "
                "denoiser; leave stage out.",
                field="adapters",
            )
