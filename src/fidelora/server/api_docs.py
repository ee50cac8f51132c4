"""API documentation page at /docs: Swagger UI from files of an installed package.

FastAPI's own page loads Swagger UI from another host, so it stays empty without a network. The
files are those of the package `fastapi-offline` (MIT licence; Swagger UI has the Apache licence).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_PATH = "/docs"
_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
"""Media types of Swagger UI's files, by name."""
DOCS_PATHS = frozenset({_PATH, *(f"{_PATH}/{name}" for name in _FILES)})
"""Paths of the page and its files."""
# Allows only files of this server and the page's own script. Swagger UI sets inline styles.
_POLICY = (
    "default-src 'none'; script-src 'self' 'sha256-{hash}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def install(app: FastAPI) -> None:
    """Add the page and its files to the application."""
    # Relative URLs, because a proxy may serve the server below another path.
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title} API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    (script,) = _INLINE_SCRIPT.findall(page.body)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = {"Content-Security-Policy": _POLICY.format(hash=digest)}

    def docs(_request: Request) -> Response:
        return HTMLResponse(page.body, headers=policy)

    app.add_route(_PATH, docs, include_in_schema=False)
    folder = files("fastapi_offline") / "static"
    for name, media_type in _FILES.items():
        content = (folder / name).read_bytes()
        app.add_route(f"{_PATH}/{name}", _serve_file(content, media_type), include_in_schema=False)


def _serve_file(content: bytes, media_type: str) -> Callable[[Request], Response]:
    headers = {"Cache-Control": "public, max-age=86400"}
    return lambda _request: Response(content, media_type=media_type, headers=headers)
