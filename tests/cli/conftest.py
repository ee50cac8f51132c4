"""Fixtures that run the command line in the test process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from fidelora.cli import console, main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fidelora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command and returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_debug", False)
        monkeypatch.setattr(sys, "argv", ["fidelora", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
