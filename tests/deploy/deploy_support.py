"""Files in deploy/, and the programs that check them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools.lock import ROOT

from fidelora.environment import names_of
from fidelora.settings import Settings

DEPLOY = ROOT / "deploy"
SETTINGS = {name for field in Settings.model_fields.values() for name in names_of(field)}
OTHER_VARIABLES = {  # of Fidelora's libraries
    "XDG_CACHE_HOME",
    "HF_HOME",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
}
USER_ID = 10001


def program(name: str, package: str = "the group `deploy` of pyproject.toml") -> str:
    """Return the path of a program; skips the test if it is not installed."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def check(*command: str, folder: Path = DEPLOY) -> str:
    """Run a command that must succeed, and return its output."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def assert_settings(variables: dict[str, object]) -> None:
    """Fail if a variable is not a setting."""
    unknown = variables.keys() - SETTINGS - OTHER_VARIABLES
    assert not unknown, f"{sorted(unknown)} are not settings"


def stop_grace_s(variables: dict[str, object]) -> float:
    """Return the time that running requests have to finish."""
    return float(
        str(variables.get("FIDELORA_STOP_GRACE", Settings.model_fields["stop_grace_s"].default))
    )
