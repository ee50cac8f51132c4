"""Names of tests stay short enough for one line of a report."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
MAX_LENGTH = 70  # with a path, a line of pytest's summary is still readable


def test_test_names_have_at_most_70_characters():
    functions = [
        (file, node)
        for file in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]
    assert functions
    too_long = [
        f"{file.relative_to(TESTS)}:{node.lineno} {node.name} has {len(node.name)} characters"
        for file, node in functions
        if len(node.name) > MAX_LENGTH
    ]
    assert not too_long, "\n".join(too_long)
