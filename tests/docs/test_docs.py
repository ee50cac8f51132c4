"""Everything that the documents mention exists: commands, options, code, routes, links."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

from tools.pages.command_line import commands, options
from tools.pages.error_list import all_errors

import fidelora
from fidelora.engine.fit_problems import ProblemCode
from fidelora.environment import names_of
from fidelora.jobs.memory import MemoryStore
from fidelora.resident import KEEP_VARIABLE
from fidelora.server.app import context_with_store, make_app
from fidelora.server.problems import codes
from fidelora.settings import Settings, read_settings
from fidelora.training.doctor import CAUSES
from fidelora.workers.attempt import error_code

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    *DOCS,
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
]
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL
)

ABSTRACT_ERRORS = {"UsageError"}  # always raised with a message of its own


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of a page in these languages."""
    return [
        match["text"]
        for match in BLOCK.finditer(page.read_text())
        if match["language"] in languages
    ]


def without_blocks(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def shell_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in shell blocks, and in text between backticks."""
    for block in blocks(page, "console", "bash", "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        typed = [line[2:] for line in lines if line.startswith("$ ")]
        for line in typed or lines:
            for part in re.split(r"[|>]|&&", line):
                yield shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
    for code in re.findall(r"`(fidelora [^`]+)`", without_blocks(page)):
        yield code.replace("'", "").split()


def violations(check: Callable[[Path], Iterator[str]], pages: Sequence[Path] = PAGES) -> str:
    """Return everything that the check yields for these pages, one per line."""
    return "\n".join(
        f"{page.relative_to(ROOT)}: {violation}" for page in pages for violation in check(page)
    )


def test_the_documents_are_found():
    assert len(DOCS) > 10
    assert all(page.is_file() for page in PAGES)


def test_commands_and_options_exist():
    existing = dict(commands())

    def check(page: Path) -> Iterator[str]:
        for words in shell_commands(page):
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if len(words) < 2 or words[0] != "fidelora" or words[1].startswith(("-", "...")):
                continue
            name = " ".join(words[1:3]) if " ".join(words[1:3]) in existing else words[1]
            if any(other.startswith(f"{name} ") for other in existing):
                continue  # a group of commands, named alone
            if name not in existing:
                yield f"{words}: fidelora {name} does not exist"
                continue
            used = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
            if unknown := used - set(options(existing[name])):
                yield f"{words}: fidelora {name} does not have {unknown}"

    assert not (found := violations(check)), found


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    def check(page: Path) -> Iterator[str]:
        used = [words[1:] for words in shell_commands(page) if words[:1] == ["make"]]
        used += [code.split() for code in re.findall(r"`make ([^`]+)`", without_blocks(page))]
        for words in used:
            if unknown := {word for word in words if "=" not in word} - targets:
                yield f"make {' '.join(words)}: the Makefile does not have {unknown}"

    assert not (found := violations(check)), found


def test_python_compiles_and_imports_public_names():
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT

    def check(page: Path) -> Iterator[str]:
        for block in blocks(page, "python"):
            try:
                tree = compile(block, str(page), "exec", flags)
            except SyntaxError as error:
                yield f"{error} in:\n{block}"
                continue
            imported = {
                name.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module == "fidelora"
                for name in node.names
            }
            if unknown := imported - {*fidelora.__all__}:
                yield f"fidelora does not export {unknown}"

    assert not (found := violations(check)), found


def test_json_is_valid():
    def check(page: Path) -> Iterator[str]:
        for block in blocks(page, "json"):
            try:
                json.loads(block)
            except ValueError as error:
                yield f"{error} in:\n{block}"

    assert not (found := violations(check)), found


def segments(path: str) -> list[str]:
    """Return the parts of a URL path, with `*` for parameters and shell variables."""
    return [
        "*" if re.fullmatch(r"\{\w*\}|\$\w+", part) else part for part in path.strip("/").split("/")
    ]


def matches(parts: list[str], route: list[str]) -> bool:
    """True if the parts are all of a route or its beginning, as in a base address."""
    return len(parts) <= len(route) and all(
        here == there or "*" in (here, there) for here, there in zip(parts, route, strict=False)
    )


def test_http_routes_exist(tmp_path):
    context = context_with_store(MemoryStore(), read_settings(data_dir=tmp_path), {}, "")
    paths = [*make_app(context).openapi()["paths"], "/openapi.json", "/docs"]
    routes = [segments(path) for path in paths]

    def check(page: Path) -> Iterator[str]:
        text = page.read_text()
        used = re.findall(r"(?:localhost|127\.0\.0\.1):8000(/[\w/$.{}-]+)", text)
        used += re.findall(
            r"`(?:GET|POST|PUT|DELETE) (/(?:v1|sdapi|health|ready|metrics)[\w/$.{}-]*)", text
        )
        for path in used:
            if not any(matches(segments(path), route) for route in routes):
                yield f"the server does not have the route {path}"

    assert not (found := violations(check)), found


def test_settings_exist():
    names = {name for field in Settings.model_fields.values() for name in names_of(field)}
    names.add(KEEP_VARIABLE)

    def check(page: Path) -> Iterator[str]:
        used = set(re.findall(r"\bFIDELORA_[A-Z_]*[A-Z]\b", page.read_text()))
        if unknown := used - names:
            yield f"settings that do not exist: {unknown}"

    assert not (found := violations(check)), found


def test_no_page_installs_from_an_index():
    """Fidelora is not on an index; another package could get its name there."""

    def check(page: Path) -> Iterator[str]:
        for words in shell_commands(page):
            named = [word for word in words if re.fullmatch(r"fidelora(\[.*\])?", word)]
            if "install" in words and named and "--no-index" not in words:
                yield f"{' '.join(words)}: install from a checkout of the repository"
        if re.search(r"`pip install [^`]*fidelora(\[|`)", without_blocks(page)):
            yield "pip install in the text: install from a checkout of the repository"

    assert not (found := violations(check)), found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as a code host and the site make them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_work_on_the_site_and_on_a_code_host():
    def check(page: Path) -> Iterator[str]:
        for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", without_blocks(page)):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                yield f"{target} does not exist"
            elif path.endswith("/"):
                yield f"{target}: name the page in the folder; the site needs it"
            elif anchor and anchor not in anchors(file):
                yield f"{target}: the page does not have this heading"

    assert not (found := violations(check)), found


def test_lists_have_the_empty_lines_and_indents_of_the_site():
    """The site's Markdown needs an empty line before a list, and indents in steps of four."""
    item = re.compile(r"([*+-]|\d+\.) ")

    def check(page: Path) -> Iterator[str]:
        before = first_of_block = ""
        text = re.sub(BLOCK, lambda match: f"{match['indent']}```", page.read_text())
        for line in text.splitlines():
            if not before:
                first_of_block = line
            if item.match(line) and not item.match(first_of_block):
                yield f"no empty line before: {line}"
            indent = len(line) - len(line.lstrip())
            if indent % 4 and (not before or re.match(r" +(```|[*+-] |\d+\. )", line)):
                yield f"{indent} spaces before: {line}"
            before = line

    assert not (found := violations(check, DOCS)), found


def test_troubleshooting_lists_every_error_and_every_cause():
    listed = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "troubleshooting.md").read_text()))
    expected = {*codes(), "TIMEOUT", "WORKER_LOST", "INTERNAL", *CAUSES, *get_args(ProblemCode)}
    assert not expected - listed
    missing = {
        kind.__name__ for kind in all_errors() if not {kind.__name__, error_code(kind())} & listed
    }
    assert not missing - ABSTRACT_ERRORS


class FetchedUrls(HTMLParser):
    """Collects the URLs that a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        url = given.get("src") or (given.get("href") if tag == "link" else None)
        if url:
            self.found.append(url)


def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(DOCS), "a page of the site is missing"
    for page in pages:
        fetched = FetchedUrls()
        fetched.feed(page.read_text())
        assert fetched.found
        assert not [url for url in fetched.found if "//" in url and not url.startswith("data:")], (
            page
        )
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\"?(https?:)?//", sheet.read_text()), sheet
