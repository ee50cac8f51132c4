"""Settings of AUTOMATIC1111's API: supported values, and neutral values, which have no effect."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from fidelora.errors import RequestError
from fidelora.families import all_families
from fidelora.families.emphasis import Emphasis
from fidelora.images.a1111_prompt import EMPHASIS, name_of_emphasis

FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
"""Image formats by the names of A1111's setting `samples_format`."""
_LASTING: Mapping[str, Collection[str]] = {
    "sd_model_checkpoint": all_families(),
    "sd_vae": ("Automatic", "None"),  # both stand for the base model's own VAE
}
"""Settings that can be set for later requests, with their values."""
_CHOICES: Mapping[str, Collection[str]] = {
    **_LASTING,
    "samples_format": FORMATS,
    "emphasis": EMPHASIS,
}
"""Settings that can be set for one request, with their values."""


def options_of(model: str, emphasis: Emphasis = "none") -> dict[str, Any]:
    """Return the supported settings of A1111 with their current values.

    Args:
        emphasis: emphasis for requests that do not set it.
    """
    return {
        "sd_model_checkpoint": model,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "emphasis": name_of_emphasis(emphasis),
        "CLIP_stop_at_last_layers": 1,
        "eta_noise_seed_delta": 0,
    }


def check_options(
    changes: Mapping[str, Any], current: Mapping[str, Any], *, for_one_request: bool = False
) -> None:
    """Check that each setting keeps its current value or can be changed to the given one.

    Args:
        current: see `options_of`.
        for_one_request: True if the changes apply to one request, which allows more settings.

    Raises:
        RequestError: a setting cannot be changed; the message names it.
    """
    for name, value in changes.items():
        field_path = f"override_settings.{name}" if for_one_request else name
        if is_neutral(value, (current[name],) if name in current else ("", False, [], {})):
            continue
        choices = _CHOICES.get(name, ()) if for_one_request or name in _LASTING else ()
        if isinstance(value, str) and value in choices:
            continue
        if choices:
            raise unsupported(
                field_path, f"cannot be {shown(value)}; use one of {', '.join(choices)}"
            )
        if name in current:
            raise unsupported(
                field_path, f"cannot be {shown(value)}: it is always {current[name]!r}"
            )
        settings = ", ".join(current)
        raise unsupported(field_path, f"is not supported; the supported settings are {settings}")


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Return True for null, a value in `neutral`, and a list or object of only empty values.

    Clients also send the arguments of scripts that are switched off; these are empty or false.
    """
    if value is None or any(type(value) is type(one) and value == one for one in neutral):
        return True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return any(value == one for one in neutral if not isinstance(one, bool))
    if isinstance(value, dict):
        return all(is_neutral(one, ("", False, [], {})) for one in value.values())
    return isinstance(value, list) and all(
        is_neutral(one.strip() if isinstance(one, str) else one, ("", False, {})) for one in value
    )


def unsupported(name: str, why: str) -> RequestError:
    """Return the error for a field or setting that is not supported."""
    return RequestError(f"{name} {why}.", code="FIELD_NOT_SUPPORTED", details={"field": name})


def shown(value: object) -> str:
    """Return a value as JSON for messages, shortened to 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
