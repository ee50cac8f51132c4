"""Options of Gradio event listeners, shared by the tabs. Does not import Gradio."""

from __future__ import annotations

from typing import Any

IMMEDIATE: dict[str, Any] = {
    "show_progress": "hidden",
    "queue": False,
    "trigger_mode": "always_last",
    "api_visibility": "private",
}
"""Options for handlers that return immediately.

If an event occurs while its handler runs, the handler runs once more afterwards, with the latest
values. By default, Gradio drops such events, so the last of several quick changes would be lost.
"""

STREAMING: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}
"""Options for handlers that yield updates until a job or a verification ends."""
