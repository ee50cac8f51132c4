"""The Dockerfile and its build context, checked by hadolint."""

import re

import pytest
from tests.deploy.deploy_support import USER_ID, check, program
from tools.lock import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def test_hadolint_has_no_complaint():
    check(program("hadolint"), "--no-color", str(DOCKERFILE))


def test_copied_files_exist_and_are_in_the_build_context():
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, flags=re.M)
    sources = [source for copy in copies for source in copy.split()]
    assert len(sources) >= 7
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in allowed), source


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_target_runs_as_a_user_without_rights_and_has_a_probe(target):
    assert re.search(rf"^FROM runtime AS {target}$", TEXT, flags=re.M)
    runtime = TEXT.split("AS runtime", 1)[1]
    assert re.findall(r"^USER (\S+)$", runtime, flags=re.M) == [f"{USER_ID}:{USER_ID}"]
    assert "HEALTHCHECK" in runtime
    assert 'CMD ["fidelora", "serve"]' in runtime


def test_every_installation_in_the_image_checks_hashes():
    joined = TEXT.replace("\\\n", " ")
    lines = re.findall(r"^RUN .*pip install.*$", joined, flags=re.M)
    assert len(lines) >= 2
    for line in lines:
        assert "--require-hashes" in line or ("--no-index" in line and "--no-deps" in line), line


def test_both_images_can_be_built_without_mp4():
    stages = [stage.split("\nFROM ", 1)[0] for stage in TEXT.split("-environment\n")[1:3]]
    for stage in stages:
        assert 'if [ "${MP4}" != true ]; then /opt/fidelora/bin/pip uninstall --yes av' in stage
    for target in ("cpu", "cuda"):
        requirements = (ROOT / "deploy" / "requirements" / f"{target}.txt").read_text()
        assert re.search(r"^av==", requirements, flags=re.M)
