"""Numbers of cores and threads: quotas of control groups, and environment variables.

The files of the control groups are in a folder that stands for `/`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fidelora.accel import threads
from fidelora.accel.threads import limit_spinning, limit_threads, quota

V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "33 25 0:29 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V1_OTHER = "34 25 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def root(folder: Path, mounts: str, groups: str, **files: str) -> Path:
    """Write a root folder; keywords are paths of files, with `__` for `/` and `9` for `.`."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts)
    (folder / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = folder / "sys/fs/cgroup" / name.replace("__", "/").replace("9", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("5000 100000\n", 1),
        ("6400000 100000\n", 64),
        ("", None),
        ("200000 0\n", None),
    ],
)
def test_a_quota_of_version_2_is_rounded_up_to_whole_cores(tmp_path, content, cores):
    assert quota(root(tmp_path, V2, "0::/\n", cpu9max=content)) == cores


@pytest.mark.parametrize(
    ("allowed", "period", "cores"), [("-1", "100000", None), ("250000", "100000", 3)]
)
def test_a_quota_of_version_1_is_rounded_up_to_whole_cores(tmp_path, allowed, period, cores):
    files = {"cpu9cfs_quota_us": allowed, "cpu9cfs_period_us": period}
    written = {f"cpu,cpuacct__docker__a__{name}": text for name, text in files.items()}
    groups = "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/\n"
    assert quota(root(tmp_path, V1.format("/") + V1_OTHER, groups, **written)) == cores


def test_in_a_container_the_group_may_be_mounted_at_the_top(tmp_path):
    files = {"cpu9cfs_quota_us": "300000", "cpu9cfs_period_us": "100000"}
    written = {f"cpu,cpuacct__{name}": text for name, text in files.items()}
    groups = "4:cpu,cpuacct:/docker/a\n"
    assert quota(root(tmp_path, V1.format("/docker/a"), groups, **written)) == 3


def test_the_smallest_quota_of_the_group_and_its_parents_counts(tmp_path):
    folder = root(
        tmp_path,
        V2,
        "0::/pod/app\n",
        cpu9max="max 100000\n",
        pod__cpu9max="300000 100000\n",
        pod__app__cpu9max="800000 100000\n",
        other__cpu9max="100000 100000\n",
    )
    assert quota(folder) == 3


def test_a_group_outside_of_the_mounted_one_is_not_read(tmp_path):
    mounts = V2.replace("0:26 /", "0:26 /pod\\040one")
    files = {"cpu9max": "400000 100000\n", "inner__cpu9max": "200000 100000\n"}
    assert quota(root(tmp_path / "a", mounts, "0::/elsewhere\n", **files)) == 4
    assert quota(root(tmp_path / "b", mounts, "0::/pod one/inner\n", **files)) == 2


def test_systems_without_control_groups_have_no_quota(tmp_path):
    assert quota(tmp_path) is None
    assert quota(root(tmp_path / "a", "", "")) is None
    assert quota(root(tmp_path / "b", "broken\n - \n", "broken\n")) is None


@pytest.fixture
def _restored_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize(("cores", "expected"), [(None, 2), (1, 1), (2, 2), (8, 2)])
def test_a_quota_reduces_the_threads(monkeypatch, cores, expected):
    monkeypatch.setattr(threads, "quota", lambda: cores)
    limit_threads()
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_number_of_threads_is_kept(monkeypatch, name):
    monkeypatch.setattr(threads, "quota", lambda: 1)
    monkeypatch.setenv(name, "2")
    limit_threads()
    assert torch.get_num_threads() == 2


def test_spinning_is_limited_unless_the_user_decided():
    environment = {"PATH": "/bin"}
    limit_spinning(environment)
    assert environment == {"PATH": "/bin", "GOMP_SPINCOUNT": "30000"}
    for name, value in {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "100"}.items():
        chosen = {name: value}
        limit_spinning(chosen)
        assert chosen == {name: value}
