"""The form of the *Make* tab as a browser stores it. Does not import Gradio."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

from fidelora.errors import FideloraError
from fidelora.server.page.form import LABELS, MAX_LORAS, Form, build_request


def to_stored(form: Form) -> dict[str, Any]:
    """Return a form as JSON-ready data; the inverse of `from_stored`."""
    return asdict(form) | {"fields": dict(form.fields)}


def from_stored(
    stored: object, models: Collection[str], paths: Collection[str]
) -> tuple[Form, list[str]] | None:
    """Return the form that a browser stored, and the LoRAs that no longer exist.

    Args:
        stored: data from the browser, which may be anything.
        models: ids of the models of this server.
        paths: LoRAs that the visitor can choose.

    Returns:
        None if nothing usable is stored.
    """
    if not isinstance(stored, dict):
        return None
    try:
        loras = tuple((str(path), float(multiplier)) for path, multiplier in stored["loras"])
        seed = None if stored["seed"] is None else int(stored["seed"])
        given = {"num_frames": 1, "fps": 16} | stored["fields"]  # older pages had no videos
        fields = {name: given[name] for name in LABELS}
        form = Form(loras[:MAX_LORAS], seed, int(stored["images"]), fields)
        build_request(form)
    except (FideloraError, KeyError, TypeError, ValueError, OverflowError):
        return None
    if fields["model"] not in models:
        return None
    kept = tuple((path, multiplier) for path, multiplier in form.loras if path in paths)
    missing = [path for path, _ in form.loras if path not in paths]
    return replace(form, loras=kept), missing
