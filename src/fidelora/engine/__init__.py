"""The engine: one recipe in, one image out. `engine.py` is the way in, `denoise.py` the algorithm."""

from typing import Literal

Offload = Literal["none", "model", "sequential"]
"""How to save memory of a device: not at all; one part of the model on it at a time; one layer at a time."""
