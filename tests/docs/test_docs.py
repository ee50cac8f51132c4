"""What the documents say can be done: commands and options that there are, code that compiles, links that lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from tools.pages.command_line import commands, options
from tools.pages.error_list import all_errors

import fidelora
from fidelora.engine.examine import ProblemCode
from fidelora.jobs.memory import MemoryStore
from fidelora.server.app import context_with_store, make_app
from fidelora.server.problems import codes
from fidelora.settings import Settings, read_settings
from fidelora.training.doctor import CAUSES
from fidelora.workers.worker import error_code

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL
)
OF_TESTS_AND_OTHERS = {"FIDELORA_TEST_KILLS"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        match["text"]
        for match in BLOCK.finditer(page.read_text())
        if match["language"] in languages
    ]


def without_blocks(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def shell_commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a block of the shell, and in the text between backticks."""
    for block in blocks(page, "console", "bash", "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        asked = [line[2:] for line in lines if line.startswith("$ ")]
        for line in asked or lines:
            for part in re.split(r"[|>]|&&", line):
                yield shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
    for code in re.findall(r"`(fidelora [^`]+)`", without_blocks(page)):
        yield code.replace("'", "").split()


@every_page
def test_commands_and_options_are_those_of_the_command_line(page):
    there_are = dict(commands())
    for words in shell_commands(page):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if (
            not words
            or words[0] != "fidelora"
            or len(words) == 1
            or words[1].startswith(("-", "..."))
        ):
            continue
        name = " ".join(words[1:3]) if " ".join(words[1:3]) in there_are else words[1]
        if any(other.startswith(f"{name} ") for other in there_are):
            continue  # a group of commands, named alone
        assert name in there_are, f"{words}: there is no such command"
        known = options(there_are[name])
        given = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{words}: fidelora {name} has no {given - known}"


@every_page
def test_targets_of_make_are_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [words[1:] for words in shell_commands(page) if words[:1] == ["make"]]
    named += [code.split() for code in re.findall(r"`make ([^`]+)`", without_blocks(page))]
    for words in named:
        assert {word for word in words if "=" not in word} <= targets, words


@every_page
def test_python_compiles_and_imports_what_there_is(page):
    for block in blocks(page, "python"):
        tree = compile(
            block, name_of(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        imported = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "fidelora"
        ]
        assert {name.name for node in imported for name in node.names} <= {*fidelora.__all__}


@every_page
def test_json_is_json(page):
    for block in blocks(page, "json"):
        json.loads(block)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_app(
        context_with_store(MemoryStore(), read_settings(data_dir=folder), {}, "")
    ).openapi()


def segments(path: str) -> list[str]:
    """The parts of a path, with `*` where anything may stand."""
    return [
        "*" if re.fullmatch(r"\{\w*\}|\$\w+", part) else part for part in path.strip("/").split("/")
    ]


@every_page
def test_calls_over_http_are_those_of_the_api(page, api):
    routes = [segments(path) for path in [*api["paths"], "/openapi.json", "/docs"]]
    text = page.read_text()
    called = re.findall(r"(?:localhost|127\.0\.0\.1):8000(/[\w/$.{}-]+)", text)
    called += re.findall(
        r"`(?:GET|POST|PUT|DELETE) (/(?:v1|sdapi|health|ready|metrics)[\w/$.{}-]*)", text
    )
    for path in called:
        parts = segments(
            path
        )  # all of a route, or its beginning, where an address to start from is meant
        fitting = (route for route in routes if len(parts) <= len(route))
        assert any(
            all(
                here == there or "*" in (here, there)
                for here, there in zip(parts, route, strict=False)
            )
            for route in fitting
        ), f"{path} is no route of the server"


@every_page
def test_settings_are_those_there_are(page):
    there_are = {
        field.validation_alias for field in Settings.model_fields.values()
    } | OF_TESTS_AND_OTHERS
    assert set(re.findall(r"\bFIDELORA_[A-Z_]*[A-Z]\b", page.read_text())) <= there_are


@every_page
def test_links_lead_somewhere_on_a_code_host_too(page):
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", without_blocks(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert not path.endswith("/"), f"{target}: name the page, which the site needs"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", without_blocks(file), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }, target


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_lists_are_lists_on_the_site_too(page):
    """The site's Markdown wants an empty line before a list, and four spaces before what is inside of one."""
    before = first_of_block = ""
    for line in re.sub(BLOCK, lambda match: f"{match['indent']}```", page.read_text()).splitlines():
        if not before:
            first_of_block = line
        if re.match(r"([*+-]|\d+\.) ", line):
            assert re.match(r"([*+-]|\d+\.) ", first_of_block), f"no empty line before: {line}"
        indent = len(line) - len(line.lstrip())
        if indent and (not before or re.match(r" +(```|[*+-] |\d+\. )", line)):
            assert indent % 4 == 0, f"{indent} spaces before: {line}"
        before = line


def test_troubleshooting_has_every_error_and_every_cause():
    shown = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "troubleshooting.md").read_text()))
    wanted = {*codes(), "TIMEOUT", "WORKER_LOST", "INTERNAL", *CAUSES, *get_args(ProblemCode)}
    assert not wanted - shown, f"not on the page: {wanted - shown}"
    # `WrongUseError` is what others have in common; nothing is raised as just that but by the client, which says what is wrong.
    missing = {
        kind.__name__ for kind in all_errors() if not {kind.__name__, error_code(kind())} & shown
    } - {"WrongUseError"}
    assert not missing, f"not on the page: {missing}"


class Loads(HTMLParser):
    """What a page has the browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        url = given.get("src") or (given.get("href") if tag == "link" else None)
        if url:
            self.found.append(url)


def test_the_site_is_built_strictly_and_fetches_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(DOCS), "each page, and the one for those that are not there"
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        assert loads.found
        assert not [url for url in loads.found if "//" in url and not url.startswith("data:")], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\"?(https?:)?//", sheet.read_text()), sheet
