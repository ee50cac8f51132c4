"""docs/reference/errors.md: every error with its exit code and its answer over HTTP."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fastapi import FastAPI
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from fidelora import errors
from fidelora.errors import FideloraError, WrongUseError
from fidelora.server import problems

_ABOUT = """
Every error that Fidelora raises on purpose is a class in `fidelora.errors`, under `FideloraError`. What is said here is its default
message; most are raised with a sentence that names the file, the field or the value. What to do about each is in
[Troubleshooting](../troubleshooting.md).

* *Exit code*: of the command line. 2 means that the request itself has to change (the class is a `WrongUseError`), 1 that something
  else is not what it has to be. [Some commands](../cli.md) give 1 a meaning of its own.
* *HTTP*: the answer of the server where it refuses a call with this error. Errors without one end no call; if one ever does, the
  answer is 500 `INTERNAL`, and the log has the rest.

A request whose images could not be made has failed, and its `error_code` is the error's name: `ADAPTER_MISMATCH` is
`AdapterMismatchError`. Two codes are of no class: `TIMEOUT` (longer than `INFERENCE_TIMEOUT`) and `WORKER_LOST` (all attempts
ended with the worker's process).
""".strip()


def errors_page(made: str) -> str:
    """Every error in the order of the tree."""
    lines = [
        "# Errors",
        "",
        made,
        "",
        _ABOUT,
        "",
        "| error | says | exit code | HTTP | under |",
        "|---|---|---|---|---|",
    ]
    server = _raising_server()
    for kind in all_errors():
        bases = ", ".join(
            f"`{base.__name__}`" for base in kind.__bases__ if issubclass(base, FideloraError)
        )
        exit_code = 2 if issubclass(kind, WrongUseError) else 1
        lines.append(
            f"| `{kind.__name__}` | {kind()} | {exit_code} | {_answer(kind, server)} | {bases} |"
        )
    return "\n".join(lines) + "\n"


def all_errors() -> Iterator[type[FideloraError]]:
    """Every class below the root, in the order of the file."""
    for value in vars(errors).values():
        if (
            inspect.isclass(value)
            and issubclass(value, FideloraError)
            and value is not FideloraError
        ):
            yield value


def _answer(kind: type[FideloraError], server: TestClient) -> str:
    with capture_logs():  # of an error that no call ends with, the server writes a line
        answer = server.get(f"/{kind.__name__}")
    if answer.status_code == 500:
        return ""
    detail = answer.json()["detail"]
    return (
        f"{answer.status_code} `{detail['error']['code']}`"
        if isinstance(detail, dict)
        else str(answer.status_code)
    )


def _raising_server() -> TestClient:
    """A server that answers each path with the error of that name, as ours would."""
    app = FastAPI()
    problems.install(app)

    @app.get("/{name}")
    def fail(name: str) -> None:
        raise getattr(errors, name)

    return TestClient(app)
