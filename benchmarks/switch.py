"""Time and memory of switching adapters: Fidelora's merge, and three methods of diffusers.

Two adapters each change nearly every weight of the UNet. The merge is also compared with a plain
copy of the same weights, which is the lower bound for any method that writes them.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import full_size
from benchmarks.processes import MeasuredProcess, rounds
from benchmarks.report import Findings, Row, Settings

OPERATIONS = ("merge", "scale", "switch", "restore")


def measure(settings: Settings) -> Findings:
    base = full_size.base(settings.folder)
    large = [str(full_size.adapter(settings.folder, number)) for number in (0, 1)]
    tiny = [str(full_size.tiny_adapter(settings.folder, number)) for number in (0, 1)]
    many = {"count": 100, "budget_s": 10.0} if settings.quick else {"count": 1000, "budget_s": 60.0}
    found = Findings()
    ours: dict[str, dict[str, list[float]]] = {way: {} for way in ("exact", "fast")}
    theirs: dict[str, list[float]] = {name: [] for name in ("fuse", "load", "choose")}
    with (
        MeasuredProcess("benchmarks.peer", str(base)) as peer,
        MeasuredProcess("benchmarks.ours", "exact", str(base)) as exact,
        MeasuredProcess("benchmarks.ours", "fast", str(base)) as fast,
    ):
        ways = {"exact": exact, "fast": fast}
        for number in rounds(0.0 if settings.quick else 70.0, least=3, most=8):
            for name, figures in _peer_seconds(peer, large, fuse=number < 3).items():
                if number > 0:  # the first round also allocates memory
                    theirs[name].append(figures)
            for way, process in ways.items():
                process.ask("touch", path=large[0])
                for operation in ("copy", *OPERATIONS) if way == "exact" else OPERATIONS:
                    seconds = process.ask("operation", what=operation, paths=large)["seconds"]
                    if number > 0:
                        ours[way].setdefault(operation, []).append(seconds)
        grown = {
            way: process.ask("switches", large=large, tiny=tiny, **many)
            for way, process in ways.items()
        }
        weights = {way: process.ask("weights", path=large[0]) for way, process in ways.items()}
    found.raw |= {"peer": theirs, "ours": ours, "many switches": grown, "weights": weights}
    _rows(found, theirs, ours)
    memory = ", ".join(f"{way} {one['bytes'] / 1e6:.0f} MB" for way, one in weights.items())
    seconds = ", ".join(
        f"{way} {one['seconds'] / one['count']:.3f} s" for way, one in grown.items()
    )
    found.notes += [
        f"A switch changes {weights['exact']['weights']} weights with "
        f"{weights['exact']['elements'] / 1e6:.0f} million elements. "
        f"Weights in the process: {memory}.",
        "Growth: memory without mapped files after all switches, minus that after ten switches. "
        "Every hundredth switch merges an adapter that changes nearly all weights. The others "
        "alternate between two adapters for the keys and values of cross-attention "
        f"({seconds} each).",
        "With `set_adapters`, diffusers keeps all adapters in memory in addition to the weights, "
        "and each step takes longer (see the rows of steps).",
    ]
    return found


def _peer_seconds(peer: MeasuredProcess, paths: list[str], *, fuse: bool) -> dict[str, float]:
    """Return the seconds of diffusers' methods to switch; `fuse` adds the slowest one."""
    peer.ask("adapter", path=paths[0])
    seconds = {
        "load": peer.ask("adapter", path=paths[1])["seconds"],
        "choose": peer.ask("choose", paths=paths)["seconds"],
    }
    return seconds | ({"fuse": sum(peer.ask("fuse", path=paths[0]).values())} if fuse else {})


def _rows(
    found: Findings, theirs: dict[str, list[float]], ours: dict[str, dict[str, list[float]]]
) -> None:
    peers = {
        "fuse": "peer: load, `fuse_lora`, undo",
        "load": "peer: unload, load, not fused",
        "choose": "peer: `set_adapters` among loaded ones",
    }
    for way, times in ours.items():
        for name, peer in peers.items():
            found.add_times(f"switch of the adapter, {way}; {peer}", theirs[name], times["switch"])
    copy = statistics.median(ours["exact"]["copy"])
    for way, times in ours.items():
        for operation in OPERATIONS:
            seconds = statistics.median(times[operation])
            figures = (f"{copy:.3f} s", f"{seconds:.3f} s", f"{seconds / copy:.2f} times the copy")
            found.rows.append(
                Row(
                    f"{operation}, {way}, compared with a copy of the same weights in float32",
                    *figures,
                    len(times[operation]),
                )
            )
    many: dict[str, Any] = found.raw["many switches"]
    for way, one in many.items():
        figures = ("-", f"{one['growth'] / 1e6:+.0f} MB", "-")
        found.rows.append(Row(f"growth in {one['count']} switches, {way}", *figures, 1))
