"""Event handlers that run for the visitor who caused the event."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, get_type_hints

import gradio as gr

from fidelora.server.access import ANONYMOUS, Caller
from fidelora.server.context import caller_of
from fidelora.server.page.visitor import acting_for


def for_visitor(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event handler that runs `handler` for the visitor who caused the event.

    Gradio finds the parameter for its request by the annotation.
    """
    if inspect.isasyncgenfunction(handler):

        async def stream(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
            async with aclosing(handler(*values)) as steps:
                while True:
                    # Set only while the handler runs; between its steps, other code runs here.
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
    # If Gradio's request wraps no HTTP call, its attributes come from the client: not trusted.
    call = getattr(request, "request", None)
    return ANONYMOUS if call is None else caller_of(call)
