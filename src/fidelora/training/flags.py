"""The flags that a sample prompt may carry (`a red ball --w 640 --seed 7`), read as the trainer reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fidelora.errors import JobFolderError

_EFFECTS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
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
}


def split_flags(text: str) -> tuple[str, dict[str, Any]]:
    """The prompt without its flags, and what the flags set, by the names of the sample block's fields.

    The text is split at every `--`; what follows up to the first space is the flag, the rest its value. A flag that the
    trainer does not know, or that has no effect on any model here (`p2 n2 a ref ev frames fps ctrl_img ...`), is dropped with
    its value, and so is a `--` before a space. That is what the trainer does without a word, so it is what its previews show.

    Raises:
        JobFolderError: the value of a flag is no number where one is needed; the trainer itself would have stopped there.
    """
    head, *parts = text.strip().split("--")
    settings: dict[str, Any] = {}
    for part in parts:
        flag = part.split(" ")[0].strip()
        value = part[len(flag) :].strip()
        if flag in _EFFECTS:
            name, parse = _EFFECTS[flag]
            try:
                settings[name] = parse(value)
            except ValueError:
                raise JobFolderError(
                    f"The sample prompt {text!r} has a flag --{flag} whose value {value!r} is no number."
                ) from None
    return head.strip(), settings
