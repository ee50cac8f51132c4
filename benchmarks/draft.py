"""Approximations that skip work in part of the steps, compared with fewer steps.

    python -m benchmarks.draft pictures [--prompts 48]   # the miniature
    python -m benchmarks.draft steps [--size 256]        # full-size UNet with random weights
    python -m benchmarks.draft arithmetic [--size 256]   # speedups from counted multiplications

`pictures` prints, for each approximation, the PSNR to the image without it, and the fractions of
pictures in which the judge of the miniature finds the right shapes, colours and background.
`steps` prints the time of each kind of step in `fast`, and from it the time of the 25 steps of each
approximation, relative to `fast`. The text encoder and the decoder are not approximated, so a whole
image gains less. `arithmetic` counts the multiplications of matrix products instead.

Three approximations are combined:

* Guidance in the first steps only: the other steps do not evaluate the negative prompt
  (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
* Deep features: only every n-th step evaluates the whole UNet. The other steps evaluate the blocks
  of the highest resolution, and use the deeper features of the last whole evaluation (Ma et al.,
  "DeepCache", 2023).
* Cross-attention: after the guided steps, its outputs stay those of the last guided step, averaged
  over both prompts (Zhang et al., "T-GATE", 2024).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS, GUIDANCE, SEED = 25, 6.0, 2026


@dataclass(frozen=True)
class Approximation:
    """Work that is skipped.

    Attributes:
        steps: number of steps.
        guided: fraction of the steps with guidance, the first ones.
        every: the whole UNet is evaluated in every n-th step.
        gates: True if cross-attention is kept after the guided steps.
    """

    steps: int = STEPS
    guided: float = 1.0
    every: int = 1
    gates: bool = False

    def __str__(self) -> str:
        parts = [f"{self.steps} steps"]
        if self.guided < 1:
            parts.append(f"guidance in {self.guided:.0%} of them")
        if self.every > 1:
            parts.append(f"deep features every {self.every}")
        if self.gates:
            parts.append("kept cross-attention")
        return ", ".join(parts)

    def kind(self, step: int) -> tuple[bool, bool, bool]:
        """Return three flags of a step (from 0): has guidance, is whole, keeps cross-attention."""
        guided = step < round(self.guided * self.steps)
        return guided, step % self.every == 0, self.gates and not guided


APPROXIMATIONS = (
    Approximation(),
    Approximation(guided=0.6),
    Approximation(guided=0.4),
    Approximation(guided=0.4, gates=True),
    Approximation(every=2),
    Approximation(every=3),
    Approximation(guided=0.6, every=2),
    Approximation(guided=0.4, every=2),
    Approximation(steps=16),
    Approximation(steps=12),
)


class Shortcuts:
    """Replaces the forward functions of a UNet's blocks, so that evaluations can be partial.

    `whole`, `keeps_attention` and `averages_attention` select what the next evaluation does.
    """

    def __init__(self, unet: Any) -> None:
        self.whole, self.keeps_attention, self.averages_attention = True, False, False
        self._deep: Tensor = torch.empty(0)
        for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
            self._make_skippable(block, is_down=block in unet.down_blocks)
        last = unet.up_blocks[-1]
        forward = last.forward

        def with_deep_features(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            if self.whole:
                self._deep = hidden_states
            else:
                hidden_states = self._deep[-len(hidden_states) :]  # the prompts are the last rows
            return forward(hidden_states, *args, **options)

        last.forward = with_deep_features
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                self._make_keeping(module)

    def _make_skippable(self, block: Any, *, is_down: bool) -> None:
        forward = block.forward
        outputs = (None,) * (len(block.resnets) + bool(is_down and block.downsamplers))

        def skippable(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            if self.whole:
                return forward(hidden_states, *args, **options)
            return (hidden_states, outputs) if is_down else hidden_states

        block.forward = skippable

    def _make_keeping(self, attention: Any) -> None:
        forward = attention.forward
        kept: list[Tensor] = []

        def keeping(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            if self.keeps_attention and kept:
                return kept[0]
            output = forward(hidden_states, *args, **options)
            if self.averages_attention:
                negative, positive = output.chunk(2)
                kept[:] = [(negative + positive) / 2]
            return output

        attention.forward = keeping


class ApproximateDenoiser:
    """A denoiser (`families.protocols.Denoiser`) that computes an approximation."""

    def __init__(self, denoiser: Any, shortcuts: Shortcuts, plan: Approximation) -> None:
        self._denoiser, self._shortcuts, self._plan = denoiser, shortcuts, plan
        self.uses_negative = denoiser.uses_negative

    def prepare(self, encoded: Any, guidance: Any, size: Any, dtype: torch.dtype) -> Any:
        guided, plain = (
            self._denoiser.prepare(encoded, guidance._replace(scale=scale), size, dtype)
            for scale in (guidance.scale, 1.0)
        )
        steps = iter(range(self._plan.steps))

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            has_guidance, whole, keeps = self._plan.kind(next(steps))
            shortcuts = self._shortcuts
            shortcuts.whole, shortcuts.keeps_attention = whole, keeps
            shortcuts.averages_attention = self._plan.gates and has_guidance
            prediction: Tensor = (guided if has_guidance else plain)(latents, t)
            return prediction

        return denoise


@contextmanager
def approximated(engine: Any, recipe: Any) -> Iterator[Callable[[Approximation], None]]:
    """Yield a function that sets the approximation of the base model of `recipe`."""
    engine.load(recipe)
    with engine.model_for(recipe) as (model, _):
        pass
    original = model.denoiser
    shortcuts = Shortcuts(original._unet)

    def select(plan: Approximation) -> None:
        model.denoiser = ApproximateDenoiser(original, shortcuts, plan)

    yield select


def pictures(count: int, sampler: str, chosen: Sequence[Approximation]) -> None:
    """Print each approximation's PSNR and fractions of right pictures (miniature, `exact`)."""
    import numpy as np
    from tools.miniature import judge, train_lora, world
    from tools.miniature.train_unet import held_out_scenes

    from fidelora import Engine, Recipe
    from fidelora.training.compare import similarity

    engine = Engine(device="cpu")
    base = Recipe(
        prompt="",
        base_model="fidelora:miniature",
        width=world.SIZE,
        height=world.SIZE,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        sampler=sampler,
    )
    rng = np.random.default_rng(SEED)
    scenes = held_out_scenes(count, SEED)
    captions = [train_lora.caption(scene, rng) for scene in scenes]
    plain: list[Any] = []
    print(f"{count} pictures, {sampler}, guidance {GUIDANCE}")
    with approximated(engine, base) as select:
        for plan in chosen:
            select(plan)
            made = [
                engine.generate(replace(base, prompt=text, seed=seed, steps=plan.steps)).pixels
                for seed, text in enumerate(captions)
            ]
            plain = plain or made
            found = [judge.score(*pair) for pair in zip(made, scenes, strict=True)]
            right = " ".join(
                f"{name} {sum(getattr(one, name) for one in found) / count:4.0%}"
                for name in ("shape", "colour", "background")
            )
            values = [similarity(*pair)[0] for pair in zip(made, plain, strict=True)]
            psnr = [value for value in values if value is not None] or [float("inf")]
            figures = f"PSNR {min(psnr):4.1f} min {statistics.median(psnr):4.1f} median; "
            print(f"{plan!s:62} {figures if plan != chosen[0] else ''}{right}", flush=True)


def steps(size: int, rounds: int, folder: Path) -> None:
    """Print the time of each kind of step in `fast`, and of the steps of each approximation."""
    from benchmarks import full_size

    from fidelora import Recipe
    from fidelora.cli.console import make_engine
    from fidelora.engine.inputs import denoiser_settings

    engine = make_engine("cpu")
    recipe = Recipe(
        prompt="a photo of a cat",
        base_model=str(full_size.base(folder)),
        width=size,
        height=size,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        fidelity="fast",
    )
    kinds = sorted({plan.kind(step) for plan in APPROXIMATIONS for step in range(plan.steps)})
    seconds: dict[tuple[bool, bool, bool], list[float]] = {kind: [] for kind in kinds}
    with approximated(engine, recipe), engine.model_for(recipe) as (model, _):
        shortcuts = Shortcuts(model.parts["unet"])
        guidance, shape, dtype = denoiser_settings(recipe)
        encoded = [model.text.blank(shape, negative=True)]
        guided, plain = (
            model.denoiser.prepare(encoded, guidance._replace(scale=scale), shape, dtype)
            for scale in (guidance.scale, 1.0)
        )
        latents, t = torch.randn(model.latents.shape(shape)), torch.tensor(500)
        shortcuts.averages_attention = True
        guided(latents, t)
        for _ in range(rounds):
            for kind in kinds:
                has_guidance, shortcuts.whole, shortcuts.keeps_attention = kind
                shortcuts.averages_attention = has_guidance
                start = time.perf_counter()
                (guided if has_guidance else plain)(latents, t)
                seconds[kind].append(time.perf_counter() - start)
    print(f"size {size}, {rounds} rounds; with guidance, whole, keeps cross-attention: seconds")
    for kind, times in seconds.items():
        print(f"  {kind!s:24} {statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})")
    for plan in APPROXIMATIONS:
        ratios = [
            sum(seconds[Approximation().kind(0)][turn] for _ in range(STEPS))
            / sum(seconds[plan.kind(step)][turn] for step in range(plan.steps))
            for turn in range(rounds)
        ]
        print(
            f"{plan!s:62} {statistics.median(ratios):.2f} x ({min(ratios):.2f}-{max(ratios):.2f})"
        )


def arithmetic(size: int) -> None:
    """Print how many times fewer multiplications each approximation of 25 steps needs."""
    from torch.utils.flop_counter import FlopCounterMode

    from fidelora.families import get_family
    from fidelora.weights.configs import read_config
    from fidelora.weights.strict import empty_part

    family = get_family("sd15")
    config = read_config(family.layout / "unet" / "config.json")
    unet = empty_part(family.part("denoiser"), config).to("meta")
    shortcuts = Shortcuts(unet)
    counts: dict[tuple[bool, bool, bool], int] = {}
    for kind in sorted({plan.kind(step) for plan in APPROXIMATIONS for step in range(plan.steps)}):
        has_guidance, whole, keeps = kind
        for counted in (False, True):  # the second evaluation reuses what the first one computed
            shortcuts.whole, shortcuts.keeps_attention = whole or not counted, keeps and counted
            shortcuts.averages_attention = not counted
            rows = 2 if has_guidance or not counted else 1
            latents = torch.empty(rows, 4, size // 8, size // 8, device="meta")
            text = torch.empty(rows, 77, config["cross_attention_dim"], device="meta")
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(latents, torch.tensor(500), encoder_hidden_states=text)
        counts[kind] = counter.get_total_flops()
    plain = STEPS * counts[Approximation().kind(0)]
    for plan in APPROXIMATIONS:
        ratio = plain / sum(counts[plan.kind(step)] for step in range(plan.steps))
        print(f"{plan!s:62} {ratio:.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    some = commands.add_parser("pictures")
    some.add_argument("--prompts", type=int, default=48)
    some.add_argument("--sampler", default="ddpm")
    some.add_argument("--only", type=int, nargs="+", help="numbers of approximations, from 0")
    timed = commands.add_parser("steps")
    timed.add_argument("--size", type=int, default=256)
    timed.add_argument("--rounds", type=int, default=5)
    timed.add_argument("--folder", type=Path)
    counted = commands.add_parser("arithmetic")
    counted.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    if options.command == "pictures":
        chosen = [APPROXIMATIONS[index] for index in {0: 0} | dict.fromkeys(options.only or [])]
        pictures(options.prompts, options.sampler, chosen if options.only else APPROXIMATIONS)
    elif options.command == "arithmetic":
        arithmetic(options.size)
    else:
        from benchmarks import full_size

        steps(options.size, options.rounds, options.folder or full_size.default_folder())


if __name__ == "__main__":
    main()
