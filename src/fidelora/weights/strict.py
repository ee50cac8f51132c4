"""Load weights strictly: a file must contain exactly the weights of the module.

diffusers and transformers replace missing weights by random numbers and only log it. A text encoder
whose file uses other names would load without an error, and images would be little more than noise.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fidelora.errors import (
    BaseModelFilesError,
    BaseModelWeightsError,
    NonFiniteWeightsError,
    WeightsFileError,
)
from fidelora.families.spec import Part
from fidelora.safetensors_header import read_file_header
from fidelora.texts import listed
from fidelora.weights.scaled import refuse_scaled

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of the VAE's attention in diffusers before 0.17, as in the files of Stable Diffusion 1.5.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Key written by transformers before 4.31; its value is a constant (0, 1, 2, ...), not a weight.
_POSITION_IDS = "embeddings.position_ids"
# Modules of the functions that set initial values; transformers wraps those of torch.
_INITIALISERS = ("torch.nn.init", "transformers.initialization")


def build_part(
    part: Part, config: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the module that `config` describes, with exactly these weights, on the CPU.

    If `dtype` is given, weights that adapters can change have no memory until `allocate_weights`.
    `MergedAdapters` writes them later, with the first adapters merged in, so copying them here
    would waste time.

    Args:
        dtype: dtype of the module; None keeps the given tensors, for callers that convert them
            afterwards.

    Returns:
        the module in inference mode, and the given weights under the module's own names.

    Raises:
        BaseModelFilesError: the configuration does not describe such a module.
        BaseModelWeightsError: weights are missing, left over, misshapen or quantised.
        NonFiniteWeightsError: some weights are NaN or infinite.
    """
    module = empty_part(part, config)
    expected = module.state_dict()
    weights = _rename(part, weights, expected.keys())
    tied = _tied(module)
    for name, twin in tied.items():
        if name not in weights and twin in weights:
            weights[name] = weights[twin]
    _check(part, weights, {name: tensor.shape for name, tensor in expected.items()})
    broken = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    if broken:
        raise NonFiniteWeightsError(
            f"{len(broken)} weights of the base model's {part.name} are NaN or infinite "
            f"({listed(broken)}): the file is damaged, or its training diverged. Use another one."
        )
    changed = changeable(module) if part.adapter_prefixes else ()
    later = {f"{path}.weight" for path, _ in changed}
    if dtype is None:
        own = weights
    else:
        # Copy even if the dtype is right: the tensors that were read may be mapped from the file.
        own = {
            name: torch.empty((), dtype=dtype).expand(tensor.shape)
            if name in later
            else tensor.to(dtype, copy=True)
            for name, tensor in weights.items()
        }
    module.load_state_dict(own, strict=True, assign=True)
    _tie(module, tied)
    if part.rounds_buffers and dtype is not None:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.to(dtype)
    return module.eval().requires_grad_(False), weights


def allocate_weights(module: nn.Module) -> None:
    """Allocate memory, uninitialised, for the weights that `build_part` left without memory.

    Call it after modules have been replaced by others that store their weight themselves. If it
    were called earlier, the memory of the replaced modules would leave gaps in the heap.
    """
    for weight in module.parameters():
        needed = weight.numel() * weight.itemsize
        if not weight.is_meta and weight.untyped_storage().nbytes() < needed:
            weight.data = torch.empty(weight.shape, dtype=weight.dtype)


def changeable(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield the path and the module of each layer whose weight adapters can change."""
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            yield path, child


def part_class(part: Part) -> Any:
    """Import and return the class that computes a part."""
    name = part.implementation or f"{part.library}:{part.class_name}"
    module_name, _, class_name = name.partition(":")
    return getattr(importlib.import_module(module_name), class_name)


def empty_part(part: Part, config: Mapping[str, Any]) -> nn.Module:
    """Return the module that `config` describes, with weights on the meta device.

    Raises:
        BaseModelFilesError: the configuration does not describe such a module.
    """
    with init_empty_weights(include_buffers=False), _NoInitialValues():
        module = _construct(part, {**config, **part.config})
    if part.library == "transformers":
        # The context replaces each parameter when it is assigned, which separates tied ones.
        tied: Any = module
        tied.tie_weights()
    return module.get_submodule(part.submodule)


def read_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Read all tensors of one file, or of the shards of one file, on the CPU.

    The tensors may be mapped from the files.

    Raises:
        WeightsFileError: a file is not a valid .safetensors file.
        BaseModelWeightsError: the weights are quantised with separate scales.
        BaseModelFilesError: two shards contain the same weight.
    """
    weights: dict[str, Tensor] = {}
    for path in paths:
        refuse_scaled(read_file_header(path), path.name)
        try:
            shard = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsFileError(
                f"{path} cannot be read: {error}. Download the base model again."
            ) from error
        if repeated := sorted(weights.keys() & shard.keys()):
            raise BaseModelFilesError(
                f"{len(repeated)} weights of {path.name} are in another shard, too "
                f"({listed(repeated)}). Download the base model again."
            )
        weights |= shard
    return weights


class _NoInitialValues(TorchFunctionMode):
    """Mode in which parameters on the meta device get no initial values.

    They have no data. Without this mode, torch computes their shapes in Python and loads its
    compiler to do so.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if getattr(func, "__module__", "") in _INITIALISERS:
            tensor = options["tensor"] if "tensor" in options else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **options)


def _is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite; computed in one pass and without extra memory.

    If there is such a value, `aminmax` returns it as the minimum or the maximum.
    """
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) and torch.isfinite(greatest))


def _construct(part: Part, config: Mapping[str, Any]) -> nn.Module:
    model_class = part_class(part)
    try:
        if part.library == "transformers":
            module = model_class(model_class.config_class.from_dict(dict(config)))
        else:
            own = {key: value for key, value in config.items() if not key.startswith("_")}
            module = model_class.from_config(own)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"{part.name}/config.json does not describe a {part.class_name}: {reason}. Use the "
            "configuration of this base model."
        ) from error
    assert isinstance(module, nn.Module)
    return module


def _tied(module: nn.Module) -> dict[str, str]:
    """Map each name of a shared parameter to its other name; a file may store only one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: twin for group in names.values() for name in group for twin in group if twin != name
    }


def _tie(module: nn.Module, tied: Mapping[str, str]) -> None:
    """Make the names in each pair of `tied` share one parameter again; loading separates them."""
    for name, twin in tied.items():
        owner, _, parameter = name.rpartition(".")
        setattr(module.get_submodule(owner), parameter, module.get_parameter(twin))


def _rename(part: Part, weights: Mapping[str, Tensor], expected: Any) -> dict[str, Tensor]:
    """Return the weights under the names of the installed library."""
    prefix = part.optional_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in expected)
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if part.ignores(name):
            continue
        if part.library == "transformers" and name.endswith(_POSITION_IDS):
            if not torch.equal(tensor.flatten().long(), torch.arange(tensor.numel())):
                raise BaseModelWeightsError(
                    f"The position ids of the base model's {part.name} are not 0, 1, 2, ...; "
                    "the file is damaged. Download it again."
                )
            continue
        if part.submodule:
            name = name.removeprefix(f"{part.submodule}.")
        if prefix:
            # Weights outside the prefixed module, such as a projection, never have the prefix.
            bare = name.removeprefix(prefix)
            name = prefix + bare if has_prefix and bare not in expected else bare
        if part.library == "diffusers":
            name = re.sub(
                r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
                lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.",
                name,
            )
        if name in renamed:
            raise BaseModelWeightsError(
                f"Two weights of the base model's {part.name} are both {name}: the file is "
                "damaged. Download it again."
            )
        renamed[name] = tensor
    return renamed


def _check(part: Part, weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    missing = sorted(expected.keys() - weights.keys())
    left_over = sorted(weights.keys() - expected.keys())
    misshapen = [
        f"{name} {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    quantised = sorted(name for name, tensor in weights.items() if tensor.dtype not in _FLOATS)
    problems = [
        (missing, "are missing"),
        (left_over, "are unknown"),
        (misshapen, "have other shapes than the configuration requires"),
        (quantised, "are quantised, which is not supported"),
    ]
    found = [f"{len(names)} weights {what} ({listed(names)})" for names, what in problems if names]
    if found:
        advice = (
            "Use an unquantised checkpoint, in bfloat16, float16 or float32."
            if quantised
            else f"The file belongs to another model or configuration than this {part.class_name}, "
            "or its weight names are unknown. Use another file."
        )
        raise BaseModelWeightsError(f"The base model's {part.name}: {'; '.join(found)}. {advice}")
