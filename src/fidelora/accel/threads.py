"""Processor cores and threads of this process. Does not import torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that set the number of torch's threads explicitly."""
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that set what OpenMP's threads do while they wait."""

_SPIN_COUNT = "30000"
"""Number of spins; a tenth of GNU OpenMP's default. The figures are in docs/performance.md."""


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Limit how long OpenMP's waiting threads spin before they sleep.

    If other processes also use the cores, spinning threads take time from the thread that they
    wait for, and images take many times as long (docs/performance.md). Call this function before
    torch is loaded; child processes inherit the limit. A setting of the user is kept.
    """
    if not any(name in environment for name in _WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = _SPIN_COUNT


def limit_threads() -> None:
    """Reduce torch's threads to the number of cores that this process may use.

    torch itself takes the affinity of the process into account, but not the quota of a container:
    on a machine with 64 cores, `docker run --cpus 2` would have 64 threads that wait for each other
    and are stopped for most of the time. A number that the user has set is kept. Without a quota,
    the number does not change, because it affects the rounding errors of sums.
    """
    if any(name in os.environ for name in _THREAD_VARIABLES):
        return
    import torch

    if (cores := quota()) is not None and cores < torch.get_num_threads():
        torch.set_num_threads(cores)


def quota(root: Path = Path("/")) -> int | None:
    """Return the number of cores that the quota of this process allows, rounded up.

    The quota is the smallest one of the process's control group and the groups that contain it, in
    version 1 and 2: https://docs.kernel.org/admin-guide/cgroup-v2.html,
    https://docs.kernel.org/scheduler/sched-bwc.html.

    Args:
        root: folder that has `proc` and the mounted control groups.

    Returns:
        the number, at least 1; None without a quota, and on other systems than Linux.
    """
    quotas = [cores for folder in _groups(root) if (cores := _quota_of(folder)) is not None]
    return max(1, math.ceil(min(quotas))) if quotas else None


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's control groups for processors, and of their parents."""
    try:
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    own: dict[str, str] = {}  # path of the process's group, by version
    for line in groups.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            own["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            own["cgroup"] = path
    for line in mounts.splitlines():
        # ID, parent, device, root, mount point, options, ... - type, source, super options
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), [*after.split(), "", "", ""][:3]
        if (
            len(fields) < 5
            or kind not in own
            or (kind == "cgroup" and "cpu" not in options.split(","))
        ):
            continue
        mounted, point = (PurePosixPath(_unescape(field)) for field in fields[3:5])
        group = PurePosixPath(own[kind])
        # In a container, the path may be that of the host; only the mounted group is visible.
        below = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
        for folder in (below, *below.parents):
            yield root / point.relative_to("/") / folder


def _quota_of(folder: Path) -> float | None:
    """Return the quota of one control group, in cores; None if it has none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            cores = int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            continue
        if cores > 0:  # in version 1, -1 means no quota
            return cores
    return None


def _unescape(field: str) -> str:
    r"""Replace octal escapes, such as `\040` for a space; see proc_pid_mountinfo(5)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
