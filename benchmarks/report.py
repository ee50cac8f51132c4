"""What the parts of the benchmark find, as one Markdown table and as JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VERSIONS = ("fidelora", "torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Settings:
    """How much is measured, and with what.

    Attributes:
        folder: where models are kept between runs.
        quick: few rounds of small images, to see that everything works; the figures mean little.
        sdcpp: an interpreter that may have stable-diffusion.cpp.
    """

    folder: Path
    quick: bool
    sdcpp: str


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the peer's figure, ours, how they compare, and how often it was measured."""

    what: str
    peer: str
    ours: str
    ratio: str
    rounds: int


@dataclass
class Findings:
    """What one part found.

    Attributes:
        notes: sentences about what is measured and what is composed.
        raw: all figures behind the rows, for the JSON.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def faster(
        self, what: str, peer: Sequence[float], ours: Sequence[float], unit: str = "s"
    ) -> None:
        """A row of seconds: how many times less ours are, by medians, with the span over rounds."""
        ratio = f"{statistics.median(peer) / statistics.median(ours):.2f} x"
        if len(peer) == len(ours) > 1:
            each = [a / b for a, b in zip(peer, ours, strict=True)]
            ratio += f" ({min(each):.2f} - {max(each):.2f})"
        scale = 1000 if unit == "ms" else 1
        theirs, own = (
            f"{shown(statistics.median(values) * scale)} {unit}" for values in (peer, ours)
        )
        self.rows.append(Row(what, theirs, own, ratio, min(len(peer), len(ours))))


def shown(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def environment() -> dict[str, Any]:
    """What else has a part in the figures."""
    import torch

    from fidelora.accel.device import instruction_set, processor_name

    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    bf16 = torch.cpu._is_avx512_bf16_supported()
    processor = {
        "cpu": processor_name(),
        "capability": instruction_set(),
        "bfloat16 products": bf16,
    }
    return found | processor | {"threads": torch.get_num_threads()}


def markdown(parts: Mapping[str, Findings], environment: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = ["| what | peer | Fidelora | compared | rounds |", "|---|---|---|---|---|"]
    for findings in parts.values():
        lines += [
            f"| {row.what} | {row.peer} | {row.ours} | {row.ratio} | {row.rounds} |"
            for row in findings.rows
        ]
    notes = [f"- {note}" for findings in parts.values() for note in findings.notes]
    machine = "; ".join(f"{name} {value}" for name, value in environment.items())
    return "\n".join([*lines, "", *notes, "", machine, ""])


def write(
    parts: Mapping[str, Findings], environment: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Write the report as Markdown and as JSON; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "environment": environment,
        "parts": {
            name: {"rows": [vars(row) for row in one.rows], "notes": one.notes, "raw": one.raw}
            for name, one in parts.items()
        },
    }
    written = [folder / "bench.md", folder / "bench.json"]
    written[0].write_text(markdown(parts, environment))
    written[1].write_text(json.dumps(plain, indent=2) + "\n")
    return written
