"""The shell scripts, checked by shellcheck."""

from tests.deploy.deploy_support import check, program
from tools.lock import ROOT


def test_shellcheck_has_no_complaint():
    script = ROOT / ".ci" / "run"
    if script.exists():  # not part of the source distribution
        check(program("shellcheck"), str(script))
