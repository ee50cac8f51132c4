"""Processes under comparison, which load a model once and answer requests in turns.

A request is one line of JSON on the standard input of a process, `{"do": "image", "size": 256}`,
and a response is one line on its standard output. A waiting process uses no CPU: OpenMP threads
spin for some milliseconds and then wait in the kernel. This module needs only the standard library,
because the processes may run in other environments.
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
    """Return the environment without tuning variables, so that every process has the defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_TUNING)}


class MeasuredProcess:
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
        """Send a request and return the response.

        Raises:
            RuntimeError: the process failed; the message ends with its traceback.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has died; reported below
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"{self._name} failed at {do}:\n{self._errors.read()[-4000:]}")
        return json.loads(answer)

    def __enter__(self) -> MeasuredProcess:
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
    """Serve requests until standard input is closed. Output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(handlers[request.pop("do")](**request)) + "\n")
        answers.flush()


def memory() -> dict[str, int]:
    """Return the peak resident bytes and the current private bytes, without mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "own": "RssAnon"}
    return {what: int(fields[name].split()[0]) * 1024 for what, name in names.items()}


def disk_reads() -> int:
    """Return the number of major page faults of this process (pages read from disk)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache.

    Some systems evict pages that were not used for a minute.
    """
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def rounds(budget_s: float, *, least: int, most: int) -> Iterator[int]:
    """Yield the numbers of at least `least` and at most `most` rounds.

    After `least` rounds, stop when another round, as long as the longest one, would exceed the
    budget.
    """
    start, longest = time.perf_counter(), 0.0
    for number in range(most):
        begin = time.perf_counter()
        if number >= least and begin - start + longest > budget_s:
            return
        yield number
        longest = max(longest, time.perf_counter() - begin)
