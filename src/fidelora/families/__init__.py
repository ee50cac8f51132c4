"""The model families: pure data, one file each, found through the registry."""

from fidelora.families.registry import all_families, get_family, register
from fidelora.families.spec import Component, Family, Sampler

__all__ = ["Component", "Family", "Sampler", "all_families", "get_family", "register"]
