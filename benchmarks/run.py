"""`make bench`: compare Fidelora with diffusers and PEFT in one run; prints one Markdown table.

    python -m benchmarks.run [--only PART ...] [--quick] [--folder FOLDER] [--out FOLDER]
                             [--sdcpp PYTHON]

Every figure is a median, compared with a baseline from the same run. If possible, the two are
measured alternately. Needs peft and OpenVINO (`pip install --group bench`), two cores, 20 GB of
memory, about 25 minutes, and 9 GB of disk for the models in the first run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    cold,
    fidelity,
    full_size,
    images,
    openvino,
    operators,
    queue_mix,
    report,
    server,
    switch,
)
from benchmarks.processes import ROOT
from benchmarks.report import Findings, Settings


def main() -> None:
    found: dict[str, Findings] = {}
    parts: dict[str, Callable[[Settings], Findings]] = {
        "images": images.measure,
        "operators": operators.measure,
        "openvino": openvino.measure,
        "switch": switch.measure,
        "cold": cold.measure,
        "server": server.measure,
        "queue": lambda settings: queue_mix.measure(settings, found),
        "fidelity": fidelity.measure,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=parts, nargs="+", help="run only these parts")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds of small images, to check that everything works",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=full_size.default_folder(),
        help="folder that keeps models between runs",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench-results", help="folder of the report"
    )
    parser.add_argument(
        "--sdcpp",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter with stable-diffusion-cpp-python",
    )
    options = parser.parse_args()
    settings = Settings(options.folder, options.quick, options.sdcpp)
    full_size.base(settings.folder)
    minutes: dict[str, float] = {}
    for name in options.only or parts:
        start = time.perf_counter()
        found[name] = parts[name](settings)
        minutes[name] = (time.perf_counter() - start) / 60
        print(f"{name}: {minutes[name]:.1f} minutes", file=sys.stderr, flush=True)
    environment = report.environment() | {
        "minutes": {name: round(taken, 1) for name, taken in minutes.items()}
    }
    written = report.write(found, environment, options.out)
    print(report.markdown(found, environment))
    print("\n".join(map(str, written)), file=sys.stderr)


if __name__ == "__main__":
    main()
