"""The engine: recipes in, images out."""

from __future__ import annotations

import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fidelora
from fidelora.accel import Offload
from fidelora.accel.device import (
    TORCH_DTYPES,
    auto_dtype,
    instruction_set,
    processor_name,
    resolve_device,
)
from fidelora.adapters.library import AdapterLibrary
from fidelora.adapters.live import live_adapters
from fidelora.adapters.targets import BoundAdapter
from fidelora.engine.examine import refuse_other_family, say_where_it_belongs
from fidelora.engine.model import BaseKey, BaseModel, expected_bytes, load_base
from fidelora.errors import (
    AdapterMismatchError,
    DeviceError,
    EngineBusyError,
    MemoryExhaustedError,
    RecipeError,
)
from fidelora.families.sd.latents import decode, rough_colours
from fidelora.families.sd.text import Condition
from fidelora.images.write import GeneratedImage
from fidelora.recipe import Dtype, Recipe, may_share_batch
from fidelora.sampling.loop import denoise
from fidelora.sampling.noise import NoiseSource
from fidelora.sampling.schedules import make_scheduler
from fidelora.weights.locate import fingerprint

_BATCH_PIXELS = {"cpu": 4 * 256 * 256, "cuda": 4 * 512 * 512}
"""Of all images that are made side by side: on the CPU it saves 5 % of each (docs/performance.md), on CUDA it is an estimate."""


@dataclass(frozen=True)
class Progress:
    """How far an image is: `step` of `steps` are done, and `seconds` have passed since the first began.

    Attributes:
        preview: makes a rough picture, uint8 RGB [height / 8, width / 8, 3], of an image, `preview(place)` among those
            that are made side by side, by default the first; call it in `on_step`, or not at all.
    """

    step: int
    steps: int
    seconds: float
    preview: Callable[..., NDArray[np.uint8]] = field(repr=False, compare=False)

    @property
    def seconds_left(self) -> float:
        """An estimate: the steps to come take as long as those that are done."""
        return self.seconds / self.step * (self.steps - self.step)


OnStep = Callable[[Progress], None]
"""Called after every step; what it raises (by custom `GenerationCancelled`) ends the generation and leaves the engine usable."""


class Engine:
    """Makes images on one device, and keeps what it loaded for the next ones.

    Calls from several threads wait for each other: an image has the device, and the weights, for itself.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        offload: `none`; `model` or `sequential` save memory of the device and cost time.
        cache_dir: where downloads of the hub are kept, if not in its usual place.
        base_budget_bytes: how much memory the weights of loaded base models may take together; those used longest ago go first.
            The one in use is kept even if it alone is larger. None: one base model at a time.
        adapters: a library to share; by default a new one.

    Raises:
        DeviceError: no such device here.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        offload: Offload = "none",
        cache_dir: str | Path | None = None,
        base_budget_bytes: int | None = None,
        adapters: AdapterLibrary | None = None,
    ) -> None:
        self.device = resolve_device(device)
        if offload not in get_args(Offload):
            raise DeviceError(
                f"There is no way of offloading {offload!r}; use none, model or sequential."
            )
        if offload != "none" and self.device.type == "cpu":
            raise DeviceError(
                "Offloading moves parts of the model between the CPU and a device; on the CPU itself use offload none."
            )
        self.adapters = adapters or AdapterLibrary()
        self._offload: Offload = offload
        self._cache_dir = Path(cache_dir) if cache_dir else None
        self._base_budget_bytes = base_budget_bytes or 0
        self._bases: OrderedDict[BaseKey, BaseModel] = OrderedDict()
        self._fingerprints: dict[BaseKey, tuple[tuple[str, int, int], ...]] = {}
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def auto_dtype(self) -> Dtype:
        """The usual precision of this engine's device; a recipe itself never says `auto`."""
        return auto_dtype(self.device)

    def merged(self) -> frozenset[str]:
        """Sha256 of the adapters that are in the weights of the base model that was used last."""
        return next(
            (base.merged.adapters for base in reversed(list(self._bases.values()))), frozenset()
        )

    def load(self, recipe: Recipe) -> None:
        """Load the base model and the adapters that `recipe` needs, and compile what has to be, so that `generate` starts at once.

        Raises:
            BaseModelError, AdapterError, WeightsFileError: what is wrong with them.
            DeviceError: it is `fast`, and there is no such path here.
        """
        with self._computing():
            base = self._base(recipe)
            with self._with_adapters(base, recipe, self._bind(base, recipe)):
                one = base.latents_shape(recipe)
                halves = 2 if recipe.guidance_scale > 1 else 1
                for images in {1, self.max_batch(recipe)}:
                    base.warm(torch.Size((images * halves, *one[1:])))

    def max_batch(self, recipe: Recipe) -> int:
        """How many images like this one go through the model side by side at best; 1 in `exact`."""
        if recipe.fidelity == "exact":
            return 1
        return max(1, _BATCH_PIXELS.get(self.device.type, 0) // (recipe.width * recipe.height))

    def generate(
        self,
        recipe: Recipe,
        on_step: OnStep | None = None,
        *,
        scheduler_options: Mapping[str, Any] | None = None,
    ) -> GeneratedImage:
        """Make the image that `recipe` defines. The same recipe gives the same pixels, whatever was made before it.

        Args:
            scheduler_options: of the sampler's configuration, in place of the trainer's, such as `steps_offset`. For finding out
                how somebody else made an image; the recipe and the image's record do not know of them.

        Raises:
            BaseModelError, AdapterError, WeightsFileError: what is wrong with a file; nothing has changed then.
            DeviceError: it is `fast`, and there is no such path here.
            NumericsError: the model produced NaN.
            MemoryExhaustedError: the device has too little memory for it.
            BaseException: whatever `on_step` raises.
        """
        return self._generate([recipe], on_step, scheduler_options)[0]

    def generate_batch(
        self, recipes: Sequence[Recipe], on_step: OnStep | None = None
    ) -> list[GeneratedImage]:
        """Make images side by side: `fast` ones that differ in prompts and seed alone (`may_share_batch`), or a single one.

        Each has the noise of its own seed; its last bits may depend on its company.

        Raises:
            RecipeError: they may not share a batch.
            FideloraError: whatever `generate` raises.
        """
        if not recipes or not all(may_share_batch(recipes[0], other) for other in recipes[1:]):
            raise RecipeError(
                "Images are made side by side if all are fast and differ in prompts and seed alone; make these apart."
            )
        return self._generate(recipes, on_step, None)

    def _generate(
        self, recipes: Sequence[Recipe], on_step: OnStep | None, options: Mapping[str, Any] | None
    ) -> list[GeneratedImage]:
        common = recipes[0]  # but for prompts and seeds
        with self._computing():
            clock = _Clock()
            base = self._base(common)
            bound = self._bind(base, common)
            clock.lap("load")
            try:
                with self._with_adapters(base, common, bound):
                    clock.lap("adapters")
                    told = [self._condition(base, recipe, bound) for recipe in recipes]
                    clock.lap("text")
                    condition = Condition.side_by_side(
                        [one for one, _ in told]
                    )  # all negative prompts, then all prompts
                    latents = self._sample(base, recipes, condition, on_step, options)
                    clock.lap("denoise")
                    images = [
                        decode(base.vae, latents[image : image + 1], upcast=base.upcasts_vae)
                        for image in range(len(recipes))
                    ]
                    clock.lap("decode")
            finally:
                base.rest()
        environment = self._environment(base)
        return [
            GeneratedImage(pixels, recipe, environment, warnings, clock.laps)
            for pixels, recipe, (_, warnings) in zip(images, recipes, told, strict=True)
        ]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """All that the engine does with weights; compiled code is for one such state, so every use of it is inside."""
        with self._alone(), torch.no_grad(), self._own_precision(), _memory_errors():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One image at a time; a call from inside a call would wait for itself, so it is refused."""
        if self._owner == threading.get_ident():
            raise EngineBusyError
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    @contextmanager
    def _own_precision(self) -> Iterator[None]:
        """The recipe says the dtypes; an autocast around the caller has no say."""
        with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
            yield

    def _base(self, recipe: Recipe) -> BaseModel:
        key = BaseKey.of(recipe)
        found = fingerprint(key.base_model, key.vae, key.config)
        if self._fingerprints.get(key) != found:
            self._bases.pop(key, None)  # files were overwritten
        if key not in self._bases:
            self._make_room(key)
            gc.collect()  # hooks that offload go round in circles, and would keep what is gone until somebody looks
            self._bases[key] = load_base(
                key, self.device, offload=self._offload, cache_dir=self._cache_dir
            )
            self._fingerprints[key] = found
        self._bases.move_to_end(key)
        return self._bases[key]

    def _make_room(self, key: BaseKey) -> None:
        """Let base models go before another one is loaded, so that the budget holds in the meantime, too."""
        needed = (
            expected_bytes(key, self._cache_dir) if self._bases and self._base_budget_bytes else 0
        )
        while (
            self._bases
            and sum(base.size_bytes for base in self._bases.values()) + needed
            > self._base_budget_bytes
        ):
            self._bases.popitem(last=False)

    def _bind(self, base: BaseModel, recipe: Recipe) -> list[tuple[BoundAdapter, float]]:
        """All adapters of the recipe, checked against the base model before any weight is touched."""
        bound = []
        for ref in recipe.adapters:
            adapter = self.adapters.get(ref)
            if ref.alpha is not None:
                adapter = adapter.with_alpha(ref.alpha)
            refuse_other_family(adapter, base.spec)
            try:
                bound.append((base.targets.bind(adapter), ref.multiplier))
            except AdapterMismatchError as error:
                raise say_where_it_belongs(adapter, base.spec, error) from error
        return bound

    @contextmanager
    def _with_adapters(
        self, base: BaseModel, recipe: Recipe, bound: list[tuple[BoundAdapter, float]]
    ) -> Iterator[None]:
        # The trainer runs a DoRA beside the model whatever the multipliers are; a merged one would differ in every last bit.
        beside = [
            (one, multiplier)
            for one, multiplier in bound
            if recipe.adapter_mode == "live" or (one.is_dora and recipe.fidelity == "exact")
        ]
        base.merged.apply([pair for pair in bound if pair not in beside])
        with live_adapters(base.targets, beside, self.device):
            yield

    def _condition(
        self, base: BaseModel, recipe: Recipe, bound: list[tuple[BoundAdapter, float]]
    ) -> tuple[Condition, tuple[str, ...]]:
        """What the UNet is told of this image, and warnings."""

        def adapters(part: str) -> Hashable:
            return tuple(
                (one.identity, multiplier, recipe.adapter_mode)
                for one, multiplier in bound
                if part in one.components
            )

        return base.conditioning.of(recipe, adapters, base.device)

    def _sample(
        self,
        base: BaseModel,
        recipes: Sequence[Recipe],
        condition: Condition,
        on_step: OnStep | None,
        options: Mapping[str, Any] | None,
    ) -> Tensor:
        start = time.monotonic()
        common = recipes[0]

        def report(step: int, latents: Tensor) -> None:
            if on_step is not None:

                def preview(image: int = 0) -> NDArray[np.uint8]:
                    return rough_colours(latents[image], base.spec.latent_colours)

                on_step(Progress(step, common.steps, time.monotonic() - start, preview))

        noise = NoiseSource([recipe.seed for recipe in recipes], common.noise)
        return denoise(
            partial(base.predict, base.for_unet(condition)),
            make_scheduler(common, base.device, options),
            noise.initial(base.latents_shape(common), TORCH_DTYPES[common.dtype]).to(base.device),
            steps=common.steps,
            guidance_scale=common.guidance_scale,
            guidance_rescale=common.guidance_rescale,
            noise=noise,
            on_step=report,
        )

    def _environment(self, base: BaseModel) -> dict[str, str]:
        """What can change the last bits of an image without being in its recipe."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else processor_name()
        )
        way = (
            {}
            if base.way is None
            else {"fast": f"{base.way.value}, {str(base.unet.dtype).removeprefix('torch.')}"}
        )
        return {
            **_versions(),
            "device": f"{self.device} ({name})",
            "cpu_capability": instruction_set(),
            "threads": str(torch.get_num_threads()),
            **way,
        }


@cache
def _versions() -> dict[str, str]:
    """Of the libraries that compute; asking takes a millisecond."""
    of_others = {name: version(name) for name in ("diffusers", "transformers")}
    return {"fidelora": fidelora.__version__, "torch": torch.__version__, **of_others}


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Translate what torch raises when memory runs out: a class of its own on devices, a sentence on the CPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryExhaustedError from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise MemoryExhaustedError from error
        raise


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
