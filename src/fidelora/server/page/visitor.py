"""The visitor for whom an event handler of the page runs. Does not import Gradio.

Gradio runs handlers outside of the HTTP call that caused them, so `handlers.for_visitor` stores the
caller in a context variable while the handler runs. A handler without it runs for `ANONYMOUS`,
which has access to the LoRA folder only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fidelora.server.access import ANONYMOUS, Caller

_visitor: ContextVar[Caller] = ContextVar("visitor", default=ANONYMOUS)


def visitor() -> Caller:
    """Return the visitor of the running handler."""
    return _visitor.get()


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Set the visitor while the context is open."""
    token = _visitor.set(caller)
    try:
        yield
    finally:
        _visitor.reset(token)
