"""Weights into modules, strictly: every weight that a module has comes from the file, and every weight of the file has a place.

diffusers and transformers fill what is missing with random numbers and go on with a line in the log. A text encoder whose file
names its weights in another way then loads without an error, and every image is noise with a theme. That is impossible here.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from fidelora.errors import (
    BaseModelFilesError,
    BaseModelWeightsError,
    NonFiniteWeightsError,
    WeightsFileError,
    some,
)
from fidelora.families import Component
from fidelora.safetensors_header import read_file_header

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How diffusers named the VAE's attention before 0.15; the files of Stable Diffusion 1.5 still do.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Written by transformers before 4.31; a constant (0, 1, 2, ...), not a weight.
_POSITION_IDS = "embeddings.position_ids"


def build_component(
    component: Component,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module that `config` describes, with exactly these weights in `dtype`, ready for inference on the CPU.

    Weights that adapters can change are places without numbers yet: `MergedAdapters` writes them, with the first adapters in them,
    and copying what is overwritten at once would cost as much again.

    Args:
        dtype: None puts the very tensors in that were given, for whoever makes something else of them at once.

    Returns:
        the module, and the weights as they were given, under the names that the module has for them.

    Raises:
        BaseModelFilesError: the configuration describes no such module.
        BaseModelWeightsError: weights are missing, left over, of other shapes or quantised; the message names them.
        NonFiniteWeightsError: there is NaN or infinity among them.
    """
    module = empty_component(component, config)
    weights = _rename(component, weights, module.state_dict().keys())
    _check(component, weights, {name: tensor.shape for name, tensor in module.state_dict().items()})
    broken = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    if broken:
        raise NonFiniteWeightsError(
            f"The base model's {component.name} holds NaN or infinity in {len(broken)} weights ({some(broken)}): it is damaged, or "
            "its training diverged; use another one."
        )
    later = (
        {f"{path}.weight" for path, _ in changeable(module)}
        if component.adapter_prefixes
        else set()
    )
    # Copies, even where the dtype is right already: what was read is mapped from the file, and would change with it.
    own = (
        weights
        if dtype is None
        else {
            name: tensor.to(dtype, copy=True)
            for name, tensor in weights.items()
            if name not in later
        }
    )
    if dtype is not None:
        own |= {name: torch.empty_like(weights[name], dtype=dtype) for name in later}
    module.load_state_dict(own, strict=True, assign=True)
    return module.eval().requires_grad_(False), weights


def changeable(component: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Path and module of everything in a part of a base model whose weight adapters can change."""
    for path, module in component.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield path, module


def _is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it: both would be its least or greatest number. One pass, no memory."""
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) and torch.isfinite(greatest))


def empty_component(component: Component, config: Mapping[str, Any]) -> nn.Module:
    """The module that `config` describes, its weights shapes without numbers.

    Raises:
        BaseModelFilesError: the configuration describes no such module.
    """
    with init_empty_weights(include_buffers=False):
        return _construct(component, config)


def read_config(path: Path) -> dict[str, Any]:
    """A component's `config.json`.

    Raises:
        BaseModelFilesError: there is none, or it is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelFilesError(
            f"The base model has no {path.parent.name}/{path.name}; it is incomplete."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BaseModelFilesError(
            f"The base model's {path.parent.name}/{path.name} cannot be read: {error}."
        ) from error
    if not isinstance(config, dict):
        raise BaseModelFilesError(
            f"The base model's {path.parent.name}/{path.name} is not a JSON object."
        )
    return config


def read_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of one file or of the shards of one file, on the CPU, possibly mapped from the files.

    Raises:
        WeightsFileError: a file is not a sound .safetensors file.
        BaseModelFilesError: two shards have the same weight.
    """
    weights: dict[str, Tensor] = {}
    for path in paths:
        read_file_header(path)
        try:
            shard = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsFileError(f"{path} cannot be read: {error}.") from error
        if repeated := sorted(weights.keys() & shard.keys()):
            raise BaseModelFilesError(
                f"{path.name} has {len(repeated)} weights that another shard has too ({some(repeated)})."
            )
        weights |= shard
    return weights


def _construct(component: Component, config: Mapping[str, Any]) -> nn.Module:
    model_class = getattr(importlib.import_module(component.library), component.class_name)
    try:
        if component.library == "transformers":
            module = model_class(model_class.config_class.from_dict(dict(config)))
        else:
            module = model_class.from_config(
                {key: value for key, value in config.items() if not key.startswith("_")}
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"{component.name}/config.json describes no {component.class_name}: {reason}."
        ) from error
    assert isinstance(module, nn.Module)
    return module


def _rename(
    component: Component, weights: Mapping[str, Tensor], expected: Any
) -> dict[str, Tensor]:
    """The weights under the names that the installed library uses."""
    prefix = component.optional_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in expected)
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if component.library == "transformers" and name.endswith(_POSITION_IDS):
            if not torch.equal(tensor.flatten().long(), torch.arange(tensor.numel())):
                raise BaseModelWeightsError(
                    f"{component.name} has position ids that are not 0, 1, 2, ...; it is damaged."
                )
            continue
        if prefix:
            bare = name.removeprefix(
                prefix
            )  # what stands beside the level, like a projection, never has it
            name = prefix + bare if has_prefix and bare not in expected else bare
        if component.library == "diffusers":
            name = re.sub(
                r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
            )  # fmt: skip
        if name in renamed:
            raise BaseModelWeightsError(
                f"The base model's {component.name} has two weights that are both {name}: it is damaged."
            )
        renamed[name] = tensor
    return renamed


def _check(
    component: Component, weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> None:
    problems = [
        ("lacks", sorted(expected.keys() - weights.keys())),
        ("has left over", sorted(weights.keys() - expected.keys())),
        (
            "has in other shapes than its configuration says",
            [
                f"{name} {list(weights[name].shape)}, not {list(shape)}"
                for name, shape in expected.items()
                if name in weights and weights[name].shape != shape
            ],
        ),
        (
            "has quantised, which is not supported,",
            sorted(name for name, tensor in weights.items() if tensor.dtype not in _FLOATS),
        ),
    ]
    found = [f"{what} {len(names)} weights ({some(names)})" for what, names in problems if names]
    if found:
        raise BaseModelWeightsError(
            f"The base model's {component.name} {', '.join(found)}: it is no {component.class_name} of this configuration, "
            "or its file names its weights in a way that is not known."
        )
