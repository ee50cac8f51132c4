"""Shared parts of the commands: error output, progress bar and engine creation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, ParamSpec

import typer

from fidelora.accel.threads import limit_spinning
from fidelora.atomic import make_folder
from fidelora.errors import FideloraError, UsageError
from fidelora.field_sentences import field_sentence
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.engine.engine import Engine
    from fidelora.recipe import Recipe
    from fidelora.resident.client import OnSteps, Steps

_debug = False
_new_folders: list[Path] = []
"""Folders that this command created, parents first."""

P = ParamSpec("P")

COMPARISON_FAILED = 2  # exit code of commands that compare images, if no comparison was possible
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


def set_debug(requested: bool) -> None:
    """Let errors print their traceback from now on, if requested."""
    global _debug
    _debug = _debug or requested


def run(app: typer.Typer) -> NoReturn:
    """Run `app` and exit; print errors to stderr as one sentence.

    The exit code is the one that the command set, 0 by default. A usage error exits with 2, Ctrl-C
    with 130, and any other error with 1.
    """
    limit_spinning()
    try:
        _run(app)
    finally:
        while _new_folders:
            with suppress(OSError):  # not empty: the command wrote its files
                _new_folders.pop().rmdir()


def _run(app: typer.Typer) -> NoReturn:
    code: object = 0
    try:
        # In standalone mode, Typer would print usage errors in its own form.
        code = app(standalone_mode=False)
    except FideloraError as error:
        if _debug:
            raise
        fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except typer.TyperException as error:
        _fail_usage(error)
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
            "run the command again with --debug, and report it with the output of fidelora info.",
            1,
        )
    # Typer turns Ctrl-C into this code; commands that keep finished work handle it themselves.
    if code == INTERRUPTED:
        fail("Interrupted.", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def make_output_folder(folder: Path) -> None:
    """Create the folder of a command's output and its parents.

    Those that are still empty when the command ends, for example after Ctrl-C, are removed again.

    Raises:
        StorageError, OutputError: as in `make_folder`.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    make_folder(folder)
    _new_folders.extend(reversed(missing))


def _fail_usage(error: typer.TyperException) -> NoReturn:
    """Print an error of the command line's parser, and the command whose help explains more."""
    # Typer validates values with pydantic, and quotes pydantic's message.
    found = getattr(error.__cause__, "errors", None)
    if found is not None:
        error.message = field_sentence(found()[0])
    message = " ".join(error.format_message().split())  # Typer puts each choice on its own line
    if message:  # empty if no command was given: the help was printed instead
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "fidelora"
        end = "" if message.endswith((".", "?")) else "."
        typer.echo(f"error: {message}{end} See {command} --help.", err=True)
    sys.exit(error.exit_code)


def make_engine(device: str, offload: str = "none", first: Recipe | None = None) -> Engine:
    """Prepare this process for making images, and return a new engine.

    The process keeps freed memory for reuse, and uses at most one thread per available core.

    Args:
        first: recipe of the first image. Its model family is imported while memory for its base
            model is reserved, so that the first image is ready sooner.

    Raises:
        DeviceError: the device or the offload mode is not available.
    """
    from fidelora.accel.allocator import fast_imports, keep_freed_memory
    from fidelora.accel.lean_imports import lean_imports
    from fidelora.accel.reserve import reserved_memory
    from fidelora.accel.threads import limit_threads
    from fidelora.engine.first_image import is_cpu, weight_bytes
    from fidelora.families import get_family

    keep_freed_memory()
    size = weight_bytes(first, device) if first is not None else 0
    lean = lean_imports() if is_cpu(device) else nullcontext()
    with reserved_memory(size), fast_imports(), lean:
        from fidelora.engine.engine import Engine
        from fidelora.engine.model import import_family

        if first is not None:
            import_family(get_family(first.model))
    limit_threads()
    return Engine(device=device, offload=offload)  # type: ignore[arg-type]  # checked by the engine


def fail(message: str, code: int) -> NoReturn:
    """Print an error to stderr and exit."""
    typer.echo(f"error: {printable(message)}", err=True)
    sys.exit(code)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    typer.echo(f"warning: {printable(message)}", err=True)


def reserve_exit_code_1(command: Callable[P, None]) -> Callable[P, None]:
    """Exit with 2 on a `FideloraError`, in commands where 1 means that an image differs."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FideloraError as error:
            if kwargs.get("debug") or isinstance(error, UsageError):
                raise
            fail(str(error), COMPARISON_FAILED)

    return run


ShowProgress = Callable[[str, int, int], None]
"""Callback that shows a title, the number of finished items and the total number of items."""


PROGRESS_LINE = "progress: "
"""Start of the lines that `progress_display` prints for other programs, such as the web page."""


@contextmanager
def progress_display(*, as_lines: bool = False) -> Iterator[ShowProgress | None]:
    """Show a progress bar with the remaining time, if stderr is a terminal.

    Args:
        as_lines: print a line for each call instead, which begins with `PROGRESS_LINE`.

    Yields:
        The callback for each part of the work; None if nothing is shown. A call with a new title
        restarts the bar.
    """
    if as_lines:
        yield lambda title, done, total: typer.echo(
            f"{PROGRESS_LINE}{title} {done} of {total}", err=True
        )
        return
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
def progress_bar(title: str) -> Iterator[OnSteps | None]:
    """Show a progress bar for the steps of images, if stderr is a terminal.

    Yields:
        The callback for each step; None if stderr is not a terminal.
    """
    with progress_display() as show:
        if show is None:
            yield None
            return

        def on_step(progress: Steps) -> None:
            show(title, progress.step, progress.steps)

        show(title, 0, 1)
        yield on_step
