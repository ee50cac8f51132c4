"""How much the rounding of a saved adapter matters: a copy whose weights lie elsewhere within that rounding."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fidelora.safetensors_header import read_file_header

_ORDER = ("BF16", "F16", "F32", "F64")
_SMALLEST_F16 = 2.0**-24
"""Below 2**-14 the numbers of float16 are this far apart, however small they are."""


def narrowest_dtype(path: Path) -> str:
    """The dtype with the fewest bits among an adapter's weights, in the format's spelling; `F32` if none is narrower.

    Raises:
        WeightsFileError: it is not a sound .safetensors file.
    """
    kinds = {
        info.dtype
        for key, info in read_file_header(path).tensors.items()
        if not key.endswith(".alpha")
    }
    return next((kind for kind in _ORDER[:2] if kind in kinds), "F32")


def perturbed_copy(path: Path, folder: Path, draw: int) -> Path:
    """Write a float32 copy of the adapter whose weights were moved at random, each within half a unit of its last place.

    Before they were rounded for the file, the weights were somewhere there. The same `draw` always moves them alike.
    """
    generator = torch.Generator().manual_seed(draw)
    tensors = safetensors.torch.load(path.read_bytes())
    moved = {
        key: tensor.float() if key.endswith(".alpha") else _moved(tensor, generator)
        for key, tensor in sorted(tensors.items())
    }
    target = folder / path.name
    safetensors.torch.save_file(moved, target, dict(read_file_header(path).metadata))
    return target


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = tensor.float()
    bits = {torch.float16: 10, torch.bfloat16: 7}.get(tensor.dtype)
    if bits is None:
        return values
    unit = torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=2.0**-126))) - bits)
    if tensor.dtype == torch.float16:
        unit = unit.clamp(min=_SMALLEST_F16)
    return values + (torch.rand(values.shape, generator=generator) - 0.5) * unit
