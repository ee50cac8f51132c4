"""URL paths of the page.

Gradio adds many more routes (proxies, its own API, run histories), for which the server returns
404.
"""

from __future__ import annotations

from fidelora.server.login import LOGIN_PATH, LOGOUT_PATH

GRADIO = "/gradio_api/"
FILES = "/gradio_api/file="
UPLOAD_PATH = "/gradio_api/upload"
EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel")
"""Paths that receive events of the page: queued ones, immediate ones, and cancellations."""
HEARTBEAT = "/gradio_api/heartbeat/"
STREAMS = ("/gradio_api/queue/data", HEARTBEAT)
"""Responses that stay open for as long as a browser shows the page."""
REPORTS = "/reports/"
IMAGES_ZIP = "/images.zip"
_EXACT = frozenset(
    {
        "/",
        LOGIN_PATH,
        LOGOUT_PATH,
        UPLOAD_PATH,
        IMAGES_ZIP,
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/gradio_api/reset",
        "/gradio_api/upload_progress",
        "/gradio_api/startup-events",
        *EVENTS,
    }
)
_PREFIXES = ("/assets/", "/static/", FILES, REPORTS, *STREAMS)


def is_page_path(path: str) -> bool:
    """True if the page handles requests for this path."""
    return path in _EXACT or path.startswith(_PREFIXES)
