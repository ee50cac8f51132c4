"""The model families: pure data, one file each, found through the registry."""

from fidelora.models.registry import all_models, model_spec, register
from fidelora.models.spec import Component, ModelSpec, Sampler

__all__ = ["Component", "ModelSpec", "Sampler", "all_models", "model_spec", "register"]
