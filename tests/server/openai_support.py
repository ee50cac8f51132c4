"""Helpers of the tests of OpenAI's API."""

from __future__ import annotations

from typing import Any

from tests.server.serve_support import IMAGES_DEADLINE_S

LORAS = [{"path": "sks.safetensors", "network_multiplier": 0.8}]


def official_client(kind: Any, url: str, api_key: str = "none") -> Any:
    """Return a client with a deadline; by default, it waits for 600 s."""
    return kind(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=IMAGES_DEADLINE_S)
