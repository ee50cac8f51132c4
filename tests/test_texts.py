"""Cleaning of untrusted texts."""

from __future__ import annotations

import pytest

from fidelora.texts import cleaned, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sks", "sks"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\r\x00\x9b", r"a\r\x00\x9b"),
        ("right\u202eleft\u2066", r"right\u202eleft\u2066"),
        ("two\nlines\tand tab, süß 🙂", "two\nlines\tand tab, süß 🙂"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


def test_lone_surrogates_are_replaced_everywhere():
    value = {"\ud800": ["a\udfff", {"b": "\ud83d\ude42"}], "c": 1, "d": None}
    assert cleaned(value) == {"?": ["a?", {"b": "??"}], "c": 1, "d": None}
    assert cleaned("🙂") == "🙂"
