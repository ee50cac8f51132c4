"""Sentences for values that pydantic refuses: fields of requests, settings and command options.

Pydantic's own messages are written for the authors of a model ("Input should be a valid integer,
unable to parse string as an integer"). These are written for the user who set the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

_SENTENCES = {
    "missing": "It is required.",
    "none_required": "Expected null.",
    "int_type": "Expected an integer.",
    "int_parsing": "Expected an integer.",
    "int_parsing_size": "The number is too large.",
    "int_from_float": "Expected an integer.",
    "float_type": "Expected a number.",
    "float_parsing": "Expected a number.",
    "finite_number": "Expected a finite number.",
    "bool_type": "Expected true or false.",
    "bool_parsing": "Expected true or false.",
    "string_type": "Expected a string.",
    "string_pattern_mismatch": "Expected a string that matches {pattern}.",
    "string_unicode": "Expected valid Unicode text.",
    "list_type": "Expected a list.",
    "tuple_type": "Expected a list.",
    "dict_type": "Expected an object.",
    "model_type": "Expected an object.",
    "model_attributes_type": "Expected an object.",
    "greater_than_equal": "Expected a number of at least {ge}.",
    "greater_than": "Expected a number greater than {gt}.",
    "less_than_equal": "Expected a number of at most {le}.",
    "less_than": "Expected a number less than {lt}.",
    "multiple_of": "Expected a multiple of {multiple_of}.",
    "string_too_short": "Expected a string of at least {min_length} character(s).",
    "string_too_long": "Expected a string of at most {max_length} characters.",
    "too_short": "Expected a list of at least {min_length} item(s).",
    "too_long": "Expected a list of at most {max_length} items.",
    "literal_error": "Expected {expected}.",
    "enum": "Expected {expected}.",
    "extra_forbidden": "This field does not exist.",
}
"""Sentences by pydantic's error type (`pydantic_core.ErrorType`); `{}` are names of its context."""

_SIMILAR = 0.75
"""Smallest similarity (0..1, as `difflib` computes it) of a misspelled name: `promts`, `lora`."""


def field_sentence(entry: Mapping[str, Any]) -> str:
    """Return a sentence for an entry of `pydantic.ValidationError.errors()`.

    For errors of the whole body, it says how to send one. Types without a sentence here keep
    pydantic's message.
    """
    kind = entry["type"]
    context = {name: _whole(value) for name, value in entry.get("ctx", {}).items()}
    if kind == "json_invalid":
        reason = context.get("error", "it cannot be parsed")
        return f"The body is not valid JSON: {reason}."
    if kind == "model_attributes_type" and tuple(entry["loc"]) == ("body",):
        return (
            "The body must be a JSON object, sent with the header `Content-Type: application/json`."
        )
    if kind == "missing" and (given := _misspelled(entry)):
        return f"It is required. The request has {given!r} instead, which does not exist."
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(**context)
    message = str(entry["msg"]).removeprefix("Value error, ")
    return message if message.endswith((".", "!", "?")) else f"{message}."


def similar_name(name: str, names: Iterable[object]) -> str | None:
    """Return the one of some names that differs from `name` by a typing error; None if none does.

    Names that cannot be shown in a message are left out.
    """
    shown = [one for one in names if isinstance(one, str) and len(one) < 100 and one.isprintable()]
    near = get_close_matches(name, shown, n=1, cutoff=_SIMILAR)
    return near[0] if near else None


def _misspelled(entry: Mapping[str, Any]) -> str | None:
    """Return the name of the field that was given instead of a missing one, by its spelling."""
    given, name = entry.get("input"), entry["loc"][-1] if entry["loc"] else None
    if not isinstance(given, Mapping) or not isinstance(name, str):
        return None
    return similar_name(name, given)


def _whole(value: Any) -> Any:
    """Return a limit such as 1.0 as the integer 1, and any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
