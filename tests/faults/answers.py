"""Submission of requests that a server may refuse."""

from __future__ import annotations

import urllib.error
from dataclasses import dataclass

from tests.server.serve_support import Server


@dataclass(frozen=True)
class Answer:
    """Answer to a request that may be refused.

    Attributes:
        request_id: id of an accepted request; empty if it was refused.
    """

    status: int
    request_id: str = ""
    retry_after: str = ""
    message: str = ""


def try_submit(server: Server, **fields: object) -> Answer:
    """Request one small image of a server that may refuse it."""
    try:
        return Answer(200, server.submit(**fields))
    except urllib.error.HTTPError as error:
        retry_after = error.headers.get("Retry-After", "")
        return Answer(error.code, retry_after=retry_after, message=error.read().decode())
