"""Facts about the first image of a process that are found before torch is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from fidelora.errors import FideloraError
from fidelora.families import get_family
from fidelora.recipe import Recipe
from fidelora.weights.files import BaseFiles, is_complete
from fidelora.weights.locate import cached, is_local

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GPU_FILES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Files of the drivers of NVIDIA's and AMD's GPUs on Linux. `/dev/nvmap` is that of Jetson boards,
`/dev/dxg` that of WSL."""


def is_cpu(device: str) -> bool:
    """Return True if the device with this name (`resolve_device`) is certainly the CPU."""
    if device == "cpu":
        return True
    is_linux = sys.platform.startswith("linux")
    return device == "auto" and is_linux and not any(Path(file).exists() for file in _GPU_FILES)


def weight_bytes(recipe: Recipe, device: str) -> int:
    """Return the size in bytes of the weights that a new engine allocates for `recipe` on a CPU.

    Reads only the headers of files on this machine.

    Args:
        device: name of the device (`resolve_device`).

    Returns:
        the size, or 0 if it is not known: if the device may be a GPU, if weights are quantised, if
        the recipe has its own VAE, if parts of the base model are not on this machine, or if its
        files cannot be used (the engine then raises the error).
    """
    if not is_cpu(device):
        return 0
    if recipe.quantization != "none" or recipe.text_encoder_quantization != "none":
        return 0  # these weights are smaller, and replace others while the model is loaded
    family = get_family(recipe.model)
    try:
        source = recipe.base_model if is_local(recipe.base_model) else cached(recipe.base_model)
        if source is None or recipe.vae or not is_complete(str(source), family):
            return 0
        files = BaseFiles.find(family, str(source), variant=recipe.variant, config=recipe.config)
        counts = files.parameter_counts()
    except (FideloraError, OSError):
        return 0
    sizes = {part.name: _BYTES[getattr(recipe, part.precision)] for part in family.parts}
    if recipe.fidelity == "fast":
        # Assumes bfloat16. A processor that cannot multiply it uses float32, but that is not known
        # before torch is loaded.
        sizes |= {part.name: 2 for part in family.parts if part.role != "text_encoder"}
    return sum(counts[name] * size for name, size in sizes.items())
