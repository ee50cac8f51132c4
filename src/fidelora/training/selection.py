"""Steps of a training run that can be checked, and the parts of its folder that cannot."""

from __future__ import annotations

from fidelora.errors import NothingToCheckError, TrainingRunError
from fidelora.training.folder_hints import checkpoint_advice, format_note, sample_advice
from fidelora.training.notes import (
    checkable_steps,
    has_only_random_seeds,
    has_only_undefined_samples,
    notes_on,
)
from fidelora.training.run_folder import TrainingRun


def steps_to_check(run: TrainingRun, selection: str) -> list[int]:
    """Return the selected steps that can be checked.

    Args:
        selection: a step, `last` or `all`.

    Raises:
        NothingToCheckError: the run has no samples, or none with a checkpoint.
        TrainingRunError: `selection` is invalid.
    """
    if not run.samples:
        raise NothingToCheckError(f"The training run {run.name} has no sample prompts.")
    if not run.sampled_steps:
        raise NothingToCheckError(
            f"{run.folder} has no samples (samples/*.jpg, .png or .webp), "
            f"so there is nothing to compare with.{sample_advice(run.folder)}"
        )
    checkable = checkable_steps(run)
    if has_only_random_seeds(run):
        raise NothingToCheckError(
            f"The training run {run.name} has random seeds (seed -1) for all samples, so none of "
            "them can be replayed."
        )
    if has_only_undefined_samples(run):
        raise NothingToCheckError(
            f"The training run {run.name} has only samples with 1 step, which are black in this "
            "model family, so none of them can be replayed."
        )
    if not checkable:
        sampled = ", ".join(map(str, run.sampled_steps))
        raise NothingToCheckError(
            f"The training run {run.name} has samples of steps {sampled}, "
            f"but no checkpoint of these steps.{_missing_files(run)}"
        )
    if selection == "all":
        return checkable
    if selection == "last":
        return checkable[-1:]
    if not selection.isdigit():
        raise TrainingRunError(f"{selection!r} is not a step; set a number, last or all.")
    if int(selection) not in checkable:
        available = ", ".join(map(str, checkable))
        raise NothingToCheckError(
            f"Step {selection} cannot be checked; steps with samples and weights: {available}."
        )
    return [int(selection)]


def _missing_files(run: TrainingRun) -> str:
    """Return advice on a run without the files that its samples need."""
    embedding = run.embedding
    if embedding is None or not embedding.has_lora:
        name = run.name if embedding is None else embedding.word
        return checkpoint_advice(run.folder, name, run.checkpoints.values())
    files = f"{embedding.word}*.safetensors, beside the configuration"
    found = (
        f"The files of the embedding ({files}) are only of steps "
        f"{', '.join(map(str, embedding.files))}"
        if embedding.files
        else f"The folder has no file of the embedding ({files})"
    )
    return (
        f" The run trains a LoRA and the embedding {embedding.word}, so a step needs the files of "
        f"both. {found}: restore the missing files."
    )


def incomplete_parts(run: TrainingRun) -> list[str]:
    """Return a sentence for each part of the run folder that cannot be checked."""
    sentences = [
        f"Step {step} has samples but no checkpoint."
        for step in run.sampled_steps
        if step != 0 and step not in run.checkpoints
    ]
    sentences += [
        f"Step {step} has a checkpoint but no samples."
        for step in run.checkpoints
        if step not in run.sampled_steps
    ]
    if extra := sorted({index for _, index in run.images if index >= len(run.samples)}):
        sentences.append(
            f"The folder has images of sample {', '.join(map(str, extra))}, "
            f"but the configuration has only {len(run.samples)} samples, counted from 0."
        )
    if note := format_note(run.images.values(), run.image_format):
        sentences.append(note)
    return [*notes_on(run), *sentences]
