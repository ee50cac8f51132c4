"""Storage of LoRA files that are dropped onto the page. Does not import Gradio."""

from __future__ import annotations

from pathlib import Path

from fidelora.errors import BodyTooLargeError
from fidelora.server.context import ServerContext
from fidelora.server.page.visitor import visitor
from fidelora.settings import Settings

LORA_SUFFIX = ".safetensors"


def max_upload_bytes(settings: Settings) -> int:
    """Return the size limit of the page's uploads, which are LoRAs, training runs and images."""
    return max(settings.lora_max_mb, settings.job_max_mb) * 2**20


def refuse_larger(file: Path, max_bytes: int) -> None:
    """Raise `BodyTooLargeError` for a file of more than `max_bytes`."""
    if file.stat().st_size > max_bytes:
        raise BodyTooLargeError(
            f"{file.name} is too large; at most {max_bytes:,} bytes are allowed."
        )


def add_lora(context: ServerContext, file: Path) -> str:
    """Store a dropped LoRA as `POST /v1/loras` does, and return its path for requests.

    Raises:
        ServerStoppingError: the server is stopping.
        BodyTooLargeError: the file is larger than `FIDELORA_LORA_MAX_MB`.
        AdapterExistsError: an upload with this name has other contents.
        AdapterNameError, AdapterError, WeightsFileError: the file cannot be used.
        UploadQuotaError: the uploads would exceed their quota.
        OutputError: the file could not be written.
    """
    context.refuse_if_stopping()
    refuse_larger(file, context.settings.lora_max_mb * 2**20)
    with file.open("rb") as opened:
        path, _ = context.uploads.add(opened, file.name, visitor().owner)
    return path
