"""Settings of AUTOMATIC1111's API: supported values, and values that ask for nothing."""

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
    "sd_vae": ("Automatic", "None"),  # both are the base model's own
}
"""Settings that can be set for later requests, with their values."""
_CHOICES: Mapping[str, Collection[str]] = {
    **_LASTING,
    "samples_format": FORMATS,
    "emphasis": EMPHASIS,
}
"""Settings that can be set for one request, with their values."""


def options_of(model: str, emphasis: Emphasis = "none") -> dict[str, Any]:
    """Return the supported settings of A1111 with their fixed values.

    Args:
        emphasis: that of requests that do not set it.
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
    changes: Mapping[str, Any], fixed: Mapping[str, Any], *, for_one_request: bool = False
) -> None:
    """Check that each setting has its fixed value, or can be set.

    The base model can be set for later requests, too, and the others only for one request.

    Args:
        fixed: see `options_of`.

    Raises:
        RequestError: a setting cannot be changed; the message names it.
    """
    for name, value in changes.items():
        field_path = f"override_settings.{name}" if for_one_request else name
        if asks_for_nothing(value, (fixed[name],) if name in fixed else ("", False, [], {})):
            continue
        choices = _CHOICES.get(name, ()) if for_one_request or name in _LASTING else ()
        if isinstance(value, str) and value in choices:
            continue
        if name in fixed:
            raise unsupported(field_path, f"cannot be {shown(value)}: it is always {fixed[name]!r}")
        settings = ", ".join(fixed)
        raise unsupported(
            field_path, f"cannot be {shown(value)}: the supported settings are {settings}"
        )


def asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Return True for null, a neutral value, and a list or object without other values.

    Scripts whose arguments are all empty or false are switched off.
    """
    if value is None or any(type(value) is type(one) and value == one for one in neutral):
        return True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return any(value == one for one in neutral if not isinstance(one, bool))
    if isinstance(value, dict):
        return all(asks_for_nothing(one, ("", False, [], {})) for one in value.values())
    return isinstance(value, list) and all(
        asks_for_nothing(one.strip() if isinstance(one, str) else one, ("", False, {}))
        for one in value
    )


def unsupported(name: str, why: str) -> RequestError:
    """Return the error for a field or setting that is not supported."""
    return RequestError(f"{name} {why}.", code="FIELD_NOT_SUPPORTED", details={"field": name})


def shown(value: object) -> str:
    """Return a value as JSON for messages, shortened to 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
