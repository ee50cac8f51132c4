"""Messages for calls of routes that this server does not have."""

from __future__ import annotations

_WITHOUT_V1 = ("/images/", "/models", "/chat/", "/completions", "/embeddings", "/responses")
"""Paths that a client of OpenAI's API calls if its base URL lacks the `/v1`."""
_OTHER_OPENAI = (
    "/v1/audio/", "/v1/chat/", "/v1/completions", "/v1/embeddings", "/v1/moderations",
    "/v1/responses", "/v1/videos",
)  # fmt: skip
"""Routes of OpenAI's API that do not make images."""
OPENAI_ROUTES = (*_WITHOUT_V1, *_OTHER_OPENAI)
"""First parts of unknown paths whose errors have OpenAI's format."""
_LIST = "/docs lists all routes"
_HINTS = (
    (("/v1/v1/",), "The path has /v1 twice; set base_url to the server's address without /v1."),
    (_WITHOUT_V1, "OpenAI's API begins with /v1; set base_url to the server's address and /v1."),
    (_OTHER_OPENAI, "Of OpenAI's API, only models and POST /v1/images/generations are supported."),
    (
        ("/v1/images/edits", "/v1/images/variations"),
        "Images cannot be edited; POST /v1/images/generations makes new ones.",
    ),
    (
        ("/sdapi/v1/img2img", "/sdapi/v1/extra-", "/controlnet/"),
        "img2img, upscaling and ControlNet are not supported; POST /sdapi/v1/txt2img makes images.",
    ),
    (("/sdapi/",), f"This part of AUTOMATIC1111's API is not supported; {_LIST}."),
    (
        ("/gradio_api/", "/config", "/api/"),
        "The web page has no API for gradio_client; use POST /v1/inference.",
    ),
)
"""Sentences by the first parts of paths; the first match counts."""


def unknown_route(path: str) -> str:
    """Return the message for a call of a path that is not a route of this server."""
    for prefixes, hint in _HINTS:
        if path.startswith(prefixes):
            return f"Not Found. {hint}"
    return f"Not Found. This path is not part of the API; {_LIST}."
