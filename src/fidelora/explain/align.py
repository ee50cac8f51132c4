"""Find the sample of a training run that a picture of another program was meant to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from PIL import Image

from fidelora.errors import NothingToCheckError
from fidelora.explain.reading import Reading, UsedLora, UsedModel, stem
from fidelora.loras.hashes import has_hash
from fidelora.recipe import AdapterRef, file_sha256
from fidelora.training.judge import Pixels
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import TrainingRun
from fidelora.training.verify import read_trainer_image

_MIN_SIMILARITY = 0.6  # of two prompts; below it, the pictures are compared instead
_SEED_BONUS = 0.2  # decides between samples with similar prompts
_SIDE = 32  # pixels; images are compared at this size
_SHORTEST_HASH = 8  # digits; shorter prefixes could match by chance


@dataclass(frozen=True)
class Alignment:
    """A sample of a training run, chosen for a picture.

    Attributes:
        plan: the sample.
        lora: the LoRA in the picture that comes from the training run; None if there is none.
        reason: how the sample was chosen, as a phrase.
    """

    plan: PlannedSample
    lora: UsedLora | None
    reason: str


def align(
    run: TrainingRun,
    reading: Reading,
    pixels: Pixels,
    *,
    step: int | None = None,
    index: int | None = None,
    base_model: str | None = None,
) -> Alignment:
    """Return the sample that a picture was meant to be.

    The step is that of the picture's LoRA, or the last one. The sample is the one with the most
    similar prompt and the same seed. If the picture contains no prompt, or one that is not similar
    to any, the most similar sample is chosen, of the same size if there is one.

    Args:
        step, index: chosen by the user; None to find them.

    Raises:
        NothingToCheckError: the training run has no such sample, or its file is missing.
    """
    found_step, lora = _used_checkpoint(run, reading)
    if step is None:
        steps = [one for one in run.sampled_steps if one == 0 or one in run.checkpoints]
        step = found_step if found_step in steps else max(steps, default=None)
    plans = [] if step is None else _plans(run, step, base_model)
    if index is not None:
        plans = [plan for plan in plans if plan.index == index]
    if not plans:
        raise NothingToCheckError(
            f"The training run {run.name} has no sample to compare with"
            + (f" at step {step}" if step is not None else "")
            + (f" with the index {index}" if index is not None else "")
            + "; set --step and --index to a sample whose file and checkpoint exist."
        )
    if index is not None:
        return Alignment(plans[0], lora, "chosen by --index")
    if reading.prompt:
        scores = [_score(run, plan, reading) for plan in plans]
        best = max(range(len(plans)), key=lambda number: scores[number])
        if scores[best] >= _MIN_SIMILARITY:
            return Alignment(plans[best], lora, "it has the most similar prompt")
    size = pixels.shape[1], pixels.shape[0]
    same_size = [plan for plan in plans if (plan.recipe.width, plan.recipe.height) == size]
    nearest = min(same_size or plans, key=lambda plan: _distance(plan, pixels))
    return Alignment(nearest, lora, "it looks most similar")


def _plans(run: TrainingRun, step: int, base_model: str | None) -> list[PlannedSample]:
    planned = plan_samples(run, step, base_model=base_model)
    found = [plan for plan in planned if plan.trainer_image is not None]
    stills = [plan for plan in found if plan.recipe.frames == 1]
    if found and not stills:
        raise NothingToCheckError(
            f"The samples of the training run {run.name} are videos, but a picture can be compared "
            "with still images only (num_frames: 1)."
        )
    return stills


def _used_checkpoint(run: TrainingRun, reading: Reading) -> tuple[int | None, UsedLora | None]:
    """Return step and LoRA of a reading that belong to a checkpoint of the run."""
    if run.full_models:
        return None, None
    loras: Sequence[UsedLora] = reading.loras or ()
    for lora in loras:
        for step, path in run.checkpoints.items():
            if stem(path.name).lower() == lora.name.lower():
                return step, lora
    for lora in loras:
        if len(lora.hash) >= _SHORTEST_HASH:
            for step, path in run.checkpoints.items():
                if has_hash(path, AdapterRef.from_file(path).sha256, lora.hash):
                    return step, lora
    for lora in loras:
        if _plain(run.name) in _plain(lora.name):
            return None, replace(lora)
    return None, None


def _score(run: TrainingRun, plan: PlannedSample, reading: Reading) -> float:
    """Return the similarity of the prompts, 0..1, plus a bonus for the same seed."""
    own = run.samples[plan.index].prompt.split("--")[0]
    versions = (plan.recipe.prompt, own, own.replace("[trigger]", ""))
    wanted = _plain(reading.prompt or "")
    similarity = max(SequenceMatcher(None, _plain(text), wanted).ratio() for text in versions)
    return similarity + _SEED_BONUS * (reading.seed == plan.recipe.seed)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _distance(plan: PlannedSample, pixels: Pixels) -> float:
    assert plan.trainer_image is not None
    trainer = read_trainer_image(plan.trainer_image)[0]
    small = [
        np.asarray(Image.fromarray(one).resize((_SIDE, _SIDE)), np.float32)
        for one in (trainer, pixels)
    ]
    return float(np.abs(small[0] - small[1]).mean())


def same_file(used: UsedModel, own: str) -> bool | None:
    """Return True if the file `own` has the hash of `used`, False if not, None if unknown."""
    path = Path(own)
    if not used.hash or not own or not path.is_file():
        return None
    return file_sha256(path).startswith(used.hash.lower())
