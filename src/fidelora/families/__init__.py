"""The model families, one package each: *spec, text, denoiser, latents*.

A `spec.py` is data and needs no torch; the other modules are loaded when a base model is.
"""

from fidelora.families.registry import all_families, get_family
from fidelora.families.spec import Family, FlowSampler, NoiseSampler, Part, Sampler

__all__ = ["Family", "FlowSampler", "NoiseSampler", "Part", "Sampler", "all_families", "get_family"]
