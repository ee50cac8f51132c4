"""Helpers of the tests of AUTOMATIC1111's API."""

from __future__ import annotations

from typing import Any

from tests.server.http_support import ManualWorker, jobs_succeeding, png_with_parameters

from fidelora.server.context import ServerContext


def recipes_for(client: Any, context: ServerContext, **fields: Any) -> Any:
    """Return the recipes of the request's job."""
    with jobs_succeeding(ManualWorker(context), png_with_parameters()):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a ball"} | fields)
    assert answer.status_code == 200, answer.text
    return context.store.list().jobs[0].recipes
