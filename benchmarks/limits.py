"""Limits of the machine: rates of copying memory and of matrix products in PyTorch, all threads.

Also counts the floating-point operations of a step (matrix products and convolutions only), without
running it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from benchmarks.full_size import SPEC
from benchmarks.processes import answer_requests
from torch.utils.flop_counter import FlopCounterMode

from fidelora.accel.packed import packed_dtype
from fidelora.weights.configs import read_config
from fidelora.weights.strict import empty_part

SIDE = 2048  # side of the multiplied matrices
_BYTES = 2**28  # size of the copied memory


def measure() -> dict[str, float]:
    """Return the copy rate in GB/s and the rate of 2048x2048 matrix products in GFLOP/s.

    A copied byte counts once, although it is read and written.
    """
    source = torch.ones(_BYTES // 4)
    target = torch.ones_like(source)
    found = {"copy": _BYTES / _best(lambda: target.copy_(source)) / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[name] = 2 * SIDE**3 / _best(partial(torch.mm, a, b, out=out)) / 1e9
    return found


def step_flops(size: int) -> int:
    """Return the floating-point operations of one step with guidance at this size."""
    unet = next(component for component in SPEC.parts if component.name == "unet")
    config = read_config(SPEC.layout / "unet" / "config.json")
    module = empty_part(unet, config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents, text = (
            torch.empty(2, 4, size // 8, size // 8),
            torch.empty(2, 77, config["cross_attention_dim"]),
        )
        module.to("meta")(latents, torch.empty((), dtype=torch.int64), encoder_hidden_states=text)
    return int(counter.get_total_flops())


def fast_dtype() -> str:
    """Return the dtype of the `fast` mode on this machine."""
    return str(packed_dtype()).removeprefix("torch.")


def _best(run: Callable[[], object]) -> float:
    # The first run is a warm-up. The best of the others is least affected by other processes.
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    answer_requests({"measure": measure, "step_flops": step_flops, "fast_dtype": fast_dtype})


if __name__ == "__main__":
    main()
