"""Findings of the benchmark's parts, as one Markdown table and as JSON."""

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
    """Settings of a run.

    Attributes:
        folder: keeps models between runs.
        quick: few rounds of small images, to check that everything works. The figures are not
            meaningful.
        sdcpp: an interpreter that may have stable-diffusion.cpp.
    """

    folder: Path
    quick: bool
    sdcpp: str


@dataclass(frozen=True)
class Row:
    """One row of the table: measured quantity, baseline, Fidelora, ratio, number of rounds."""

    what: str
    peer: str
    ours: str
    ratio: str
    rounds: int


@dataclass
class Findings:
    """Results of one part.

    Attributes:
        notes: sentences on what is measured and what is composed.
        raw: all figures behind the rows, for the JSON.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def add_times(
        self, what: str, peer: Sequence[float], ours: Sequence[float], unit: str = "s"
    ) -> None:
        """Add a row with two median times, their ratio, and the range of the ratio over rounds."""
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
    """Format with three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def environment() -> dict[str, Any]:
    """Return versions and hardware that affect the figures."""
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
    """Return the whole report as Markdown."""
    lines = ["| what | peer | Fidelora | ratio | rounds |", "|---|---|---|---|---|"]
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
    """Write the report as Markdown and as JSON; return the paths."""
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
