"""Generate docs/reference/python.md from the exported signatures and docstrings.

Griffe reads the source files; nothing is imported.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterator
from typing import Any, cast

import griffe
from griffe import Docstring, DocstringSection, DocstringSectionKind, Object

_ABOUT = """
This page describes the names that `fidelora` exports. Names that begin with an underscore, and
other modules, may change with any version. All errors are in [`fidelora.errors`](errors.md). The
objects that the clients return are the bodies of the [HTTP API](http.md#bodies).

`import fidelora` loads no submodules; each is loaded when one of its names is used. `Client` and
`AsyncClient` need the extra `client`.
""".strip()
_TITLES = {
    DocstringSectionKind.parameters: "Arguments",
    DocstringSectionKind.attributes: "Attributes",
    DocstringSectionKind.raises: "Raises",
    DocstringSectionKind.returns: "Returns",
    DocstringSectionKind.yields: "Yields",
}


class _Strict(logging.Handler):
    """Turn griffe's warnings about docstrings that it cannot parse into errors."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError(record.getMessage())


def python_page(note: str) -> str:
    """Return the page: each public name with signature, arguments, attributes and errors."""
    logging.getLogger("griffe").addHandler(_Strict(logging.WARNING))
    package = cast(griffe.Module, griffe.load("fidelora", docstring_parser="google"))
    assert package.exports is not None
    lines = ["# Python", "", note, "", _ABOUT, ""]
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
    """Return the signature, with one argument per line if it is too long for one line."""
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
    # `FROM_MODEL` is a private sentinel: the default comes from the model family.
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
                f"{docstring.parent}: docstring sections of kind {section.kind.value} "
                "are not supported"
            )
    return lines


def _fenced(text: str) -> Iterator[str]:
    """Yield the text with its indented examples as Python code blocks."""
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
        yield f"* {names}{shown}: {description}" if names else f"* {description}"
