"""Client of an engine in another process. Does not import torch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from fidelora.recipe import Dtype, Recipe
from fidelora.resident.messages import (
    Channel,
    EngineLostError,
    EngineRefusedError,
    error_of_message,
    images_of_message,
    recipe_to_message,
)

if TYPE_CHECKING:  # numpy and Pillow are imported while the engine computes
    from fidelora.images.write import GeneratedImage

_CONNECT_S = 5.0  # seconds in which a resident engine has to send its first message


class Steps(Protocol):
    """Progress of an image: the part of the engine's `Progress` without tensors."""

    @property
    def step(self) -> int:
        """Number of finished steps."""

    @property
    def steps(self) -> int:
        """Number of all steps."""


OnSteps = Callable[[Steps], None]


@dataclass(frozen=True)
class _Steps:
    step: int
    steps: int


class ResidentEngine:
    """A connection to a resident engine. All methods raise `EngineLostError` if it has ended.

    Attributes:
        auto_dtype: default dtype on the engine's device.
    """

    def __init__(self, channel: Channel, auto_dtype: Dtype) -> None:
        self._channel = channel
        self.auto_dtype = auto_dtype

    @classmethod
    def connect(cls, path: Path) -> ResidentEngine | None:
        """Return a connection to the engine that listens at `path`; None if there is none."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(str(path))
            channel = Channel(connection)
            message, _ = channel.receive()
        except (OSError, EngineLostError):
            connection.close()
            return None
        connection.settimeout(None)
        return cls(channel, cast(Dtype, message["auto_dtype"]))

    def max_batch(self, recipe: Recipe) -> int:
        """Return the recommended batch size; see `Engine.max_batch`."""
        self._channel.send({"call": "max_batch", **recipe_to_message(recipe)})
        message, _ = self._channel.receive()
        if "error" in message:
            raise error_of_message(message)
        return int(message["max_batch"])

    def generate(self, recipe: Recipe, on_step: OnSteps | None = None) -> GeneratedImage:
        """Make an image; see `Engine.generate`."""
        return self.generate_batch([recipe], on_step)[0]

    def generate_batch(
        self, recipes: Sequence[Recipe], on_step: OnSteps | None = None
    ) -> list[GeneratedImage]:
        """Make images; see `Engine.generate_batch`.

        If `on_step` raises, or the process ends, the engine stops after its current step.
        """
        plain = [recipe_to_message(recipe) for recipe in recipes]
        self._channel.send({"call": "generate", "recipes": plain})
        try:
            import fidelora.images.write  # noqa: F401  # takes 0.1 s, in which the engine begins

            message, content = self._channel.receive()
            while "step" in message:
                if on_step is not None:
                    on_step(_Steps(message["step"], message["steps"]))
                message, content = self._channel.receive()
        except BaseException:
            self._channel.close()  # the rest of the answer must not be read by the next call
            raise
        if "error" in message:
            raise error_of_message(message)
        if "refused" in message:
            raise EngineRefusedError(message["refused"])
        return images_of_message(message, content, recipes)
