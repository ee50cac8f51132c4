"""Model families. Each package has the families that share its code.

`spec.py` of a package defines its families as data and does not import torch. The other modules
(`text`, `denoiser`, ...) are imported when a base model is loaded.
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
