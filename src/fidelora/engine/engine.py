"""The engine, which makes images from recipes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fidelora.accel import Offload
from fidelora.accel.device import auto_dtype, resolve_device
from fidelora.adapters.library import AdapterLibrary
from fidelora.engine.binding import Bound, bind, with_adapters, with_embeddings
from fidelora.engine.image_environment import image_environment
from fidelora.engine.inputs import decode, denoiser_settings, encode, schedule, size_of
from fidelora.engine.loaded import LoadedModels
from fidelora.engine.model import LoadedModel
from fidelora.engine.phase_clock import PhaseClock
from fidelora.errors import DeviceError, EngineBusyError, MemoryExhaustedError, RecipeError
from fidelora.families import get_family
from fidelora.families.protocols import ExtendableText
from fidelora.images.write import GeneratedImage
from fidelora.recipe import Dtype, Recipe, differ_in_prompts_and_seed, may_share_batch
from fidelora.sampling.loop import sample
from fidelora.sampling.noise import NoiseSource
from fidelora.weights.content import ContentHashes

_BATCH_PIXELS = {"cpu": 4 * 256 * 256, "cuda": 4 * 512 * 512}
"""Maximum number of pixels of all images in a batch. On the CPU, four images in a batch took 5 to
26 % less time per image (docs/performance.md); the value for CUDA is an estimate."""


@dataclass(frozen=True)
class Progress:
    """Progress of an image or a batch.

    Attributes:
        step: number of finished steps; half a step of a second-order sampler counts as a whole.
        steps: number of all steps.
        seconds: seconds since the first step began.
        preview: function that returns a preview, uint8 RGB [height / 8, width / 8, 3].
            `preview(index)` selects an image of a batch; the default is the first. It may only be
            called inside `on_step`.
    """

    step: int
    steps: int
    seconds: float
    preview: Callable[..., NDArray[np.uint8]] = field(repr=False, compare=False)

    @property
    def seconds_left(self) -> float:
        """Estimated time for the remaining steps, from the average of the finished ones."""
        return self.seconds / self.step * (self.steps - self.step)


OnStep = Callable[[Progress], None]
"""Callback that runs after every evaluation of the denoiser: once per step with most samplers, up
to twice with second-order samplers, steps + 1 times with `pndm`. If it raises an exception, by
convention `GenerationCancelled`, the generation ends and the engine stays usable."""


class Engine:
    """Makes images on one device, and keeps loaded models in memory for later images.

    Thread-safe: concurrent calls run one after another, because each needs exclusive use of the
    device and the weights.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        offload: `none`, `model` or `sequential`; the last two save device memory but take longer.
        cache_dir: folder for downloads from the hub; None for the default.
        base_budget_bytes: maximum memory for the weights of all loaded base models. The least
            recently used base model is dropped first. The one in use stays loaded even if it
            exceeds the budget. None keeps one base model at a time.
        adapters: adapter library, which several engines can share; by default a new one.
        hashes: content hashes of base models; by default those in the user's cache folder.

    Raises:
        DeviceError: the device does not exist, or does not support this offload mode.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        offload: Offload = "none",
        cache_dir: str | Path | None = None,
        base_budget_bytes: int | None = None,
        adapters: AdapterLibrary | None = None,
        hashes: ContentHashes | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.device_kind = self.device.type
        if offload not in get_args(Offload):
            raise DeviceError(
                f"The offload mode {offload!r} does not exist; use none, model or sequential."
            )
        if offload != "none" and self.device.type == "cpu":
            raise DeviceError(
                "Offloading moves parts of the model between the CPU and another device, so it is "
                "not supported on the CPU itself. Use offload none."
            )
        self.adapters = adapters or AdapterLibrary()
        self._models = LoadedModels(
            self.device,
            offload,
            cache_dir=Path(cache_dir) if cache_dir else None,
            budget_bytes=base_budget_bytes or 0,
            hashes=hashes or ContentHashes(),
        )
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def auto_dtype(self) -> Dtype:
        """Default dtype for recipes on this engine's device; recipes do not support `auto`."""
        return auto_dtype(self.device)

    def models(self) -> tuple[str, ...]:
        """Return the ids of the model families in memory, the most recently used one first."""
        return self._models.ids()

    def merged(self) -> frozenset[str]:
        """Return the sha256 of each adapter merged into the most recently used base model."""
        latest = self._models.latest
        return latest.merged.adapters if latest else frozenset()

    def load(self, recipe: Recipe) -> dict[str, float]:
        """Load the base model and adapters of `recipe`, so that `generate` starts without delay.

        On a device whose fast path is compiled, a `fast` recipe also compiles the model.

        Returns:
            seconds of each phase: `load` (the base model, and compiling it), `read` (adapters that
            were not in memory), `adapters` (merging them).

        Raises:
            BaseModelError, AdapterError, WeightsFileError: a file is missing or unsuitable.
            DeviceError: the recipe is `fast`, which this device or family does not support.
        """
        with self._computing():
            clock = PhaseClock()
            model, bound = self._load(recipe, clock)
            with with_adapters(model, recipe, bound):
                clock.lap("adapters")
                for images in {1, self.max_batch(recipe)}:
                    model.warm_up(images, *denoiser_settings(recipe))
            clock.lap("load")
        return clock.laps

    def initial_embedding(self, recipe: Recipe, words: str, tokens: int) -> dict[str, Tensor]:
        """Return the embedding with which the trainer starts, from the base model of `recipe`.

        Args:
            words: `init_words` of the training run.
            tokens: number of tokens of the embedding.

        Returns:
            vectors [tokens, width] by their key in embedding files.

        Raises:
            RecipeError: the model family does not support embeddings.
            BaseModelError, WeightsFileError: a file is missing or unsuitable.
        """
        family = get_family(recipe.model)
        if not family.supports_embeddings:
            raise RecipeError(f"{family.title} does not support embeddings.", field="model")
        keys = {part.name: part.embedding_key for part in family.text_encoders}
        with self._computing():
            text = cast(ExtendableText, self._models.get(recipe).text)
            vectors = text.initial_vectors(words, tokens)
        return {keys[part]: one for part, one in vectors.items()}

    def max_batch(self, recipe: Recipe) -> int:
        """Return the recommended batch size for images of this size; always 1 in `exact`."""
        if recipe.fidelity == "exact":
            return 1
        return self.max_jittered_batch(recipe)

    def max_jittered_batch(self, recipe: Recipe) -> int:
        """Return the recommended batch size for `generate_jittered`."""
        pixels = recipe.width * recipe.height * recipe.frames
        return max(1, _BATCH_PIXELS.get(self.device.type, 0) // pixels)

    def generate(
        self,
        recipe: Recipe,
        on_step: OnStep | None = None,
        *,
        scheduler_options: Mapping[str, Any] | None = None,
        jitter: int | None = None,
    ) -> GeneratedImage:
        """Make the image that `recipe` defines.

        The same recipe gives the same pixels, regardless of earlier images. The recipe in the
        result also contains the `base_sha256` of the base model.

        Args:
            scheduler_options: values that replace those of the sampler's configuration, such as
                `steps_offset`, to find out how another program made an image. They are not stored
                in the recipe or the image's record.
            jitter: seed of a random change of the initial latents by about half a unit in the last
                place of the recipe's dtype, to find out how far rounding errors change the image.
                Without effect in float32.

        Raises:
            BaseModelError, AdapterError, WeightsFileError: a file is missing or unsuitable, or the
                base model does not have the recipe's `base_sha256`. These errors are raised before
                any adapter is merged.
            DeviceError: the recipe is `fast`, which this device or family does not support.
            NumericsError: the model produced NaN.
            MemoryExhaustedError: the device has too little memory.
            EngineBusyError: this method was called from `on_step`.
            BaseException: any exception that `on_step` raises.
        """
        return self._generate([recipe], on_step, scheduler_options or {}, jitter)[0]

    def generate_batch(
        self, recipes: Sequence[Recipe], on_step: OnStep | None = None
    ) -> list[GeneratedImage]:
        """Make several `fast` images that differ in prompts and seed only, or a single image.

        Each image has the noise of its own seed. Its last bits may depend on the batch.

        Raises:
            RecipeError: the recipes cannot share a batch (`may_share_batch`).
            FideloraError: as in `generate`.
        """
        if not recipes or not all(may_share_batch(recipes[0], other) for other in recipes[1:]):
            raise RecipeError(
                "Images can share a batch only if all are fast and differ only in prompts and "
                "seed. Generate these images one by one."
            )
        return self._generate(recipes, on_step, {}, None)

    def generate_jittered(self, recipes: Sequence[Recipe], jitter: int) -> list[GeneratedImage]:
        """Make several images in half precision in one batch, in any fidelity.

        A batch changes the last bits, which is why other methods make `exact` images one by one. It
        does no harm here, because `jitter` changes all rounding errors anyway; see `generate`.

        Raises:
            RecipeError: the recipes differ in more than prompts and seed, or are in float32.
            FideloraError: as in `generate`.
        """
        first = recipes[0]
        alike = all(differ_in_prompts_and_seed(first, other) for other in recipes[1:])
        if not alike or first.dtype == "float32":
            raise RecipeError(
                "Images with jitter can share a batch only in half precision, and if they differ "
                "only in prompts and seed. Generate these images one by one."
            )
        return self._generate(recipes, None, {}, jitter)

    @contextmanager
    def model_for(self, recipe: Recipe) -> Iterator[tuple[LoadedModel, Bound]]:
        """Return the base model of `recipe` and its adapters, bound but not yet applied.

        For computations that a recipe cannot define (`fidelora.explain`). Other calls wait until
        the block ends, and calls inside the block raise `EngineBusyError`.

        Raises:
            BaseModelError, AdapterError, WeightsFileError: a file is missing or unsuitable.
            MemoryExhaustedError: the device has too little memory.
        """
        with self._computing():
            model = self._models.get(recipe)
            bound = bind(model, recipe, self.adapters)
            try:
                yield model, bound
            finally:
                model.offload_parts()

    def _generate(
        self,
        recipes: Sequence[Recipe],
        on_step: OnStep | None,
        options: Mapping[str, Any],
        jitter: int | None,
    ) -> list[GeneratedImage]:
        common = recipes[0]  # the recipes differ only in prompts and seed
        guidance, size, dtype = denoiser_settings(common)
        with self._computing():
            clock = PhaseClock()
            model, bound = self._load(common, clock)
            try:
                with with_adapters(model, common, bound):
                    clock.lap("adapters")
                    with with_embeddings(model, bound):
                        encoded = [encode(model, recipe, bound) for recipe in recipes]
                    clock.lap("text")
                    noise = NoiseSource([recipe.seed for recipe in recipes], common.noise)
                    latents = noise.initial(
                        model.latents.shape(size), model.latents.noise_dtype(dtype)
                    )
                    if jitter is not None and dtype != torch.float32:
                        latents = noise.jittered(latents, jitter, dtype)
                    latents = sample(
                        model.denoiser.prepare(encoded, guidance, size, dtype),
                        schedule(common, model, noise, options),
                        latents.to(model.device),
                        noise,
                        _step_reporter(model, common, on_step),
                    )
                    clock.lap("denoise")
                    rows = [latents[image : image + 1] for image in range(len(recipes))]
                    images = [decode(model, common, row) for row in rows]
                    clock.lap("decode")
            finally:
                model.offload_parts()
        environment = image_environment(model)
        hashes = {one.sha256: one.tensors_sha256 for one, _ in bound.adapters}
        return [
            GeneratedImage.of(
                pixels,
                replace(recipe, base_sha256=model.sha256),
                environment,
                one.warnings,
                clock.laps,
                hashes,
            )
            for pixels, recipe, one in zip(images, recipes, encoded, strict=True)
        ]

    def _load(self, recipe: Recipe, clock: PhaseClock) -> tuple[LoadedModel, Bound]:
        """Return the base model and adapters of a recipe; note the seconds of `load` and `read`."""
        model = self._models.get(recipe)
        clock.lap("load")
        bound = bind(model, recipe, self.adapters)
        clock.lap("read")
        return model, bound

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Take the lock and set torch's modes, which must always be the same for compiled code."""
        with self._alone(), torch.no_grad(), self._own_precision(), _memory_errors():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Serialise calls. A nested call would deadlock, so it raises `EngineBusyError`."""
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
        """Disable the caller's autocast, because the recipe defines the dtypes."""
        with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
            yield


def _step_reporter(
    model: LoadedModel, recipe: Recipe, on_step: OnStep | None
) -> Callable[[int, Tensor], None]:
    """Return the sampling loop's callback, which reports `Progress` to `on_step`."""
    start = time.monotonic()
    size = size_of(recipe)

    def report(step: int, latents: Tensor) -> None:
        if on_step is not None:

            def preview(image: int = 0) -> NDArray[np.uint8]:
                return model.latents.preview(latents[image], size)

            on_step(Progress(step, recipe.steps, time.monotonic() - start, preview))

    return report


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Convert torch's out-of-memory errors to `MemoryExhaustedError`.

    Torch raises `OutOfMemoryError` on accelerators, but a plain `RuntimeError` on the CPU.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryExhaustedError from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise MemoryExhaustedError from error
        raise
