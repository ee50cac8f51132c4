"""Configuration of a part of a base model, without reading its weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from fidelora.families import Part, all_families
from fidelora.safetensors_header import read_file_header
from fidelora.weights.configs import read_config
from fidelora.weights.files import BaseFiles


def config_of(files: BaseFiles, part: Part) -> Mapping[str, Any]:
    """Return a part's configuration: from its `config.json`, else from the shapes of its weights.

    Raises:
        BaseModelError, WeightsFileError: a file is missing, damaged or unsuitable.
    """
    if part.name in files.configs:
        return read_config(files.configs[part.name])
    weights = {
        key: torch.empty(tensor.shape, device="meta")
        for path in files.weights.get(part.name, (files.source,))
        for key, tensor in read_file_header(path).tensors.items()
    }
    if part.name not in files.weights:
        converter = importlib.import_module(files.family.checkpoint)
        others = all_families().values()
        weights = converter.split(weights, {}, files.family, others, files.source.name)[part.name]
    module, _, function = part.convert.partition(":")
    _, config = getattr(importlib.import_module(module), function)(weights, None)
    found: Mapping[str, Any] = config
    return found
