"""Texts from outside."""

from __future__ import annotations

from typing import Any


def cleaned(value: Any) -> Any:
    """Return a JSON value whose texts are valid, with `?` for each lone surrogate.

    JSON can contain lone surrogates as escapes, but no file and no response can. The value must not
    be nested deeper than `json.loads` accepts.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {cleaned(key): cleaned(one) for key, one in value.items()}
    return [cleaned(one) for one in value] if isinstance(value, list) else value
