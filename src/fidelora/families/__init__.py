"""Model families. Each is a package with the modules `spec`, `text`, `denoiser` and `latents`.

`spec.py` is data and does not import torch. The other modules are imported when a base model
is loaded.
"""

from fidelora.families.registry import all_families, get_family
from fidelora.families.spec import (
    Family,
    FlowSampler,
    NoiseSampler,
    OlderTrainer,
    Part,
    Sampler,
)

__all__ = [
    "Family",
    "FlowSampler",
    "NoiseSampler",
    "OlderTrainer",
    "Part",
    "Sampler",
    "all_families",
    "get_family",
]
