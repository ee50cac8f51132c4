"""The command line, called in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from fidelora.cli import console, main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fidelora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: `fidelora("models") == (exit code, stdout, stderr)`."""

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
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
