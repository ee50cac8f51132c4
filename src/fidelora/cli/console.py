"""What all commands share: how errors reach people, and how they choose a device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec

import typer

from fidelora.errors import FideloraError, WrongUseError

if TYPE_CHECKING:
    from fidelora.engine.engine import Engine, OnStep, Progress

_debug = False


class FidelityOption(StrEnum):
    """What `--fidelity` takes."""

    EXACT = "exact"
    FAST = "fast"


P = ParamSpec("P")

CANNOT_TELL = 2
"""The exit code of commands that compare images, where they could not."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


def _set_debug(wanted: bool) -> None:
    global _debug
    _debug = _debug or wanted


Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the whole traceback of an error.")
]
Fidelity = Annotated[
    FidelityOption,
    typer.Option(
        help="exact: to the bit as in training; fast: nearly so, see docs/performance.md."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


def run(app: Callable[[], object]) -> NoReturn:
    """Run `app`; every error becomes one sentence on stderr and an exit code: 2 if the request is wrong, 1 if anything else is."""
    try:
        app()
    except FideloraError as error:
        if _debug:
            raise
        fail(str(error), 2 if isinstance(error, WrongUseError) else 1)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # who read our output has left; that is no error
    except OSError as error:
        if _debug:
            raise
        fail(f"The system says: {error}.", 1)
    except Exception as error:
        if _debug:
            raise
        fail(
            f"Unexpected {type(error).__name__}: {error}. This is a fault of Fidelora's: run it again with --debug and report it.",
            1,
        )
    sys.exit(0)


def make_engine(device: str, offload: str = "none") -> Engine:
    """The engine of a command, in a process that keeps freed memory for it.

    Raises:
        DeviceError: no such device here, or no such way of offloading.
    """
    from fidelora.accel.allocator import importing_for_good, keep_freed_memory

    keep_freed_memory()
    with importing_for_good():
        from fidelora.engine.engine import Engine
    return Engine(device=device, offload=offload)  # type: ignore[arg-type]  # the engine checks it


def fail(message: str, code: int) -> NoReturn:
    """Leave with one sentence on stderr."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def warn(message: str) -> None:
    """One sentence on stderr, and go on."""
    typer.echo(f"warning: {message}", err=True)


def failure_is_no_difference(command: Callable[P, None]) -> Callable[P, None]:
    """Leave with 2 where other commands leave with 1, which says here that an image differs."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FideloraError as error:
            if kwargs.get("debug") or isinstance(error, WrongUseError):
                raise
            fail(str(error), CANNOT_TELL)

    return run


@contextmanager
def progress_bar(title: str) -> Iterator[OnStep | None]:
    """A bar with the time that is left; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def on_step(progress: Progress) -> None:
            bar.update(task, completed=progress.step, total=progress.steps)

        yield on_step
