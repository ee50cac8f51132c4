"""Options of Gradio event listeners, shared by the tabs. Does not import Gradio."""

from __future__ import annotations

from typing import Any

IMMEDIATE: dict[str, Any] = {
    "show_progress": "hidden",
    "queue": False,
    "api_visibility": "private",
}
"""Options for handlers that return immediately."""

STREAMING: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}
"""Options for handlers that yield updates until a job or a verification ends."""
