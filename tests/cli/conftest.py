"""Fixtures of all commands. Each test runs in an empty working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from tests.cli.training_support import RUN, Change


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copy_run(tmp_path):
    """Return a function that copies a run folder and changes its configuration."""

    def make(change: Change = lambda process: None, source: Path = RUN) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "run"))
        document = yaml.safe_load((folder / "config.yaml").read_text())
        change(document["config"]["process"][0])
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        return folder

    return make
