"""No text of an error is longer than 2 kB: in errors, in the database and in logs."""

from __future__ import annotations

import io
import logging

import pytest
import structlog

from fidelora.errors import FideloraError
from fidelora.jobs.job import Failure
from fidelora.server.logs import configure_logs, short_traceback
from fidelora.server.problems import _STATUS_AND_CODE

LONG = "x" * 2**20
KINDS: list[type[FideloraError]] = [kind for kind, _, _ in _STATUS_AND_CODE]


def test_no_error_is_longer_than_two_kilobytes():
    kinds: list[type[FideloraError]] = [FideloraError, *KINDS]
    for kind in kinds:
        assert len(str(kind(LONG)).encode()) <= 2048
        assert len(str(kind("\x1b" * 2**20)).encode()) <= 2048
    assert len(Failure("X", LONG).message.encode()) <= 2048
    assert str(FideloraError("short")) == "short"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_log_line_has_a_long_text(log_format):
    target, root = io.StringIO(), logging.getLogger()
    before = (root.handlers, root.level)
    try:
        configure_logs(log_format)
        assert isinstance(root.handlers[0], logging.StreamHandler)
        root.handlers[0].setStream(target)
        log = structlog.get_logger("fidelora.test")
        log.error("failed", reason=LONG, path=LONG)
        log.error(LONG)
        logging.getLogger("a.library").error(LONG)
        try:
            raise ValueError(LONG)
        except ValueError as error:
            log.error("failed", exc_info=error)
            log.exception("failed")
    finally:
        root.handlers, root.level = before
        structlog.reset_defaults()
    text = target.getvalue()
    assert text.count("failed") >= 3
    assert "ValueError" in text
    assert max(map(len, text.split("\n"))) < 16_384
    assert len(text) < 65_536


def test_a_long_traceback_keeps_its_beginning_and_its_end():
    lines = [str(number) for number in range(100_000)]
    short = short_traceback("\n".join(lines)).split("\n")
    assert (short[0], short[-1], len(short)) == ("0", "99999", 201)
