"""Cleaning of text from files and requests, before it is stored or printed."""

from __future__ import annotations

import re
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, except for tab and line feed, and characters that change the direction of
text."""


def cleaned(value: Any) -> Any:
    """Return a JSON value with each lone surrogate in its strings replaced by `?`.

    JSON can contain lone surrogates as escapes, but UTF-8 cannot encode them, so they can be
    written neither to a file nor to a response. The value must not be nested deeper than
    `json.loads` accepts.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {cleaned(key): cleaned(one) for key, one in value.items()}
    return [cleaned(one) for one in value] if isinstance(value, list) else value


MAX_TEXT_BYTES = 2000
"""Longest text of an error, in UTF-8: names in files and requests can have megabytes."""


def shortened(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return a text of at most `max_bytes` in UTF-8, with an ellipsis if its end was cut off."""
    if len(text) * 4 <= max_bytes:
        return text
    content = text[:max_bytes].encode("utf-8", "replace")
    if len(text) <= max_bytes and len(content) <= max_bytes:
        return text
    return content[: max_bytes - 3].decode("utf-8", "ignore") + "..."


def printable(text: str) -> str:
    r"""Return a text whose control characters are shown as escapes such as `\x1b`.

    Otherwise, a file could change the colours and the title of a terminal, or hide text.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
