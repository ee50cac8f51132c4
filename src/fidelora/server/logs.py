"""Structured logs: one line for each event, JSON for machines or text for people, with the request's id."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog
from structlog.typing import Processor

LogFormat = Literal["auto", "json", "text"]

_SECRETS = ("token", "authorization", "api_key", "password")


def configure_logs(log_format: LogFormat = "auto", debug: bool = False) -> None:
    """Send every log of this process, those of libraries too, through one formatter to stderr."""
    as_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _mask,
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
    # Plain tracebacks: the others show local variables, and tokens with them.
    renderers: list[Processor] = [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]
    if not as_text:
        renderers = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True
    logging.getLogger(
        "uvicorn.access"
    ).disabled = True  # the server writes its own line, with the ids
    for name in ("httpx2", "httpcore2", "urllib3", "filelock", "alembic"):
        logging.getLogger(name).setLevel(
            logging.WARNING
        )  # they log addresses, which may carry a token


def _mask(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What is called a secret is not written down, whoever logs it."""
    event.pop("color_message", None)  # uvicorn says things twice
    for name in event:
        if any(secret in name.lower() for secret in _SECRETS):
            event[name] = "***"
    return event
