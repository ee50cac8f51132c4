"""Processes that are measured against each other: each loads its model once and then answers requests, in turns with the others.

A request is one line of JSON on a party's standard input, `{"do": "image", "size": 256}`, and so is the answer. A party that
waits sleeps: OpenMP's threads spin for some milliseconds and then wait in the kernel. Needs nothing but Python, because parties may
live in environments of their own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TUNING = (
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "MALLOC_",
    "LD_PRELOAD",
    "ONEDNN_",
    "DNNL_",
    "TORCH",
    "ATEN_",
    "FIDELORA_",
)


def plain_environment() -> dict[str, str]:
    """The environment without what whoever runs the benchmark has tuned: every party has the defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_TUNING)}


class Party:
    """A process that runs `python -m {module}` with these arguments and answers requests."""

    def __init__(self, module: str, *arguments: str, python: str = sys.executable) -> None:
        self._name = " ".join((module, *arguments[:1]))
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=plain_environment(),
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the party answers; what it raises becomes an error here, with its traceback."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, which the lines below report
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"{self._name} failed at {do}:\n{self._errors.read()[-4000:]}")
        return json.loads(answer)

    def __enter__(self) -> Party:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def answer_requests(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """The other side: answer until nobody asks any more. Libraries may print; it goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(handlers[request.pop("do")](**request)) + "\n")
        answers.flush()


def memory() -> dict[str, int]:
    """Bytes of this process: the most that was ever resident, and what is its own now, without the pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "own": "RssAnon"}
    return {what: int(fields[name].split()[0]) * 1024 for what, name in names.items()}


def disk_reads() -> int:
    """How often this process had to wait for a page of a file that was not in the system's cache."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def warm(files: Iterable[Path]) -> None:
    """Bring files into the system's cache, which some systems empty of what nobody has used for a minute."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def rounds(budget_s: float, *, least: int, most: int) -> Iterator[int]:
    """Numbers of rounds: at least and at most so many, and none that would exceed the budget if it took as long as the longest."""
    start, longest = time.perf_counter(), 0.0
    for number in range(most):
        begin = time.perf_counter()
        if number >= least and begin - start + longest > budget_s:
            return
        yield number
        longest = max(longest, time.perf_counter() - begin)
