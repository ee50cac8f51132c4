"""Texts for clients: without absolute paths of this machine, and of bounded length.

Messages of errors name files with their full paths, which help the operator in the log. Every text
that can contain one passes through `public_text` before it leaves the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fidelora.texts import MAX_TEXT_BYTES, shortened

_QUOTED = re.compile(r"""(['"])(/(?:(?!\1)[^\n])*)\1""")
_URL_OF_FILE = re.compile(r"\b(?:file|sqlite[\w+]*):/{2,}(?=/)")
# A slash inside a word, a URL or a fraction does not begin a path.
_UNQUOTED = re.compile(r"""(?<![\w/.~%&?-])(?!//)/[^\s'"`,;()<>|*]+""")
_ENDS = ".:!?…"
"""Punctuation that can follow a path in a sentence."""

_ROUTES = frozenset({"v1", "sdapi", "health", "ready", "metrics", "docs", "openapi.json"})
"""First components of the server's own routes, which errors name."""


class Roots:
    """Folders and files whose paths are replaced wherever they occur, even if they have spaces."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._pattern: re.Pattern[str] | None = None

    def set(self, paths: Iterable[Path | str]) -> None:
        """Set the paths to replace. For symbolic links, the path of the target is added."""
        names: dict[str, str] = {}
        for path in paths:
            whole = Path(path).expanduser().absolute()
            for one in (whole, whole.resolve()):
                if len(one.parts) > 1:
                    names[str(one)] = one.name
        longest_first = sorted(names, key=len, reverse=True)
        self._names = names
        self._pattern = re.compile(
            rf"(?<![\w/])({'|'.join(map(re.escape, longest_first))})(/|(?![\w-]|\.\w))"
        )

    def removed_from(self, text: str) -> str:
        """Return a text in which each root is replaced by its name, or removed before a slash."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: "" if match[2] else self._names[match[1]], text)


ROOTS = Roots()
"""Private paths of the server in this process, such as its data folder."""


def public_text(text: str) -> str:
    """Return a text for clients.

    Paths below the server's own folders become relative to them. Other absolute paths are shortened
    to their last component, whether or not they exist. Routes of the API such as `/v1/models` are
    kept. A text of more than 2,000 bytes is cut.
    """
    text = shortened(text, 2 * MAX_TEXT_BYTES)
    if "/" in text:
        text = ROOTS.removed_from(_URL_OF_FILE.sub("", text))
        text = _QUOTED.sub(lambda match: f"{match[1]}{_short(match[2])}{match[1]}", text)
        text = _UNQUOTED.sub(lambda match: _short(match[0]), text)
    return shortened(text)


def _short(path: str) -> str:
    name = path.rstrip(_ENDS)
    ending = path[len(name) :]
    parts = [part for part in name.split("/") if part]
    if not parts or parts[0] in _ROUTES:
        return path
    return parts[-1] + ending
