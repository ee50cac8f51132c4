"""The fast path on CUDA: compiled blocks, in the memory layout of tensor cores.

The denoiser's repeated blocks are alike, so they are compiled once. Adapters are merged into the
tensors that the compiled code reads, so changing adapters does not recompile.

Based on the documentation of PyTorch and diffusers. Tested on the CPU only; its speed on a GPU has
not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_COMPILER = "inductor"


def compile_parts(denoiser: nn.Module, others: Sequence[nn.Module]) -> None:
    """Lay out all modules for tensor cores, and compile the denoiser's blocks on first use.

    A block is compiled again for each new image size until the compiler treats sizes as variables;
    `LoadedModel.warm_up` triggers this before a request's first step.
    """
    for module in (denoiser, *others):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compilable: Any = denoiser
    compilable.compile_repeated_blocks(fullgraph=True, backend=_COMPILER)
