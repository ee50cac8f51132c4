"""Writes the pages that are made from the code: HTTP API, settings, Python, errors, models, and the tables of the command line.

python -m tools.reference           writes them (`make reference`)
python -m tools.reference --check   says which of them are not what the code says, with exit code 1 (`make check`)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.pages.catalog import catalog_page
from tools.pages.command_line import with_tables
from tools.pages.error_list import errors_page
from tools.pages.python_api import python_page

from fidelora.jobs.memory import MemoryStore
from fidelora.server.app import context_with_store, make_app
from fidelora.server.problems import codes
from fidelora.settings import Settings, read_settings

DOCS = Path(__file__).resolve().parents[1] / "docs"
_MADE = "<!-- Made by `make reference`; change the code and run it again. -->"

_NAMED = "<<{}>>"
"""How a body's name is written until it is known which bodies have a place to link to."""

_ABOUT_HTTP = """
Errors other than 422 are `{"detail": {"error": {"code", "message", "details"}}}`; 422 is a field out of its range, in FastAPI's own
shape. On the paths of [OpenAI's](../how-to/openai-clients.md) and [AUTOMATIC1111's](../how-to/a1111-clients.md) APIs they have the
shapes of those, with these codes where they have none of their own. With API keys, every route but the probes needs
`Authorization: Bearer KEY`. Every answer has an `X-Request-ID`: the one that was sent, if there was one. The whole document is at
`/openapi.json`, and a page to try it at `/docs`.
""".strip()
_ABOUT_SETTINGS = """
From the environment, or from `.env` in the folder where the server is started; options of `fidelora serve` go before both. A name
that begins with `FIDELORA_` and is not here is an error.
""".strip()


def http_page() -> str:
    """Every route with its parameters, bodies and answers, and every body with its fields."""
    with tempfile.TemporaryDirectory() as folder:
        api = make_app(
            context_with_store(MemoryStore(), read_settings(data_dir=Path(folder)), {}, "")
        ).openapi()
    lines = ["# HTTP API", "", _MADE, "", api["info"]["description"], ""]
    lines += [_ABOUT_HTTP, "", "| code | status | meaning |", "|---|---|---|"]
    lines += [
        f"| `{code}` | {status} | {meaning} |"
        for code, (status, meaning) in sorted(codes().items())
    ]
    lines.append("")
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            lines += _route(method.upper(), path, route)
    lines += ["## Bodies", ""]
    bodies = {
        name: schema
        for name, schema in api["components"]["schemas"].items()
        if "properties" in schema
        and not name.startswith(("HTTPValidation", "ValidationError", "Body_"))
    }
    for name, schema in bodies.items():
        lines += _schema(name, schema)
    linked = {
        _NAMED.format(name): f"[{name}](#{name.lower()})" if name in bodies else name
        for name in api["components"]["schemas"]
    }
    text = "\n".join(lines).rstrip() + "\n"
    for mark, link in linked.items():
        text = text.replace(mark, link)
    return text


def settings_page() -> str:
    """Every setting with its default and what it means."""
    lines = ["# Settings", "", _MADE, ""]
    lines += [_ABOUT_SETTINGS, "", "| name | meaning | default |", "|---|---|---|"]
    for field in Settings.model_fields.values():
        shown = (
            f"`{field.default}`"
            if isinstance(field.default, bool | int | float | str) and field.default != ""
            else ""
        )
        lines.append(f"| `{field.validation_alias}` | {field.description} | {shown} |")
    return "\n".join(lines) + "\n"


def _route(method: str, path: str, route: dict[str, Any]) -> list[str]:
    lines = [f"## `{method} {path}`", "", route.get("description", ""), ""]
    parameters = [entry for entry in route.get("parameters", []) if entry["in"] != "path"]
    if parameters:
        lines += ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        for entry in parameters:
            lines.append(
                f"| `{entry['name']}` | {entry['in']} | {_type(entry['schema'])} | {entry.get('description', '')} |"
            )
        lines.append("")
    for media_type, content in route.get("requestBody", {}).get("content", {}).items():
        lines += [f"Body: {_type(content['schema'])} (`{media_type}`)", ""]
    lines += ["| status | answer |", "|---|---|"]
    for status, answer in sorted(route["responses"].items()):
        types = {_type(content.get("schema", {})) for content in answer.get("content", {}).values()}
        lines.append(
            f"| {status} | {', '.join(sorted(types)) or 'empty'}{_said(answer['description'])} |"
        )
    return [*lines, ""]


def _said(description: str) -> str:
    return "" if description in ("Successful Response", "Validation Error") else f": {description}"


def _schema(name: str, schema: dict[str, Any]) -> list[str]:
    lines = [
        f"### {name}",
        "",
        schema.get("description", ""),
        "",
        "| field | type | default |",
        "|---|---|---|",
    ]
    for field, content in schema["properties"].items():
        default = (
            "**required**"
            if field in schema.get("required", [])
            else f"`{content['default']}`"
            if "default" in content
            else ""
        )
        lines.append(f"| `{field}` | {_type(content)} | {default} |")
    return [*lines, ""]


def _type(schema: dict[str, Any]) -> str:
    """A type in words, with its range."""
    if "$ref" in schema:
        return _NAMED.format(schema["$ref"].rsplit("/", 1)[1])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    bounds = (
        ""
        if (lowest, highest) == (None, None)
        else " " + "..".join("" if one is None else str(one) for one in (lowest, highest))
    )
    return f"{schema.get('type', 'any')}{bounds}"


def pages() -> dict[Path, str]:
    """Every page that is made here, with its text."""
    return {
        DOCS / "reference" / "http.md": http_page(),
        DOCS / "reference" / "settings.md": settings_page(),
        DOCS / "reference" / "python.md": python_page(_MADE),
        DOCS / "reference" / "errors.md": errors_page(_MADE),
        DOCS / "models" / "index.md": catalog_page(_MADE, DOCS / "models"),
        DOCS / "cli.md": with_tables((DOCS / "cli.md").read_text()),
    }


def main() -> None:
    made = pages()
    if "--check" in sys.argv[1:]:
        old = [
            str(path.relative_to(DOCS.parent))
            for path, text in made.items()
            if not path.is_file() or path.read_text() != text
        ]
        if old:
            sys.exit(f"{', '.join(old)}: not what the code says; run `make reference`.")
        return
    for path, text in made.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
