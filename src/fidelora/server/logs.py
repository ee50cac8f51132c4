"""Structured logs: one line per event, as JSON or text, with the request id."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import ExcInfo, Processor

from fidelora.texts import shortened

LogFormat = Literal["auto", "json", "text"]

REPEAT_S = 10.0  # a library's warning is logged once in this time
_LIBRARIES = ("uvicorn", "asyncio", "gradio")
_MAX_REMEMBERED = 1000  # number of warnings to remember; the memory is cleared when it is full
_MAX_TRACEBACK_LINES = 200
_SECRET_WORDS = ("token", "authorization", "api_key", "password")
"""Log fields whose names contain one of these are masked."""


def is_text(log_format: LogFormat) -> bool:
    """True if this process logs text, and False if it logs JSON."""
    return log_format == "text" or (log_format == "auto" and sys.stderr.isatty())


def configure_logs(log_format: LogFormat = "auto", debug: bool = False) -> None:
    """Send all logs of this process and its libraries through one formatter to stderr."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _mask_secrets,
        _shorten_texts,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    # Plain tracebacks: rich ones show local variables, which may hold tokens.
    renderers: list[Processor] = [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=_write_traceback
        )
    ]
    if not is_text(log_format):
        renderers = [
            structlog.processors.format_exc_info,
            _shorten_exception,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    handler.addFilter(LibraryRepeats())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True
    logging.getLogger("uvicorn.access").disabled = True  # replaced by RequestLogMiddleware
    for name in ("httpx2", "httpcore2", "urllib3", "filelock", "alembic"):
        # These libraries log URLs, which may contain a token.
        logging.getLogger(name).setLevel(logging.WARNING)


class LibraryRepeats(logging.Filter):
    """Drops a library's warning if it has logged the same one in the last `REPEAT_S` seconds.

    Otherwise, a caller could fill the disk, for example with requests that are not HTTP.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the record is to be logged."""
        if record.levelno < logging.WARNING or not record.name.startswith(_LIBRARIES):
            return True
        kind = record.exc_info[0] if record.exc_info else None
        now, key = time.monotonic(), (record.name, f"{record.msg} {kind}")
        if now - self._last.get(key, -REPEAT_S) < REPEAT_S:
            return False
        if len(self._last) >= _MAX_REMEMBERED:
            self._last.clear()
        self._last[key] = now
        return True


def _shorten_texts(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Cut texts of more than 2,000 bytes, such as errors that quote a file or a request."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = shortened(value)
    return event


def _shorten_exception(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    if isinstance(event.get("exception"), str):
        event["exception"] = short_traceback(event["exception"])
    return event


def _write_traceback(target: TextIO, exc_info: ExcInfo) -> None:
    plain = io.StringIO()
    structlog.dev.plain_traceback(plain, exc_info)
    target.write(short_traceback(plain.getvalue()))


def short_traceback(text: str) -> str:
    """Return a traceback with at most 200 lines of at most 2,000 bytes.

    Lines in the middle are left out: the first lines show where the call came from, and the last
    lines show what went wrong.
    """
    lines = text.split("\n")
    if len(lines) > _MAX_TRACEBACK_LINES:
        half = _MAX_TRACEBACK_LINES // 2
        lines = [*lines[:half], "...", *lines[-half:]]
    return "\n".join(map(shortened, lines))


def _mask_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Mask the values of fields whose names suggest a secret."""
    event.pop("color_message", None)  # uvicorn repeats the message there
    for name in event:
        if any(secret in name.lower() for secret in _SECRET_WORDS):
            event[name] = "***"
    return event
