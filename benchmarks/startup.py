"""Start-up time of each command: `python benchmarks/startup.py`.

Runs the commands as processes, one after the other in each round. Prints medians and their ratios
to a Python process that does nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
COMMANDS = {
    "python that does nothing": [sys.executable, "-c", "pass"],
    "import fidelora": [sys.executable, "-c", "import fidelora"],
    "a Recipe": [sys.executable, "-c", "import fidelora; fidelora.Recipe(prompt='a ball')"],
    "fidelora --help": [sys.executable, "-m", "fidelora", "--help"],
    "fidelora models": [sys.executable, "-m", "fidelora", "models"],
    "import fidelora, Engine (torch and all)": [
        sys.executable,
        "-c",
        "import fidelora; fidelora.Engine",
    ],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    nothing = statistics.median(seconds["python that does nothing"])
    for name, runs in seconds.items():
        median = statistics.median(runs)
        print(f"{name:42} {median:6.3f} s   {median / nothing:5.1f} x python")


if __name__ == "__main__":
    main()
