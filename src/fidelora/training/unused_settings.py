"""Settings that change the trainer's samples but are not replayed, as sentences for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fidelora.families import get_family

Process = Mapping[str, Any]


@dataclass(frozen=True)
class _Setting:
    """A setting that is not replayed.

    Attributes:
        path: blocks and key below the process, such as `("model", "lora_path")`.
        effect: what the trainer does, as the rest of a sentence that begins with the setting.
        is_set: True for values that have the effect; by default all true values.
    """

    path: tuple[str, ...]
    effect: str
    is_set: Callable[[Any], bool] = bool


_NEEDS_FLUX = "AI Toolkit 0.12.26 supports it only for FLUX, so the replay does not use it"
_ROUNDS = "it changes the order of additions, so samples differ by rounding"

_COMMON = (
    _Setting(
        ("model", "lora_path"),
        "the trainer merges this LoRA into the base model, and the replay does not. Merge it "
        "yourself, and set the result with --base-model",
    ),
    _Setting(("model", "unconditional_lora_path"), "the replay does not use this LoRA"),
    _Setting(
        ("model", "text_encoder_bits"),
        "the trainer quantises the text encoder, and the replay does not",
        lambda bits: isinstance(bits, int) and bits < 16,
    ),
    _Setting(("model", "compile"), _ROUNDS),
    _Setting(("train", "xformers"), _ROUNDS),
    _Setting(
        ("train", "attention_backend"), _ROUNDS, lambda backend: backend not in (None, "native")
    ),
    _Setting(
        ("network", "pretrained_lora_path"),
        "training started with this LoRA, so the samples of step 0 contain it; they are replayed "
        "with the base model alone",
    ),
    _Setting(
        ("network", "type"),
        "the trainer replaces layers of the base model, which is not supported",
        lambda kind: str(kind).lower() == "lorm",
    ),
    _Setting(
        ("adapter",),
        "the trainer samples with this adapter (T2I, ControlNet, IP-Adapter, ...), and the replay "
        "does not",
        lambda block: block is not None,
    ),
)
"""Settings of AI Toolkit 0.12.26 with an effect on Stable Diffusion 1.5, SDXL and FLUX.1."""

_SD = (
    *_COMMON,
    _Setting(("model", "assistant_lora_path"), _NEEDS_FLUX),
    _Setting(("model", "inference_lora_path"), _NEEDS_FLUX),
    _Setting(
        ("train", "free_u"),
        "AI Toolkit 0.12.26 switches FreeU off before it samples, so the replay does not use it",
    ),
    _Setting(("decorator",), _NEEDS_FLUX, lambda block: block is not None),
)
"""Settings with an effect on Stable Diffusion 1.5 and SDXL.

`model.refiner_name_or_path` is not listed, because `read_run` rejects it.
"""

_FLUX = (
    *_COMMON,
    _Setting(
        ("model", "inference_lora_path"),
        "the trainer samples with this LoRA, and the replay does not",
    ),
    _Setting(
        ("model", "attn_masking"),
        "the trainer sets the hidden states of padding to zero, and the replay does not",
    ),
    _Setting(
        ("decorator",),
        "the trainer samples with this decorator, and the replay does not",
        lambda block: block is not None,
    ),
)

_BY_FAMILY = {"sd15": _SD, "sdxl": _SD, "flux": _FLUX, "flex1": _FLUX, "flux_cfg": _FLUX}
"""Settings by id of the family. Those of the other families were not examined."""

_READS_EXTRAS = (
    *("zimage", "zimage_turbo", "zimage_deturbo", "qwen_image", "qwen_image_2512"),
    *("wan21_1b", "wan21_14b"),
)
"""Families of which the trainer reads parts from `model.extras_name_or_path`."""


def unused_settings(process: Process, model: str) -> tuple[str, ...]:
    """Return a sentence for each setting of the process that is not replayed.

    Args:
        model: id of the model family.
    """
    sentences = tuple(
        f"{'.'.join(setting.path)} is set: {setting.effect}."
        for setting in _BY_FAMILY.get(model, ())
        if _is_set(process, setting)
    )
    return (*sentences, *_other_extras(process, model))


def _other_extras(process: Process, model: str) -> tuple[str, ...]:
    """Return a sentence if the trainer read parts from elsewhere than the replay does."""
    block = process.get("model")
    if model not in _READS_EXTRAS or not isinstance(block, Mapping):
        return ()
    extras = block.get("extras_name_or_path")
    if not extras or extras in (block.get("name_or_path"), get_family(model).extras):
        return ()
    return (
        "model.extras_name_or_path is set: from there, the trainer reads the parts that the base "
        "model lacks, and the replay does not. If the base model lacks any, copy all parts into "
        "one folder, and set it with --base-model.",
    )


def _is_set(process: Process, setting: _Setting) -> bool:
    value: Any = process
    for key in setting.path:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return setting.is_set(value)
