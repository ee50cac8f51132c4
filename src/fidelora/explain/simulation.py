"""Simulation of images of other programs, with settings that recipes do not have.

The simulation serves to explain pictures of other programs. It is not bit-identical to them,
because the order of sums and the precision of attention differ between programs and devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fidelora.engine.binding import Bound, Pairs, with_adapters, with_embeddings
from fidelora.engine.engine import Engine
from fidelora.engine.inputs import denoiser_settings, schedule
from fidelora.engine.model import LoadedModel
from fidelora.explain import k_samplers
from fidelora.explain.noise import Device, SimulatedNoise, StepNoise
from fidelora.explain.prompts import TextRule, embed
from fidelora.explain.sigmas import NoiseLevels, sigmas_of
from fidelora.explain.upsampling import doubling_sizes
from fidelora.families.clip import ClipEncoder
from fidelora.families.protocols import Encoded, Size
from fidelora.families.sd.latents import SDLatents
from fidelora.families.sd.text import Conditioning, SDText
from fidelora.recipe import Dtype, Recipe
from fidelora.sampling.loop import sample as run_schedule
from fidelora.sampling.noise import NoiseSource

Pixels = NDArray[np.uint8]
Library = Literal["diffusers", "k-diffusion"]
FAMILIES = ("sd15", "sdxl")
"""Model families whose images can be simulated."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Settings of an image in any program, without the base model and the adapters' files.

    Attributes:
        library: library that the sampler belongs to; `sampler` is one of the family's samplers for
            `diffusers`, or of `k_samplers.SAMPLERS`.
        schedule: one of `sigmas.SCHEDULES` for `k-diffusion`. For `diffusers`, the spacing of the
            timesteps: `leading`, `linspace`, `trailing` or `sgm_uniform`; empty for the trainer's.
        steps_offset: `steps_offset` of a `diffusers` sampler; None for the family's offset.
        eta: strength of the noise in the sampling steps of a `diffusers` sampler; None for the
            default.
        whole_timesteps: True rounds the timestep of each sigma to a whole number (ComfyUI, Forge).
        scales_start: True multiplies the initial noise by sqrt(1 + sigma**2) instead of sigma
            (ComfyUI at the largest sigma).
        device, step_noise, seed_delta, batch, index: see `SimulatedNoise`.
        text_rule, clip_skip: see `prompts.embed`.
        skips_in_negative: True uses the layer of `clip_skip` for the negative prompt, too. False
            uses the family's usual layer there, as diffusers does.
        zero_negative: True replaces the embeddings of an empty negative prompt by zeros (SDXL in
            A1111 and diffusers).
        strength, text_strength: multipliers of the trained adapter in the denoiser and in the text
            encoders.
        dtype: dtype of the denoiser, the text encoders and the VAE.
        rounds_noise: True rounds the noise and the latents to `dtype` (trainer, diffusers).
        doubles_sizes: True makes the UNet double sizes, and resize the result where it does not fit
            (A1111). False makes it resize once. Both are the same at multiples of 64 pixels.
        truncates: True rounds pixel values down (A1111, ComfyUI) instead of to the nearest level.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    library: Library = "diffusers"
    sampler: str = "ddpm"
    schedule: str = ""
    steps_offset: int | None = None
    eta: float | None = None
    whole_timesteps: bool = False
    scales_start: bool = False
    device: Device = "cpu"
    step_noise: StepNoise = "continued"
    seed_delta: int = 0
    batch: int = 1
    index: int = 0
    text_rule: TextRule = "plain"
    clip_skip: int = 0
    skips_in_negative: bool = True
    zero_negative: bool = False
    strength: float = 1.0
    text_strength: float = 1.0
    dtype: Dtype = "float32"
    rounds_noise: bool = False
    doubles_sizes: bool = False
    truncates: bool = False

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Simulation:
        """Return the settings of the trainer's sample that `recipe` replays."""
        multiplier = next((ref.multiplier for ref in recipe.adapters if ref.word is None), 1.0)
        return cls(
            prompt=recipe.prompt,
            negative_prompt=recipe.negative_prompt,
            width=recipe.width,
            height=recipe.height,
            seed=recipe.seed,
            steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            guidance_rescale=recipe.guidance_rescale,
            sampler=recipe.sampler,
            schedule="" if recipe.timestep_spacing == "default" else recipe.timestep_spacing,
            eta=recipe.eta,
            strength=multiplier,
            text_strength=multiplier,
            dtype=recipe.dtype,
            rounds_noise=True,
        )

    @property
    def draws_in_steps(self) -> bool:
        """True if the sampler draws random numbers after the initial noise."""
        if self.library == "k-diffusion":
            return self.sampler in k_samplers.DRAWING
        return self.sampler in ("ddpm", "euler_a", "dpm_2_a", "lcm", "tcd")

    @property
    def evaluations(self) -> int:
        """Approximate number of evaluations of the denoiser."""
        twice = self.sampler in k_samplers.TWO_EVALUATIONS or self.sampler == "dpm_2_a"
        return self.steps * (2 if twice else 1)


@dataclass
class Simulator:
    """Makes simulated images with the base model and the adapters of one planned sample.

    Args:
        recipe: recipe of the sample.
        on_image: called before each image that is not in the cache.
    """

    engine: Engine
    recipe: Recipe
    on_image: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._levels = NoiseLevels.of_stable_diffusion()
        self._images: dict[Simulation, tuple[Pixels, Pixels]] = {}
        self.evaluations = 0
        """Evaluations of the denoiser so far."""

    def image(self, simulation: Simulation) -> Pixels:
        """Return the simulated image, uint8 RGB [height, width, 3].

        Raises:
            RecipeError: a value is out of range, or the sampler does not exist.
            FideloraError: a file cannot be used, or the model produced NaN.
        """
        key = replace(simulation, truncates=False)
        if key not in self._images:
            if self.on_image is not None:
                self.on_image()
            values = self._values(key) * 255
            rounded = values.round().astype(np.uint8), np.floor(values).astype(np.uint8)
            self._images[key] = rounded
            self.evaluations += simulation.evaluations
        return self._images[key][simulation.truncates]

    def fitting_prompt(self, prompt: str) -> str:
        """Return the words of a prompt that training encodes: those in the first 75 tokens.

        A prompt that fits is returned unchanged.
        """
        with self.engine.model_for(self.recipe) as (model, _):
            for encoder in cast(SDText, model.text).encoders.values():
                words = prompt.split(" ")
                while len(_token_ids(encoder, " ".join(words))) > encoder.length - 2:
                    words.pop()
                prompt = " ".join(words)
        return prompt

    def _recipe_of(self, simulation: Simulation) -> Recipe:
        shared = {entry.name for entry in fields(Recipe)} & {
            entry.name for entry in fields(Simulation)
        }
        values: dict[str, Any] = {name: getattr(simulation, name) for name in shared}
        values["timestep_spacing"] = "default"
        if simulation.library == "k-diffusion":
            values |= {"sampler": "euler", "eta": None}
        elif simulation.schedule == "sgm_uniform":
            values["timestep_spacing"] = "sgm_uniform"
        values |= {"vae_dtype": simulation.dtype, "text_encoder_dtype": simulation.dtype}
        if simulation.dtype == self.recipe.dtype:
            values |= {
                name: getattr(self.recipe, name) for name in ("vae_dtype", "text_encoder_dtype")
            }
        if simulation.negative_prompt != self.recipe.negative_prompt:
            values["negative_prompt_2"] = None
        return replace(self.recipe, history=(), **values)

    def _values(self, simulation: Simulation) -> NDArray[np.float32]:
        """Return the decoded image, RGB from 0 to 1, [height, width, 3]."""
        recipe = self._recipe_of(simulation)
        guidance, size, dtype = denoiser_settings(recipe)
        with self.engine.model_for(recipe) as (model, bound):
            split = replace(bound, adapters=_with_strengths(model, bound.adapters, simulation))
            with ExitStack() as stack:
                stack.enter_context(with_adapters(model, recipe, split))
                with with_embeddings(model, bound):
                    encoded = self._encoded(model, split, simulation, size)
                if simulation.doubles_sizes:
                    for part in model.parts.values():
                        stack.enter_context(doubling_sizes(part))
                latents = self._sampled(
                    model,
                    simulation,
                    recipe,
                    model.denoiser.prepare([encoded], guidance, size, dtype),
                )
                decoder = cast(SDLatents, model.latents)
                return decoder.values(latents.to(dtype))

    def _encoded(
        self, model: LoadedModel, bound: Bound, simulation: Simulation, size: Size
    ) -> Encoded:
        text = cast(SDText, model.text)

        def row(prompts: Sequence[str], clip_skip: int) -> Conditioning:
            embedded = {
                name: embed(
                    encoder,
                    prompt,
                    simulation.text_rule,
                    clip_skip,
                    has_norm=len(text.encoders) == 1,
                )
                for (name, encoder), prompt in zip(text.encoders.items(), prompts, strict=True)
            }
            return text.condition(embedded, size)

        count = len(text.encoders)
        positive = row([simulation.prompt] * count, simulation.clip_skip)
        if simulation.guidance_scale <= 1:
            return Encoded(positive)
        negatives = [simulation.negative_prompt] * count
        if simulation.negative_prompt == self.recipe.negative_prompt and count == 2:
            negatives[1] = self.recipe.negative_prompt_2 or negatives[1]
        negative = row(negatives, simulation.clip_skip if simulation.skips_in_negative else 0)
        if simulation.zero_negative and not simulation.negative_prompt:
            added = dict(negative.added)
            if "text_embeds" in added:
                added["text_embeds"] = torch.zeros_like(added["text_embeds"])
            negative = Conditioning(torch.zeros_like(negative.text), added)
        return Encoded(positive, negative)

    def _sampled(
        self,
        model: LoadedModel,
        simulation: Simulation,
        recipe: Recipe,
        denoise: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        noise = SimulatedNoise(
            simulation.seed,
            device=simulation.device,
            step_noise=simulation.step_noise,
            seed_delta=simulation.seed_delta,
            batch=simulation.batch,
            index=simulation.index,
        )
        shape = model.latents.shape(Size(simulation.width, simulation.height))
        if simulation.library == "diffusers":
            source: Any = noise
            dtype = denoiser_settings(recipe)[2]
            if simulation.device == "cpu" and recipe.noise == "legacy":
                source = NoiseSource([simulation.seed], recipe.noise)
                initial = source.initial(shape, dtype)
            else:
                initial = noise.initial(shape)
            initial = initial.to(model.device, dtype if simulation.rounds_noise else torch.float32)
            options: dict[str, Any] = {}
            if simulation.steps_offset is not None:
                options["steps_offset"] = simulation.steps_offset
            if simulation.schedule not in ("", "sgm_uniform"):
                options["timestep_spacing"] = simulation.schedule
            planned = schedule(recipe, model, source, options)
            return run_schedule(denoise, planned, initial, source, lambda _step, _latents: None)
        initial = noise.initial(shape).to(model.device)
        # A1111's LCM uses fewer levels; ComfyUI's uses all, and whole timesteps.
        is_reduced = simulation.sampler == "lcm" and not simulation.whole_timesteps
        levels = self._levels.for_lcm() if is_reduced else self._levels
        sigmas = sigmas_of(levels, simulation.sampler, simulation.schedule, simulation.steps)
        starts_at_largest = sigmas[0] >= levels.largest * (1 - 1e-5)
        is_scaled = (simulation.scales_start and starts_at_largest) or sigmas[-1] > 0
        start = math.sqrt(1 + sigmas[0] ** 2) if is_scaled else sigmas[0]

        def denoised(latents: Tensor, sigma: float) -> Tensor:
            t = levels.timestep(sigma, whole=simulation.whole_timesteps)
            deviation = math.sqrt(sigma**2 + 1)  # standard deviation of the noisy latents
            scaled = latents / deviation
            output = denoise(scaled, torch.tensor(t, device=latents.device))
            if recipe.prediction == "v_prediction":
                return scaled / deviation - output * (sigma / deviation)
            return latents - output * sigma

        path = None
        if simulation.sampler in k_samplers.BROWNIAN:
            path = noise.path(shape, min(one for one in sigmas if one > 0), sigmas[0])

        def draw(sigma: float, following: float) -> Tensor:
            drawn = path.noise(sigma, following) if path else noise.step(shape)
            return drawn.to(model.device)

        return k_samplers.sample(simulation.sampler, denoised, initial * start, sigmas, draw)


def _token_ids(encoder: ClipEncoder, prompt: str) -> list[int]:
    return cast(
        list[int], encoder.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    )


def _with_strengths(model: LoadedModel, adapters: Pairs, simulation: Simulation) -> Pairs:
    """Return the adapters with the simulation's strengths for denoiser and text encoders."""
    encoders = {part.name for part in model.family.text_encoders}
    split: Pairs = []
    for bound, multiplier in adapters:
        if bound.word is not None:
            split.append((bound, multiplier))
            continue
        text = [name for name in bound.deltas if name.partition(".")[0] in encoders]
        rest = bound.deltas.keys() - set(text)
        # The order of dictionaries must not change, because it is the order of the merge.
        split.append((bound.only(rest), simulation.strength))
        if text:
            split.append((bound.only(set(text)), simulation.text_strength))
    return split
