"""Arguments of the clients that are checked before any call."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from fidelora.errors import UsageError


def address(base_url: str) -> str:
    """Return the base URL for the HTTP client.

    Raises:
        UsageError: the URL does not begin with http:// or https://.
    """
    if not base_url.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"base_url is {base_url!r:.100}; it must begin with http:// or https://, such as "
            "http://127.0.0.1:8000."
        )
    return base_url.rstrip("/")


def open_lora(path: Path) -> BinaryIO:
    """Open a file for an upload.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
