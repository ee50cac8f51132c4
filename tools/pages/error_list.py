"""Generate docs/reference/errors.md: every error with its exit code and HTTP response."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fastapi import FastAPI
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from fidelora import errors
from fidelora.errors import FideloraError, UsageError
from fidelora.server import problems

_ABOUT = """
Every error that Fidelora raises on purpose is a class in `fidelora.errors`, derived from
`FideloraError`. The table has the default messages; most errors are raised with a message that
names the file, the field or the value. [Troubleshooting](../troubleshooting.md) describes what to
do about each error.

* *Exit code*: of the command line. 2 means that the input has to change (the class is a
  `UsageError`), 1 any other failure. The pages of [some commands](../cli.md) list codes of their
  own.
* *HTTP*: status and code of the response if the server rejects a call with this error. An error
  without them does not normally reach a client. If it does, the response is 500 `INTERNAL`, and the
  log has the details.

If the images of a request could not be made, the request has failed, and its `error_code` is
derived from the error's name: `ADAPTER_MISMATCH` is `AdapterMismatchError`. Two codes have no
class: `TIMEOUT` (an attempt took longer than `INFERENCE_TIMEOUT`) and `WORKER_LOST` (the worker
process died in every attempt).
""".strip()


def errors_page(note: str) -> str:
    """Return the page, with the errors in the order of the module."""
    lines = [
        "# Errors",
        "",
        note,
        "",
        _ABOUT,
        "",
        "| error | default message | exit code | HTTP | base class |",
        "|---|---|---|---|---|",
    ]
    server = _raising_server()
    for kind in all_errors():
        bases = ", ".join(
            f"`{base.__name__}`" for base in kind.__bases__ if issubclass(base, FideloraError)
        )
        exit_code = 2 if issubclass(kind, UsageError) else 1
        lines.append(
            f"| `{kind.__name__}` | {kind()} | {exit_code} | {_answer(kind, server)} | {bases} |"
        )
    return "\n".join(lines) + "\n"


def all_errors() -> Iterator[type[FideloraError]]:
    """Yield every subclass of `FideloraError`, in the order of the module."""
    for value in vars(errors).values():
        if (
            inspect.isclass(value)
            and issubclass(value, FideloraError)
            and value is not FideloraError
        ):
            yield value


def _answer(kind: type[FideloraError], server: TestClient) -> str:
    with capture_logs():  # an error without a response is logged
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
    """Return a client of a server that raises the error whose name is the path."""
    app = FastAPI()
    problems.install(app)

    @app.get("/{name}")
    def fail(name: str) -> None:
        raise getattr(errors, name)

    return TestClient(app)
