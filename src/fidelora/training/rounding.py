"""Perturbed copies of weights, which measure the effect of rounding in saved files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fidelora.safetensors_header import read_file_header

_MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7}
_MIN_NORMAL = 2.0**-126  # smallest normal number of float32 and bfloat16; avoids log2(0)
_F16_SUBNORMAL_STEP = 2.0**-24  # distance between adjacent float16 numbers below 2**-14


def narrowest_dtype(path: Path) -> str:
    """Return the smallest dtype of an adapter's or model's weights: `BF16`, `F16` or else `F32`.

    Args:
        path: .safetensors file, or diffusers folder.

    Raises:
        WeightsFileError: a file is not a valid .safetensors file.
    """
    dtypes = {
        info.dtype
        for file in ([path] if path.is_file() else path.glob("*/*.safetensors"))
        for key, info in read_file_header(file).tensors.items()
        if not key.endswith(".alpha")
    }
    return next((dtype for dtype in ("BF16", "F16") if dtype in dtypes), "F32")


def perturbed_copy(path: Path, folder: Path, seed: int) -> Path:
    """Write a float32 copy of an adapter with each weight moved at random.

    Each weight moves by at most half a unit in the last place of its dtype. The weights before
    rounding were within this range. The same `seed` always gives the same copy.

    Returns:
        The path of the copy in `folder`.
    """
    return _changed_copy(path, folder, seed, _perturb)


def perturbed_model(path: Path, folder: Path, seed: int) -> Path:
    """Write a float32 copy of a whole model with each weight moved as in `perturbed_copy`.

    Args:
        path: .safetensors file, or diffusers folder.
        folder: folder for the copy, with room for it.

    Returns:
        The path of the copy in `folder`.
    """
    if path.is_file():
        return perturbed_copy(path, folder, seed)
    target = folder / path.name
    shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(path.glob("*/*.safetensors")):
        perturbed_copy(file, target / file.parent.name, seed)
    return target


def scaled_copy(path: Path, folder: Path, seed: int) -> Path:
    """Write a float32 copy of an adapter with each tensor scaled at random by 0.9 to 1.1.

    Returns:
        The path of the copy in `folder`.
    """
    return _changed_copy(path, folder, seed, _scale)


def _changed_copy(
    path: Path, folder: Path, seed: int, change: Callable[[Tensor, torch.Generator], Tensor]
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = safetensors.torch.load(path.read_bytes())
    changed = {
        key: tensor.float() if key.endswith(".alpha") else change(tensor, generator)
        for key, tensor in sorted(tensors.items())
    }
    target = folder / path.name
    safetensors.torch.save_file(changed, target, dict(read_file_header(path).metadata))
    return target


def _scale(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.float() * (0.9 + 0.2 * torch.rand((), generator=generator))


def _perturb(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = tensor.float()
    bits = _MANTISSA_BITS.get(tensor.dtype)
    if bits is None:
        return values
    unit = torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=_MIN_NORMAL))) - bits)
    if tensor.dtype == torch.float16:
        unit = unit.clamp(min=_F16_SUBNORMAL_STEP)
    return values + (torch.rand(values.shape, generator=generator) - 0.5) * unit
