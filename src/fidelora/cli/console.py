"""Shared parts of the commands: options, error output, progress bar and engine creation."""

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
    """Values of `--fidelity`."""

    EXACT = "exact"
    FAST = "fast"


class SpacingOption(StrEnum):
    """Values of `--spacing`."""

    DEFAULT = "default"
    TRAILING = "trailing"
    SGM_UNIFORM = "sgm_uniform"


P = ParamSpec("P")

COMPARISON_FAILED = 2  # exit code of commands that compare images, if no comparison was possible
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


def _set_debug(requested: bool) -> None:
    global _debug
    _debug = _debug or requested


Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")
]
Fidelity = Annotated[
    FidelityOption,
    typer.Option(
        help="exact: bit-identical to training; fast: faster, with small differences "
        "(docs/performance.md)."
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")]


def run(app: Callable[[], object]) -> NoReturn:
    """Run `app` and exit; print errors to stderr as one sentence.

    The exit code is 0 for success, 2 for wrong use and 1 for any other error.
    """
    try:
        app()
    except FideloraError as error:
        if _debug:
            raise
        fail(str(error), 2 if isinstance(error, WrongUseError) else 1)
    except BrokenPipeError:
        # The reader of stdout has closed the pipe, which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if _debug:
            raise
        fail(f"The operating system reported an error: {error}.", 1)
    except Exception as error:
        if _debug:
            raise
        fail(
            f"Unexpected {type(error).__name__}: {error}. This is a bug in Fidelora; "
            "run the command again with --debug and report it.",
            1,
        )
    sys.exit(0)


def make_engine(device: str, offload: str = "none") -> Engine:
    """Make this process keep freed memory for reuse, and return a new engine.

    Raises:
        DeviceError: the device or the offload mode is not available.
    """
    from fidelora.accel.allocator import importing_for_good, keep_freed_memory

    keep_freed_memory()
    with importing_for_good():
        from fidelora.engine.engine import Engine
    return Engine(device=device, offload=offload)  # type: ignore[arg-type]  # checked by the engine


def fail(message: str, code: int) -> NoReturn:
    """Print an error to stderr and exit."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    typer.echo(f"warning: {message}", err=True)


def reserve_exit_code_1(command: Callable[P, None]) -> Callable[P, None]:
    """Exit with 2 instead of 1 on errors, in commands where 1 means that an image differs."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FideloraError as error:
            if kwargs.get("debug") or isinstance(error, WrongUseError):
                raise
            fail(str(error), COMPARISON_FAILED)

    return run


ShowProgress = Callable[[str, int, int], None]
"""Callback that shows a title, the number of finished parts of the work and the number of all."""


@contextmanager
def progress_display() -> Iterator[ShowProgress | None]:
    """Show a progress bar with the remaining time, if stderr is a terminal.

    Yields:
        The callback for each part of the work; None if stderr is not a terminal. A call with a new
        title restarts the bar.
    """
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
    # On a terminal, lines on stdout go through the bar, which would otherwise overwrite them.
    # A stdout that is not a terminal is left as it is.
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None)
        last = ""

        def show(title: str, done: int, total: int) -> None:
            nonlocal last
            if title != last:
                bar.reset(task, description=title, total=total)
                last = title
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def progress_bar(title: str) -> Iterator[OnStep | None]:
    """Show a progress bar for the steps of images, if stderr is a terminal.

    Yields:
        The callback for each step; None if stderr is not a terminal.
    """
    with progress_display() as show:
        if show is None:
            yield None
            return

        def on_step(progress: Progress) -> None:
            show(title, progress.step, progress.steps)

        show(title, 0, 1)
        yield on_step
