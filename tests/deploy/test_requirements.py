"""The locked requirements of the images agree with pyproject.toml and constraints.txt."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools.lock import EXTRAS, FOLDER, ROOT

LOCK_LINE = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})*)$")
IMAGE = {  # markers of the images: Python 3.11 on x86-64 Linux
    "python_version": "3.11",
    "python_full_version": "3.11.9",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> dict[str, str]:
    """Return the version of each package in a lock file; fails if a line has no hash."""
    versions: dict[str, str] = {}
    for line in (FOLDER / name).read_text().replace(" \\\n   ", "").splitlines():
        if line.startswith(("#", "--find-links ")):
            continue
        match = LOCK_LINE.match(line)
        assert match, f"{name}: {line}"
        assert match[3], f"{name}: {match[1]} has no hash"
        versions[canonicalize_name(match[1])] = match[2]
    return versions


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {str(canonicalize_name(name)): version for name, version in pairs}


def wanted(requirement: Requirement, extras: tuple[str, ...] = ("",)) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**IMAGE, "extra": one}) for one in extras)


def direct_requirements() -> list[Requirement]:
    optional = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *(one for e in EXTRAS for one in optional[e])]
    return [one for one in map(Requirement, texts) if one.name != "fidelora"]


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt"])
def test_lock_satisfies_the_ranges_of_the_project(name):
    versions = locked(name)
    for one in direct_requirements():
        version = versions.get(canonicalize_name(one.name), "missing")
        assert version != "missing", f"{one.name} is not in {name}; run `make lock`"
        assert one.specifier.contains(version), f"{one} but {name} has {version}; run `make lock`"


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt", "build.txt"])
def test_lock_has_the_versions_of_the_constraints(name):
    tested = pins()
    versions = {one: version.partition("+")[0] for one, version in locked(name).items()}
    changed = {
        one: (version, tested[one])
        for one, version in versions.items()
        if one in tested and version != tested[one]
    }
    assert not changed, f"{name} and constraints.txt differ: {changed}; run `make lock`"


def test_lock_contains_what_each_package_requires():
    # From the metadata of the installed packages, which have the same versions.
    versions = locked("cpu.txt")
    open_ones, seen = direct_requirements(), set()
    while open_ones:
        one = open_ones.pop()
        name, extras = canonicalize_name(one.name), tuple(sorted(one.extras)) or ("",)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert name in versions, f"{one} is required, but not locked; run `make lock`"
        if metadata.version(name).partition("+")[0] != versions[name].partition("+")[0]:
            continue  # checked where the versions of constraints.txt are installed
        parts = map(Requirement, metadata.requires(name) or [])
        open_ones += [part for part in parts if wanted(part, extras)]
    extra = versions.keys() - {name for name, _ in seen}
    assert not extra, f"{sorted(extra)} are locked, but nothing requires them; run `make lock`"


def test_the_cuda_lock_has_the_same_packages_and_cudas_libraries():
    cpu, cuda = locked("cpu.txt"), locked("cuda.txt")
    assert {one: cuda.get(one) for one in cpu if one != "torch"} == {
        one: version for one, version in cpu.items() if one != "torch"
    }
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert any(one.startswith("nvidia-cudnn") for one in cuda)


def test_the_build_lock_has_the_build_backend():
    for text in PROJECT["build-system"]["requires"]:
        one = Requirement(text)
        assert one.specifier.contains(locked("build.txt")[canonicalize_name(one.name)])


def test_the_locks_name_no_other_index():
    for path in sorted(Path(FOLDER).glob("*.txt")):
        text = path.read_text()
        for address in re.findall(r"\S+://\S+|/opt\S*", text):
            assert address.startswith("https://download.pytorch.org/"), f"{path.name}: {address}"
