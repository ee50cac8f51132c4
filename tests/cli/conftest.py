"""Each test of the command line runs in an empty working directory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
