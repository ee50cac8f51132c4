"""Devices, offloading and optimisations. A model family lists the optimisations it supports."""

from typing import Literal

Offload = Literal["none", "model", "sequential"]
"""Offloading modes: `none` keeps all model parts on the device, `model` moves one part at a time
there, `sequential` one layer at a time. The latter two save device memory and cost time."""
