"""Measure how much one changed setting changes a sample: `python benchmarks/differences.py`.

Reproduces the samples of golden float32 training runs, first with the trainer's settings and then
with one setting as in other programs, and compares each with the trainer's file. Prints a Markdown
table with, over all samples, the smallest and largest percentage of identical pixels, the largest
difference of a channel, and the mean difference in levels of 255.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import GOLDEN_JOBS, TINY_BASE  # noqa: E402

from fidelora import AdapterRef, Engine, Recipe  # noqa: E402
from fidelora.training.compare import compare_with_sample  # noqa: E402
from fidelora.training.flags import split_flags  # noqa: E402
from fidelora.training.plan import PlannedSample, plan_samples  # noqa: E402
from fidelora.training.run_folder import TrainingRun, read_run  # noqa: E402

RUNS = [GOLDEN_JOBS / "lora_linear_f32", GOLDEN_JOBS / "lokr_full", GOLDEN_JOBS / "prompts"]


@dataclass(frozen=True)
class Change:
    """One setting with the value that another program uses."""

    name: str
    recipe: Callable[[TrainingRun, PlannedSample], Recipe]
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    threads: int = 2


def changed(**fields: Any) -> Callable[[TrainingRun, PlannedSample], Recipe]:
    return lambda _run, plan: replace(plan.recipe, **fields)


def half_precision(dtype: str) -> Callable[[TrainingRun, PlannedSample], Recipe]:
    return changed(dtype=dtype, vae_dtype=dtype, text_encoder_dtype=dtype)


def literal_trigger(run: TrainingRun, plan: PlannedSample) -> Recipe:
    return replace(plan.recipe, prompt=split_flags(run.samples[plan.index].prompt)[0])


def next_seed(_run: TrainingRun, plan: PlannedSample) -> Recipe:
    return replace(plan.recipe, seed=plan.recipe.seed + 1)


def multiplied(_run: TrainingRun, plan: PlannedSample) -> Recipe:
    (adapter,) = plan.recipe.adapters
    return replace(plan.recipe, adapters=(replace(adapter, multiplier=0.8),))


def saved_as(dtype: torch.dtype, folder: Path) -> Callable[[TrainingRun, PlannedSample], Recipe]:
    def rounded(_run: TrainingRun, plan: PlannedSample) -> Recipe:
        (adapter,) = plan.recipe.adapters
        assert adapter.path is not None
        path = folder / f"{dtype}-{adapter.path.name}"
        tensors = safetensors.torch.load(adapter.path.read_bytes())
        safetensors.torch.save_file(
            {key: tensor.to(dtype) for key, tensor in tensors.items()}, path
        )
        return replace(plan.recipe, adapters=(AdapterRef.from_file(path, adapter.multiplier),))

    return rounded


def changes(folder: Path) -> Iterator[Change]:
    yield Change("nothing", changed())
    yield Change("one thread in place of two", changed(), threads=1)
    yield Change("LoRA live instead of merged", changed(adapter_mode="live"))
    yield Change("LoRA saved in fp16", saved_as(torch.float16, folder))
    yield Change("LoRA saved in bf16", saved_as(torch.bfloat16, folder))
    yield Change("`steps_offset` 0", changed(), {"steps_offset": 0})
    yield Change("model in bfloat16", half_precision("bfloat16"))
    yield Change("multiplier 0.8", multiplied)
    yield Change("LoRA not applied", changed(adapters=()))
    yield Change("`[trigger]` left as it is written", literal_trigger)
    yield Change("guidance 7.5", changed(guidance_scale=7.5))
    yield Change("20 steps", changed(steps=20))
    yield Change("sampler `pndm`", changed(sampler="pndm"))
    yield Change("sampler `euler`", changed(sampler="euler"))
    yield Change("sampler `k_dpmsolver++`", changed(sampler="k_dpmsolver++"))
    yield Change("seed + 1", next_seed)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def main() -> None:
    engine = Engine(device="cpu")
    print(
        "| changed | identical pixels, % | largest difference | mean difference |\n"
        "|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for change in changes(Path(folder)):
            found = []
            with threads(change.threads):
                for run in map(read_run, RUNS):
                    for plan in plan_samples(run, run.steps, base_model=str(TINY_BASE)):
                        assert plan.trainer_image is not None
                        image = engine.generate(
                            change.recipe(run, plan), scheduler_options=change.scheduler_options
                        )
                        found.append(compare_with_sample(image.pixels, plan.trainer_image))
            same = [one.identical_percent for one in found]
            span = (
                f"{min(same):.2f} - {max(same):.2f}" if min(same) < max(same) else f"{same[0]:.2f}"
            )
            mean = sum(one.mean_difference for one in found) / len(found)
            print(
                f"| {change.name} | {span} "
                f"| {max(one.max_difference for one in found)} | {mean:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
