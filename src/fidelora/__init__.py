"""Fidelora: what you saw in training is what you get in production.

    from fidelora import AdapterRef, Engine, Recipe

    sks = AdapterRef.from_file("sks.safetensors", 0.8)
    recipe = Recipe(prompt="a photo of sks", adapters=(sks,), seed=7)
    Engine().generate(recipe).save("sks.png")

Names are imported on first use, so that `import fidelora` is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fidelora.client import AsyncClient, Client
    from fidelora.engine.engine import Engine, Progress
    from fidelora.errors import FideloraError
    from fidelora.images.read import Origin, read_origin, read_record
    from fidelora.images.write import GeneratedImage
    from fidelora.recipe import AdapterRef, Recipe

__version__ = "0.1.0"

_MODULES = {
    "AdapterRef": "fidelora.recipe",
    "AsyncClient": "fidelora.client",
    "Client": "fidelora.client",
    "Engine": "fidelora.engine.engine",
    "FideloraError": "fidelora.errors",
    "GeneratedImage": "fidelora.images.write",
    "Origin": "fidelora.images.read",
    "Progress": "fidelora.engine.engine",
    "Recipe": "fidelora.recipe",
    "read_origin": "fidelora.images.read",
    "read_record": "fidelora.images.read",
}

__all__ = [
    "AdapterRef",
    "AsyncClient",
    "Client",
    "Engine",
    "FideloraError",
    "GeneratedImage",
    "Origin",
    "Progress",
    "Recipe",
    "__version__",
    "read_origin",
    "read_record",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fidelora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
