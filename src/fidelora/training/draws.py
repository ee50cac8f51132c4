"""Draws: images of a sample with random values in place of lost information.

Three kinds of information can be lost:

* digits of the weights, if the adapter was saved in half precision, or if a full model was sampled
  in float32 and saved in half precision: each weight is drawn from the range of numbers that are
  rounded to the saved one;
* checkpoints of earlier rounds of samples: each is replaced by the nearest checkpoint, with each
  tensor scaled at random by up to 10 %. The drift of the base model is a sum of rounding errors, so
  weights of about the same size cause a different drift of about the same size;
* the rounding of half precision on the trainer's processor: the initial latents are changed by
  less than one unit in the last place, which replaces all later rounding errors by others. Measured
  on Intel Cascade Lake for ten samples that AMD Zen 4 made in bfloat16: the samples had mean
  differences of 0.20 to 1.35 levels. The draws of a sample (average of four) had mean differences
  0.80 to 1.27 times as large.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fidelora.engine.engine import Engine
from fidelora.recipe import AdapterRef, Recipe
from fidelora.training.plan import PlannedSample
from fidelora.training.rounding import (
    narrowest_dtype,
    perturbed_copy,
    perturbed_model,
    scaled_copy,
)
from fidelora.training.run_folder import TrainingRun


def lost_information(plan: PlannedSample) -> tuple[str, ...]:
    """Return what was lost for a sample, each as a clause for a sentence; empty if nothing was."""
    lost = []
    if dtype := saved_dtype(plan.recipe):
        lost.append(f"the adapter was saved as {dtype}, but the trainer sampled before rounding")
    if dtype := _saved_model_dtype(plan):
        lost.append(f"the model was saved as {dtype}, but the trainer sampled in float32")
    if plan.history.missing:
        steps = ", ".join(map(str, plan.history.missing))
        lost.append(
            f"the checkpoints of earlier rounds of samples (steps {steps}), which changed the "
            "base model, are missing"
        )
    if plan.recipe.dtype != "float32":
        lost.append(f"processors round {plan.recipe.dtype} in different ways")
    return tuple(lost)


class Draws:
    """Makes the draws of a run's samples.

    Args:
        folder: folder for the adapter files of the draws.
    """

    def __init__(self, run: TrainingRun, engine: Engine, folder: Path) -> None:
        self._run = run
        self._engine = engine
        self._folder = folder
        self._copies: dict[tuple[str, str, int], AdapterRef] = {}
        self._model: Path | None = None
        self._model_folder: Path | None = None

    @classmethod
    @contextmanager
    def of(cls, run: TrainingRun, engine: Engine) -> Iterator[Draws]:
        """Make draws with a temporary folder, which is removed at the end of the block."""
        with tempfile.TemporaryDirectory(prefix="fidelora-draws-") as folder:
            yield cls(run, engine, Path(folder))

    def recipe(self, plan: PlannedSample, number: int) -> Recipe:
        """Return the recipe of a draw; the same `number` gives the same random weights."""
        adapters = tuple(self._perturbed(ref, number) for ref in plan.recipe.adapters)
        refs = iter(plan.recipe.history)
        known = {step: [next(refs) for _ in self._run.files(step)] for step in plan.history.rounds}
        history: list[AdapterRef] = []
        for step in sorted((*known, *plan.history.missing)):
            if step in known:
                history += [self._perturbed(ref, number) for ref in known[step]]
            else:
                history += self._stand_ins(plan, step, number)
        base_model = self._base_model(plan, number)
        return replace(
            plan.recipe, adapters=adapters, history=tuple(history), base_model=base_model
        )

    def _base_model(self, plan: PlannedSample, number: int) -> str:
        """Return the base model; a full model that lost digits is perturbed.

        Only one copy is kept, because it can have several gigabytes.
        """
        if not _saved_model_dtype(plan):
            return plan.recipe.base_model
        folder = self._folder / f"model-{number}"
        if self._model_folder != folder:
            if self._model_folder is not None:
                shutil.rmtree(self._model_folder)
            folder.mkdir()
            self._model_folder = folder
            self._model = perturbed_model(Path(plan.recipe.base_model), folder, number)
        return str(self._model)

    def _perturbed(self, ref: AdapterRef, number: int) -> AdapterRef:
        if ref.path is None or ref.word is not None or narrowest_dtype(ref.path) == "F32":
            return ref
        return self._copied("perturbed", ref, number)

    def _stand_ins(self, plan: PlannedSample, step: int, number: int) -> list[AdapterRef]:
        """Return adapters in place of the missing ones of `step`."""
        # Only merged adapters change the base model, so the first adapter is not an embedding.
        nearest = min(self._run.checkpoints, key=lambda other: (abs(other - step), other))
        multiplier = plan.recipe.adapters[0].multiplier
        refs = [
            replace(AdapterRef.from_file(path), multiplier=multiplier, stage=stage)
            for path, stage in self._run.files(nearest)
        ]
        return [self._copied(f"scaled-{step}", ref, number) for ref in refs]

    def _copied(self, kind: str, ref: AdapterRef, number: int) -> AdapterRef:
        key = (kind, ref.sha256, number)
        if key not in self._copies:
            assert ref.path is not None
            folder = self._folder / f"{kind}-{ref.sha256[:16]}-{number}"
            folder.mkdir()
            make = perturbed_copy if kind == "perturbed" else scaled_copy
            self._copies[key] = AdapterRef.from_file(make(ref.path, folder, number))
        copy = self._copies[key]
        return replace(ref, sha256=copy.sha256, path=copy.path, file=copy.file)


def _saved_model_dtype(plan: PlannedSample) -> str:
    """Return the half-precision dtype of a full model that was sampled in float32, else ""."""
    if not plan.is_full_model or plan.recipe.dtype != "float32":
        return ""
    dtype = narrowest_dtype(Path(plan.recipe.base_model))
    return "" if dtype == "F32" else dtype


def saved_dtype(recipe: Recipe) -> str:
    """Return the half-precision dtype in which an adapter was saved; empty if none was."""
    # An embedding is saved in the dtype in which the trainer sampled, so its file is exact. So are
    # the files of `training_adapters`, which the trainer read.
    refs = (ref for ref in (*recipe.history, *recipe.adapters) if ref.path and ref.word is None)
    dtypes = (narrowest_dtype(ref.path) for ref in refs if ref.path)
    return next((dtype for dtype in dtypes if dtype != "F32"), "")
