"""Texts from files and requests: cleaned before they are stored or printed, and in messages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

MAX_NESTING = 100
"""Largest depth of JSON from files and requests. It is well below Python's recursion limit of 1,000
calls, so that every function can walk through such a value."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, except for tab and line feed, and characters that change the direction of
text."""
_TOO_DEEP = f"the JSON is nested deeper than {MAX_NESTING} levels"


def read_json(text: str | bytes) -> Any:
    """Parse JSON from a file or a request; lone surrogates are replaced (`cleaned`).

    Raises:
        ValueError: the text is not JSON, has a number of more than 4,300 digits, or is nested
            deeper than `MAX_NESTING`.
    """
    try:
        return cleaned(json.loads(text))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def cleaned(value: Any, depth: int = 0) -> Any:
    """Return a JSON value whose texts are valid, with `?` for each lone surrogate.

    JSON can contain lone surrogates as escapes, but UTF-8 cannot encode them, so they could not be
    written to a file or a response.

    Args:
        depth: number of lists and objects around the value.

    Raises:
        ValueError: the value is nested deeper than `MAX_NESTING`.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if not isinstance(value, dict | list):
        return value
    if depth == MAX_NESTING:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, list):
        return [cleaned(one, depth + 1) for one in value]
    return {cleaned(key): cleaned(one, depth + 1) for key, one in value.items()}


MAX_TEXT_BYTES = 2000
"""Maximum length of an error message in UTF-8. Messages can contain names from files and requests,
which can be megabytes long."""


def shortened(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return a text of at most `max_bytes` in UTF-8, without its middle if it is longer.

    A quarter of `max_bytes` comes from the end of the text, which often contains the advice to the
    user.
    """
    if len(text) * 4 <= max_bytes:
        return text
    start = text[:max_bytes].encode("utf-8", "replace")
    if len(text) <= max_bytes and len(start) <= max_bytes:
        return text
    mark = b" [...] "
    end = text[-max_bytes:].encode("utf-8", "replace")[-(max_bytes // 4) :]
    start = start[: max_bytes - len(mark) - len(end)]
    return b"".join(
        (start.decode("utf-8", "ignore").encode(), mark, end.decode("utf-8", "ignore").encode())
    ).decode()


def printable(text: str) -> str:
    r"""Return a text whose control characters are shown as escapes such as `\x1b`.

    Otherwise, a file could change the colours and the title of a terminal, or hide text.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most` names of a list for a message: `a, b, c and 12 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def plain_message(text: str) -> str:
    """Return a message that is safe to print: without control characters, and not too long.

    Messages contain names from files and requests.
    """
    return shortened(_escaped(text))


def _escaped(text: str) -> str:
    """Return a text with escapes for characters that are not printable.

    The middle of a very long text is left out, because `shortened` removes it anyway.
    """
    if len(text) > 2 * MAX_TEXT_BYTES:
        text = text[:MAX_TEXT_BYTES] + text[-MAX_TEXT_BYTES:]
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )
