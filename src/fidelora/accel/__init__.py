"""Devices, and faster ways to compute. A model family opts in to each of them."""

from typing import Literal

Offload = Literal["none", "model", "sequential"]
"""Modes of saving device memory: none; one model part on the device at a time (`model`); one layer
at a time (`sequential`)."""
