"""Prompts that a browser has sent, stored in that browser. Does not import Gradio."""

from __future__ import annotations

Entry = tuple[str, str]
"""A prompt and its negative prompt."""

MAX_ENTRIES = 50
"""Number of prompts to keep; a longer list would be slow to search by eye."""
_MAX_STORED_CHARACTERS = 4000
"""Longer prompts are not stored: browsers limit the storage of a site to about 5 MB."""
_MAX_LABEL = 100
"""Characters of a prompt in the list."""


def read_history(stored: object) -> list[Entry]:
    """Return the entries that a browser stored, newest first; invalid ones are ignored."""
    return [
        (entry[0], entry[1])
        for entry in (stored if isinstance(stored, list) else [])
        if isinstance(entry, list | tuple)
        and len(entry) == 2
        and all(isinstance(text, str) for text in entry)
    ][:MAX_ENTRIES]


def add_prompt(history: list[Entry], prompt: str, negative: str) -> list[Entry]:
    """Return the history with this prompt first."""
    entry = (prompt, negative)
    if not prompt.strip() or len(prompt) + len(negative) > _MAX_STORED_CHARACTERS:
        return history
    return [entry, *(other for other in history if other != entry)][:MAX_ENTRIES]


def history_choices(history: list[Entry]) -> list[tuple[str, int]]:
    """Return the label and index of each entry, for a drop-down list."""
    return [(_label(*entry), index) for index, entry in enumerate(history)]


def _label(prompt: str, negative: str) -> str:
    text = f"{prompt} — negative: {negative}" if negative else prompt
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"
