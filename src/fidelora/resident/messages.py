"""Messages between commands and a resident engine: a JSON object, and bytes for pixels."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fidelora import errors
from fidelora.errors import FideloraError, RecipeError
from fidelora.recipe import Recipe
from fidelora.recipe_fields import ADAPTER_FIELDS

if TYPE_CHECKING:
    from fidelora.images.write import GeneratedImage

_HEAD = struct.Struct("!IQ")  # sizes of the JSON object and of the bytes after it
_MAX_BYTES = 2**40  # a larger size is not a message of this protocol
_PATHS = ("base_model", "config", "vae")
"""Fields of a recipe that may be paths, which are relative to the folder of the command."""


class EngineLostError(Exception):
    """The resident engine has ended."""


class EngineRefusedError(EngineLostError):
    """The resident engine does not make this image, for the reason in the message."""


class Channel:
    """Sends and receives messages over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def send(self, message: Mapping[str, Any], content: bytes = b"") -> None:
        """Send a message.

        Raises:
            EngineLostError: the other side has closed the connection.
        """
        plain = json.dumps(message).encode()
        try:
            self._connection.sendall(_HEAD.pack(len(plain), len(content)) + plain)
            if content:
                self._connection.sendall(content)
        except OSError as error:
            raise EngineLostError from error

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Return the next message and its bytes.

        Raises:
            EngineLostError: the other side has closed the connection.
        """
        size, more = _HEAD.unpack(self._read(_HEAD.size))
        if more > _MAX_BYTES:
            raise EngineLostError
        message = json.loads(self._read(size))
        return message, self._read(more)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._connection.close()

    def _read(self, size: int) -> bytes:
        try:
            content = self._stream.read(size)
        except (OSError, ValueError) as error:  # ValueError: closed by this process
            raise EngineLostError from error
        if len(content) < size:
            raise EngineLostError
        return content


def recipe_to_message(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe with absolute paths, and the paths of its adapters by hash."""
    plain = recipe.to_dict(paths=True)
    for name in _PATHS:
        path = Path(plain[name]).expanduser() if plain.get(name) else None
        if path is not None and path.exists():
            plain[name] = str(path.absolute())
    refs = [ref for name in sorted(ADAPTER_FIELDS) for ref in getattr(recipe, name)]
    paths = {ref.sha256: str(ref.path) for ref in refs if ref.path is not None}
    return {"recipe": plain, "paths": paths}


def recipe_of_message(message: Mapping[str, Any]) -> Recipe:
    """Return the recipe of `recipe_to_message`, with the paths of its adapters."""
    recipe, paths = Recipe.from_dict(message["recipe"]), message["paths"]
    changed: dict[str, Any] = {
        name: tuple(
            replace(ref, path=Path(paths[ref.sha256])) if ref.sha256 in paths else ref
            for ref in getattr(recipe, name)
        )
        for name in ADAPTER_FIELDS
    }
    return replace(recipe, **changed)


def images_to_message(images: Sequence[GeneratedImage]) -> tuple[dict[str, Any], bytes]:
    """Return a message about images, without their recipes, and the pixels of all their frames."""
    plain = [
        {
            "shape": list(image.all_pixels.shape),
            "base_sha256": image.recipe.base_sha256,
            "environment": dict(image.environment),
            "warnings": list(image.warnings),
            "seconds": dict(image.seconds),
            "lora_hashes": dict(image.lora_hashes),
        }
        for image in images
    ]
    return {"images": plain}, b"".join(image.all_pixels.tobytes() for image in images)


def images_of_message(
    message: Mapping[str, Any], content: bytes, recipes: Sequence[Recipe]
) -> list[GeneratedImage]:
    """Return the images of `images_to_message`, with the recipes that they were requested with."""
    import numpy as np

    from fidelora.images.write import GeneratedImage

    images, start = [], 0
    for plain, recipe in zip(message["images"], recipes, strict=True):
        size = math.prod(plain["shape"])
        pixels = np.frombuffer(content, np.uint8, size, start).reshape(plain["shape"])
        start += size
        images.append(
            GeneratedImage.of(
                pixels,
                replace(recipe, base_sha256=plain["base_sha256"]),
                plain["environment"],
                tuple(plain["warnings"]),
                plain["seconds"],
                plain["lora_hashes"],
            )
        )
    return images


def error_to_message(error: FideloraError) -> dict[str, Any]:
    """Return an error with the name of its class."""
    return {
        "error": type(error).__name__,
        "text": str(error),
        "field": error.field if isinstance(error, RecipeError) else "",
    }


def error_of_message(message: Mapping[str, Any]) -> FideloraError:
    """Return the error of `error_to_message`."""
    kind: type[FideloraError] = getattr(errors, message["error"], FideloraError)
    error = kind(message["text"])
    if isinstance(error, RecipeError):
        error.field = message["field"]
    return error
