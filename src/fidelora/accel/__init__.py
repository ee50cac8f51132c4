"""Devices, and faster ways to compute. A model family opts in to each of them."""

from typing import Literal

Offload = Literal["none", "model", "sequential"]
"""How device memory is saved: not at all, one model part on the device at a time, one layer at a time."""
