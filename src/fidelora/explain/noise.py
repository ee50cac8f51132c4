"""Random numbers of an image as other programs draw them.

Sources: https://github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/rng.py`;
https://github.com/comfyanonymous/ComfyUI, `comfy/sample.py` and `comfy/k_diffusion/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fidelora.explain.brownian import BrownianPath
from fidelora.explain.philox import PhiloxGenerator

Device = Literal["cpu", "gpu"]
StepNoise = Literal["continued", "cpu_next_seed", "cpu_same_seed", "gpu"]
"""Numbers that are drawn during sampling. `continued`: the next numbers of the generator of the
initial noise, as in diffusers and A1111. The others are those of a new generator, as in ComfyUI:
`gpu` if it runs on a GPU; on the CPU, versions up to at least 0.3.64 use `cpu_same_seed` (the
initial noise is added again), and later ones `cpu_next_seed` (seed plus one)."""


class _Generator(Protocol):
    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return the next standard normal numbers, float32."""


class _CpuGenerator:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator)


def _generator(device: Device, seed: int) -> _Generator:
    return PhiloxGenerator(seed) if device == "gpu" else _CpuGenerator(seed)


class SimulatedNoise:
    """Random numbers of one image, with the interface that schedules of diffusers need.

    Args:
        device: where the initial noise is drawn.
        step_noise: where the numbers of the sampling steps come from.
        seed_delta: number added to the seed for the sampling steps (A1111's setting "Eta noise seed
            delta"); only for `continued`.
        batch: number of images that are drawn at a time from one seed (ComfyUI).
        index: position of the image in the batch.
    """

    def __init__(
        self,
        seed: int,
        *,
        device: Device = "cpu",
        step_noise: StepNoise = "continued",
        seed_delta: int = 0,
        batch: int = 1,
        index: int = 0,
    ) -> None:
        self._seed = seed
        self._device: Device = device
        if step_noise != "continued":
            self._device = "gpu" if step_noise == "gpu" else "cpu"
        self._initial = _generator(device, seed)
        self._steps = self._initial
        if step_noise == "cpu_next_seed":
            self._steps = _generator("cpu", seed + 1)
        elif step_noise == "cpu_same_seed":
            self._steps = _generator("cpu", seed)
        elif step_noise == "gpu":
            self._steps = _generator("gpu", seed)
        elif seed_delta:
            self._steps = _generator(device, seed + seed_delta)
        self._batch, self._index = max(batch, index + 1), index
        # Placeholder that diffusers passes to `torch.randn`; `drawing` intercepts these calls.
        self.generators = [torch.Generator("cpu")]

    def initial(self, shape: Sequence[int]) -> Tensor:
        """Return the initial noise, float32 [1, ...]."""
        return self._drawn(self._initial, shape)

    def step(self, shape: Sequence[int]) -> Tensor:
        """Return the next numbers of the sampling steps, float32 [1, ...]."""
        return self._drawn(self._steps, shape)

    def path(self, shape: Sequence[int], low: float, high: float) -> BrownianPath:
        """Return the Brownian path of the samplers with `sde` in their name, for a range of levels.

        Its seed is always that of the image.
        """

        def randn(seed: int) -> Tensor:
            return self._drawn(_generator(self._device, seed), shape)

        return BrownianPath(randn, self._seed, low, high)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Make `torch.randn`, which diffusers' samplers call in their steps, return `step`."""
        with _Redirected(self):
            yield

    def _drawn(self, generator: _Generator, shape: Sequence[int]) -> Tensor:
        numbers = generator.randn((self._batch, *shape[1:]))
        return numbers[self._index : self._index + 1]


class _Redirected(TorchFunctionMode):
    def __init__(self, noise: SimulatedNoise) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if func is torch.randn and generator in (*self._noise.generators, self._noise.generators):
            return self._noise.step(args[0]).to(kwargs.get("dtype", torch.float32))
        return func(*args, **kwargs)
