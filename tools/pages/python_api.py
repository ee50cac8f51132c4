"""docs/reference/python.md: what `fidelora` exports, from signatures and docstrings, without importing any of it."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterator
from typing import Any, cast

import griffe
from griffe import Docstring, DocstringSection, DocstringSectionKind, Object

_ABOUT = """
What `fidelora` exports. Names that begin with an underscore, and whatever is in other modules, may change with any version. All
errors are in [`fidelora.errors`](errors.md), and the bodies that the clients return are those of the [HTTP API](http.md#bodies).

`import fidelora` loads nothing; a name's module is loaded when the name is used. `Client` and `AsyncClient` need
`pip install 'fidelora[client]'`.
""".strip()
_TITLES = {
    DocstringSectionKind.parameters: "Arguments",
    DocstringSectionKind.attributes: "Attributes",
    DocstringSectionKind.raises: "Raises",
    DocstringSectionKind.returns: "Returns",
    DocstringSectionKind.yields: "Yields",
}


class _Strict(logging.Handler):
    """A docstring that cannot be read ends the run; griffe alone would leave that part out with a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError(record.getMessage())


def python_page(made: str) -> str:
    """Every public name with its signature, what it takes, what it has and what it raises."""
    logging.getLogger("griffe").addHandler(_Strict(logging.WARNING))
    package = cast(griffe.Module, griffe.load("fidelora", docstring_parser="google"))
    assert package.exports is not None
    lines = ["# Python", "", made, "", _ABOUT, ""]
    for name in map(str, package.exports):
        found = package[name]
        thing: Object = found.final_target if found.is_alias else found
        if name == "__version__":
            lines += ["## `__version__`", "", "The version, a string.", ""]
        elif name == "FideloraError":
            lines += [
                "## FideloraError",
                "",
                *_text(thing.docstring),
                "The root of [all errors](errors.md).",
                "",
            ]
        else:
            lines += [f"## {name}", "", *_entry(thing, name)]
    return "\n".join(lines).rstrip() + "\n"


def _entry(thing: Object, name: str) -> Iterator[str]:
    yield from ["```py", *_signature(thing, name), "```", ""]
    yield from _text(thing.docstring)
    if thing.is_class:
        for member in thing.members.values():
            if member.name.startswith("_") or not member.has_docstring:
                continue
            yield from [f"### {name}.{member.name}", ""]
            yield from _entry(cast(Object, member), f"{name}.{member.name}")


def _signature(thing: Object, name: str) -> list[str]:
    """How it is called, one argument a line where one line is not enough."""
    if isinstance(thing, griffe.Attribute):
        return [f"{name}: {thing.annotation}"]
    assert isinstance(thing, griffe.Function | griffe.Class)
    parameters, after_star = [], False
    for parameter in thing.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not after_star:
            parameters.append("*")
            after_star = True
        parameters.append(_parameter(parameter))
    returns = f" -> {thing.returns}" if isinstance(thing, griffe.Function) else ""
    kind = "async " if "async" in thing.labels else ""
    line = f"{kind}{name}({', '.join(parameters)}){returns}"
    if len(line) <= 88:
        return [line]
    return [f"{kind}{name}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"]


def _parameter(parameter: griffe.Parameter) -> str:
    kinds = griffe.ParameterKind
    stars = (
        "**"
        if parameter.kind is kinds.var_keyword
        else "*"
        if parameter.kind is kinds.var_positional
        else ""
    )
    default = "" if parameter.default is None or stars else f" = {parameter.default}"
    # `FROM_MODEL` is a private mark for what the model's data fills in.
    return f"{stars}{parameter.name}: {parameter.annotation}{default.replace('FROM_MODEL', '...')}"


def _text(docstring: Docstring | None) -> list[str]:
    assert docstring is not None
    lines: list[str] = []
    for section in docstring.parsed:
        if section.kind is DocstringSectionKind.text:
            lines += _fenced(section.value)
        elif section.kind in _TITLES:
            lines += [f"{_TITLES[section.kind]}:", "", *_items(section), ""]
        else:
            raise ValueError(
                f"{docstring.parent}: a section of the kind {section.kind.value} has no place here"
            )
    return lines


def _fenced(text: str) -> Iterator[str]:
    """The text with its indented examples as blocks of Python."""
    for paragraph in re.split(r"\n\n(?=\S|    )", text):
        if paragraph.startswith("    "):
            yield from ["```python", *textwrap.dedent(paragraph).splitlines(), "```", ""]
        else:
            yield from [*paragraph.splitlines(), ""]


def _items(section: DocstringSection) -> Iterator[str]:
    for item in cast(list[Any], section.value):
        description = " ".join(item.description.split())
        name = str(getattr(item, "name", ""))
        if section.kind is DocstringSectionKind.attributes and name.endswith(
            ","
        ):  # "width, height: ..." in one entry
            name, annotation = f"{name} {item.annotation}", ""
        elif section.kind is DocstringSectionKind.raises:
            name, annotation = str(item.annotation).strip("()"), ""
        else:
            annotation = str(item.annotation)
        names = ", ".join(f"`{part.strip()}`" for part in name.split(",")) if name else ""
        shown = (
            f" (`{annotation}`)"
            if annotation and section.kind is DocstringSectionKind.attributes
            else ""
        )
        yield f"* {names}{shown}: {description}"
