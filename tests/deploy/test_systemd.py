"""The systemd units, checked by systemd-analyze."""

import configparser
import re
import shutil
import subprocess

import pytest
from tests.deploy.deploy_support import DEPLOY, assert_settings, check, program, stop_grace_s

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
NAMES = [path.name for path in UNITS]
MOST_EXPOSED = 25  # limit of `systemd-analyze security`, in tenths of its level; 0 is best


@pytest.mark.parametrize("name", NAMES)
def test_systemd_accepts_the_unit(name, tmp_path):
    analyze = program("systemd-analyze", "apt-get install systemd")
    true = shutil.which("true")
    assert true is not None
    text = (DEPLOY / "systemd" / name).read_text()
    (tmp_path / name).write_text(text.replace("/opt/fidelora/bin/fidelora", true))
    # Unknown settings are warnings with exit code 0. Warnings about other units do not matter.
    result = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True
    )
    warnings = [line for line in result.stderr.splitlines() if str(tmp_path) in line]
    assert (result.returncode, warnings) == (0, []), result.stderr
    check(
        *(analyze, "security", "--offline=true", f"--threshold={MOST_EXPOSED}"),
        str(tmp_path / name),
    )


@pytest.mark.parametrize("name", NAMES)
def test_unit_uses_existing_settings_and_may_finish(name):
    text = (DEPLOY / "systemd" / name).read_text()
    variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, flags=re.M))
    assert_settings(variables)
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read_string(text)
    service = parser["Service"]
    assert float(service["TimeoutStopSec"]) >= 60 + stop_grace_s(variables)
    assert service["KillMode"] == "mixed"
    assert service["User"] == "fidelora"


def test_there_are_units_for_servers_and_workers():
    assert NAMES == ["fidelora-worker@.service", "fidelora.service"]
    users = (DEPLOY / "systemd" / "fidelora.sysusers.conf").read_text()
    assert re.search(r"^u fidelora - ", users, flags=re.M)
