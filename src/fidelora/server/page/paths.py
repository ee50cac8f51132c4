"""Which paths are the page's. Gradio has many more routes (proxies, an API of its own, run histories); they do not exist here."""

from __future__ import annotations

from fidelora.server.login import LOGIN_PATH, LOGOUT_PATH

GRADIO = "/gradio_api/"
FILES = "/gradio_api/file="
UPLOAD_PATH = "/gradio_api/upload"
EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
"""Where what somebody did on the page is told: what takes long, and what does not."""
STREAMS = ("/gradio_api/queue/data", "/gradio_api/heartbeat/")
"""Answers that last as long as somebody looks at the page."""
REPORTS = "/reports/"
_EXACT = frozenset(
    {
        "/", LOGIN_PATH, LOGOUT_PATH, UPLOAD_PATH, "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/cancel",
        "/gradio_api/reset", "/gradio_api/upload_progress", "/gradio_api/startup-events", *EVENTS,
    }
)  # fmt: skip
_BEGINNINGS = ("/assets/", "/static/", FILES, REPORTS, *STREAMS)


def is_page_path(path: str) -> bool:
    """Whether a request for this path is for the page."""
    return path in _EXACT or path.startswith(_BEGINNINGS)
