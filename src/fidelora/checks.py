"""Checks of recipe fields; each raises RecipeError with one sentence that names the field."""

from __future__ import annotations

from fidelora.errors import RecipeError

MAX_PROMPT_CHARACTERS = 10_000
"""Maximum length of a text field: about 2,500 tokens, more than any text encoder reads."""


def check_text(name: str, value: object) -> None:
    """Check that `value` is text that every store and file format can represent, and not too long.

    The maximum is `MAX_PROMPT_CHARACTERS`.
    """
    if not isinstance(value, str):
        raise RecipeError(f"{name} must be text, not {type(value).__name__}.", field=name)
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise RecipeError(
            f"{name} has {len(value):,} characters; the maximum is {MAX_PROMPT_CHARACTERS:,}.",
            field=name,
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(
            f"{name} contains a lone surrogate, which is not valid text; remove it.",
            field=name,
        )


def check_range(
    name: str, value: object, least: float, most: float, *, whole: bool = False
) -> None:
    """Check that `value` is a number (with `whole`, an integer) from `least` to `most`."""
    kind: type | tuple[type, ...] = int if whole else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(
            f"{name} must be a {'whole ' if whole else ''}number, not {shown(value)}.",
            field=name,
        )
    assert isinstance(value, int | float)
    if not least <= value <= most:  # also True for NaN
        raise RecipeError(
            f"{name} is {shown(value)}; it must be from {least} to {most}.", field=name
        )


def shown(value: object) -> str:
    """Return a short text for a value in messages.

    Very long integers are described, because Python cannot print thousands of digits.
    """
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    text = (
        repr(value)
        if isinstance(value, str | int | float | bool) or value is None
        else f"a {type(value).__name__}"
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise RecipeError(
            f"{name} is {shown(value)}; it must be one of {', '.join(choices)}.", field=name
        )
