"""Parts of a training run that can be checked, and sentences about those that cannot."""

from __future__ import annotations

from fidelora.adapters.tensor_names import trainer_version
from fidelora.families import get_family
from fidelora.training.plan import random_samples, undefined_samples
from fidelora.training.run_files import checkpoint_metadata
from fidelora.training.run_folder import TrainingRun


def notes_on(run: TrainingRun) -> list[str]:
    """Return a sentence for each setting of a run that its replay does not reproduce.

    Raises:
        TrainingRunError: a flag in a prompt is invalid.
        WeightsFileError: the last checkpoint is not a valid .safetensors file.
    """
    notes = [*run.notes, *_notes_on_older_quantization(run)]
    for one, block in ((run, "sample"), (run.first_round, "first_sample")):
        if one is None:
            continue
        if random := random_samples(one):
            notes.append(
                f"Sample {', '.join(map(str, random))} of the {block} block has a random seed "
                "(seed -1), which the trainer does not save, so it cannot be replayed."
            )
        if undefined := undefined_samples(one):
            notes.append(
                f"Sample {', '.join(map(str, undefined))} of the {block} block has 1 step, for "
                f"which the schedule of {get_family(run.model).title} is not defined: the "
                "trainer's image is black and cannot be replayed."
            )
    return notes


def _notes_on_older_quantization(run: TrainingRun) -> list[str]:
    """Return a sentence if the trainer's release quantised layers that the replay does not."""
    sampling = get_family(run.model).trainer_sampling
    since = sampling.whole_layers_since
    if since is None or run.quantization == "none" or not run.checkpoints:
        return []
    latest = run.checkpoints[max(run.checkpoints)]
    version = run.trainer_version or trainer_version(checkpoint_metadata(latest))
    if version is None or version >= since:
        return []
    return [
        f"AI Toolkit before {'.'.join(map(str, since))} also quantised the layers "
        f"{', '.join(get_family(run.model).part('denoiser').whole_layers)} of the transformer, "
        "and the replay does not, so the replayed samples differ."
    ]


def first_round_to_check(run: TrainingRun) -> TrainingRun | None:
    """Return the first round of samples if it has images that can be replayed."""
    first = run.first_round
    return first if first is not None and _has_images(first) else None


def checkable_steps(run: TrainingRun) -> list[int]:
    """Return the steps with weights and with at least one sample that can be replayed."""
    steps = {step for step in run.sampled_steps if step == 0 or step in run.checkpoints}
    checkable = {step for step in steps if _has_images(run, step)}
    if first_round_to_check(run) is not None:
        checkable.add(0)
    return sorted(checkable)


def has_only_random_seeds(run: TrainingRun) -> bool:
    """Return True if no sample of the run can be replayed because all seeds are random."""
    is_random = len(random_samples(run)) == len(run.samples)
    return is_random and (run.first_round is None or has_only_random_seeds(run.first_round))


def has_only_undefined_samples(run: TrainingRun) -> bool:
    """Return True if no sample of the run can be replayed because all schedules are undefined."""
    is_undefined = len(undefined_samples(run)) == len(run.samples)
    first = run.first_round
    return is_undefined and (first is None or has_only_undefined_samples(first))


def _has_images(run: TrainingRun, step: int | None = None) -> bool:
    """Return True if a replayable sample has an image at `step`, or at any step if None."""
    left_out = {*random_samples(run), *undefined_samples(run)}
    return any(
        index not in left_out for at_step, index in run.images if step is None or at_step == step
    )
