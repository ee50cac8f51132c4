"""Flags in sample prompts (`a red ball --w 640 --seed 7`), parsed as the trainer parses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fidelora.errors import TrainingRunError

_FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("neg", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "seed": ("seed", int),
    "l": ("guidance_scale", float),
    "cfg": ("guidance_scale", float),
    "gr": ("guidance_rescale", float),
    "s": ("sample_steps", int),
    "steps": ("sample_steps", int),
    "m": ("network_multiplier", float),
    "network_multiplier": ("network_multiplier", float),
    "frames": ("num_frames", int),
}


TRIGGER_OFF = "--trigger ''"
"""Option of `fidelora generate` that leaves `[trigger]` in the prompt."""


def split_flags(text: str) -> tuple[str, dict[str, Any]]:
    """Split a sample prompt into the prompt and the settings of its flags.

    The text is split at every `--`. In each part, the text up to the first space is the flag and
    the rest its value. As in the trainer, unknown flags, flags without effect on the supported
    models (`p2 n2 a ref ev fps ctrl_img ...`) and a `--` before a space are dropped
    together with their values, without a warning.

    Returns:
        The prompt, and the values of the flags by name of the field in the sample block.

    Raises:
        TrainingRunError: a value is not a number where one is required; the trainer fails, too.
    """
    head, *parts = text.strip().split("--")
    settings: dict[str, Any] = {}
    for part in parts:
        flag = part.split(" ")[0].strip()
        value = part[len(flag) :].strip()
        if flag in _FLAGS:
            name, parse = _FLAGS[flag]
            try:
                settings[name] = parse(value)
            except ValueError:
                raise TrainingRunError(
                    f"The flag --{flag} of the sample prompt {text!r} has the value {value!r}, "
                    "which is not a number."
                ) from None
    return head.strip(), settings


def where_to_set(generate: str, flags: str = "") -> str:
    """Return the end of a sentence about a value, which names the options that set it.

    Args:
        generate: options of `fidelora generate`.
        flags: flags of the sample prompt, if there are any.
    """
    return f"{flags and f' ({flags})'}. In fidelora generate: `{generate}`."
