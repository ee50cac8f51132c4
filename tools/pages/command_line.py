"""Generate the option tables in docs/cli.md from the commands; the other text is not changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer

from fidelora.cli import app

_TABLE = re.compile(
    r"<!-- options of (?P<command>[a-z ]+) -->\n.*?<!-- end of options -->", re.DOTALL
)


def with_tables(text: str) -> str:
    """Return the page with newly generated tables.

    Raises:
        ValueError: a command has no table or two tables, or a table has no command.
    """
    by_name = dict(commands())
    named = [match["command"] for match in _TABLE.finditer(text)]
    if sorted(named) != sorted(by_name):
        different = sorted(set(named) ^ set(by_name)) or "that no command has two tables"
        raise ValueError(
            "docs/cli.md needs one '<!-- options of COMMAND -->' for each command; "
            f"check {different}"
        )
    return _TABLE.sub(
        lambda match: "\n".join(_table(match["command"], by_name[match["command"]])), text
    )


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the name, without `fidelora`, and the command of everything that can be run."""
    yield from _commands("", typer.main.get_command(app))


def options(command: Any) -> set[str]:
    """Return the names of all options of a command."""
    return {
        "-h",
        "--help",
        *(name for parameter in command.params for name in parameter.opts if name.startswith("-")),
    }


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name.strip(), command
        return
    for part, inner in command.commands.items():
        yield from _commands(f"{name} {part}", inner)


def _table(name: str, command: Any) -> Iterator[str]:
    yield f"<!-- options of {name} -->"
    yield from ["", "| option | meaning | default |", "|---|---|---|"]
    for parameter in command.params:
        yield f"| {_names(parameter)} | {parameter.help} | {_default(parameter)} |"
    yield from ["", "<!-- end of options -->"]


def _names(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return f"`{parameter.metavar or parameter.name.upper()}`"
    value = "" if parameter.is_flag or not parameter.metavar else f" {parameter.metavar}"
    names = sorted(parameter.opts, key=len)
    return ", ".join(f"`{name}{value}`" for name in names) + (
        "; repeatable" if parameter.multiple else ""
    )


def _default(parameter: Any) -> str:
    value = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    return "" if value in (None, "", False) or value == () else f"`{value}`"
