"""Banner above the tabs with the reason why the server cannot make images."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fidelora.server.context import ServerContext
from fidelora.server.page.events import IMMEDIATE
from fidelora.server.page.html import notice

_INTERVAL_S = 5.0
"""Seconds between two checks of the workers, until one is ready."""


class NotReadyBanner:
    """Banner that is visible while no worker is ready and one could not start or pauses."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        # Not gr.HTML, whose scripts the page's security policy blocks.
        self._banner = gr.Markdown(visible=False, latex_delimiters=[], elem_id="not-ready")
        self._timer = gr.Timer(_INTERVAL_S, active=False)

    def listen(self, page: gr.Blocks) -> None:
        """Connect the event handlers."""
        outputs = [self._banner, self._timer]
        gr.on([page.load, self._timer.tick], self._update, None, outputs, **IMMEDIATE)

    def _update(self) -> list[Any]:
        """Return the banner, and a timer that ticks until a worker is ready."""
        pool, reason = self._context.pool, self._context.unready_reason
        sentence = (
            f"No images can be made at the moment: {reason} The server retries automatically."
        )
        return [
            gr.update(value=notice(sentence, "error") if reason else "", visible=bool(reason)),
            gr.update(active=pool is not None and not pool.ready),
        ]
