"""The visitor for whom an event handler of the page runs. Does not import Gradio at module level.

Gradio runs handlers outside of the HTTP call that caused them, so `for_visitor` takes the caller
from Gradio's request and stores it in a context variable while the handler runs. A handler without
it runs for `NOBODY`, who has access to the LoRA folder only.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, get_type_hints

from fidelora.server.access import NOBODY, Caller
from fidelora.server.context import caller_of

_visitor: ContextVar[Caller] = ContextVar("visitor", default=NOBODY)


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


def for_visitor(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event handler that runs `handler` for the visitor who caused the event.

    Gradio finds the parameter for its request by the annotation.
    """
    import gradio as gr

    if inspect.isasyncgenfunction(handler):

        async def stream(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
            async with aclosing(handler(*values)) as steps:
                while True:
                    # Not set while it is suspended, when other code runs in the same context.
                    with acting_for(_caller(request)):
                        try:
                            step = await anext(steps)
                        except StopAsyncIteration:
                            return
                    yield step

        run: Callable[..., Any] = stream
    elif inspect.iscoroutinefunction(handler):

        async def wait(request: gr.Request, *values: Any) -> Any:
            with acting_for(_caller(request)):
                return await handler(*values)

        run = wait
    else:

        def call(request: gr.Request, *values: Any) -> Any:
            with acting_for(_caller(request)):
                return handler(*values)

        run = call
    # Gradio reads the signature, for example to find the parameter for data of the event.
    parameters = inspect.signature(handler).parameters.values()
    own = inspect.Parameter("request", inspect.Parameter.POSITIONAL_ONLY)
    run.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {**get_type_hints(handler), "request": gr.Request}
    run.__name__ = handler.__name__
    return run


def _caller(request: Any) -> Caller:
    # Without an HTTP call, the attributes of Gradio's request come from a body.
    call = getattr(request, "request", None)
    return NOBODY if call is None else caller_of(call)
