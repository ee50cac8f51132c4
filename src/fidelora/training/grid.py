"""A contact sheet: the same prompts and seeds with several checkpoints of a job and several multipliers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fidelora.errors import JobFolderError
from fidelora.recipe import Recipe
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import TrainingRun

MAX_IMAGES = 500
_MIN_SIDE = 192
_GAP = 6
_TEXT = 14
_LINE = 18
_ROW_LABEL = 200
_CHARACTERS = 26
"""Of a line of a row's label, which fit into its width."""


@dataclass(frozen=True)
class Column:
    """One checkpoint with one multiplier; step 0 is the base model alone, whose multiplier means nothing."""

    step: int
    multiplier: float


@dataclass(frozen=True)
class Row:
    """One prompt, with what it takes from the sample block."""

    label: str
    recipe: Recipe


def columns_of(
    job: TrainingRun, steps: Sequence[int], multipliers: Sequence[float]
) -> list[Column]:
    """Every checkpoint with every multiplier; the base model once.

    Raises:
        JobFolderError: there are no weights of a step.
    """
    missing = [step for step in steps if step != 0 and step not in job.checkpoints]
    if missing or not steps:
        there_are = ", ".join(map(str, sorted(job.checkpoints))) or "none"
        said = f"no checkpoint of step {missing[0]}" if missing else "no checkpoint at all"
        raise JobFolderError(
            f"The job {job.name} has {said}; there are: {there_are}, and 0, the base model."
        )
    pairs = [
        Column(step, multiplier)
        for step in steps
        for multiplier in (multipliers if step else [0.0])
    ]
    return list(dict.fromkeys(pairs))


def rows_of(
    job: TrainingRun, prompts: Sequence[str], *, base_model: str | None = None
) -> list[Row]:
    """The rows that `prompts` mean.

    Args:
        prompts: numbers of samples of the job, or texts, which may have `[trigger]` and flags and take everything else from the
            job's sample block; empty for all samples of the job.

    Raises:
        JobFolderError: no such sample, or none at all.
    """
    samples = list(job.samples)
    chosen = []
    for prompt in prompts or [str(index) for index in range(len(job.samples))]:
        if not prompt.isdigit():
            if not job.samples:
                raise JobFolderError(
                    f"The job {job.name} has no samples whose settings a prompt could take."
                )
            samples.append(replace(job.samples[0], prompt=prompt, seed=job.seed))
            chosen.append(len(samples) - 1)
        elif int(prompt) < len(job.samples):
            chosen.append(int(prompt))
        else:
            raise JobFolderError(
                f"The job {job.name} has {len(job.samples)} samples, counted from 0: there is no sample {prompt}."
            )
    if not chosen:
        raise JobFolderError(f"The job {job.name} has no sample prompts; give some with --prompts.")
    planned = plan_samples(replace(job, samples=tuple(samples)), 0, base_model=base_model)
    return [
        Row(f"{planned[index].recipe.prompt or '(no prompt)'}", planned[index].recipe)
        for index in chosen
    ]


def cells(
    job: TrainingRun, rows: Sequence[Row], columns: Sequence[Column]
) -> Iterator[tuple[int, int, Recipe]]:
    """Row, column and recipe of every image, column by column, so that an adapter is merged once."""
    if len(rows) * len(columns) > MAX_IMAGES:
        raise JobFolderError(
            f"A grid of {len(rows)} x {len(columns)} images is more than {MAX_IMAGES}; choose fewer."
        )
    refs = {step: job.adapter(step) for step in {column.step for column in columns} if step}
    for across, column in enumerate(columns):
        for down, row in enumerate(rows):
            adapters = (
                (replace(refs[column.step], multiplier=column.multiplier),) if column.step else ()
            )
            yield down, across, replace(row.recipe, adapters=adapters, adapter_mode="merged")


def contact_sheet(
    title: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    images: Mapping[tuple[int, int], NDArray[np.uint8]],
) -> Image.Image:
    """The images with their axes: steps and multipliers on top, prompts and seeds on the left; small images whole-fold larger."""
    heads = []
    for across, column in enumerate(columns):
        new = across == 0 or columns[across - 1].step != column.step
        step = f"step {column.step}" if column.step else "base model"
        heads.append(
            (step if new else "", f"multiplier {column.multiplier:g}" if column.step else "")
        )
    return labelled_sheet(
        title, [(row.label, f"seed {row.recipe.seed}") for row in rows], heads, images
    )


def labelled_sheet(
    title: str,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str]],
    images: Mapping[tuple[int, int], NDArray[np.uint8]],
) -> Image.Image:
    """One image of many.

    Args:
        rows: what stands on the left of each: a text that is cut to the space there is, and a line below it.
        columns: the two lines above each.
        images: by row and column, uint8 RGB [height, width, 3]; small ones are enlarged whole-fold.
    """
    font = ImageFont.load_default(_TEXT)
    smallest = min(min(pixels.shape[:2]) for pixels in images.values())
    factor = max(1, -(-_MIN_SIDE // smallest))
    heights = [
        max(images[down, across].shape[0] for across in range(len(columns))) * factor
        for down in range(len(rows))
    ]
    widths = [
        max(images[down, across].shape[1] for down in range(len(rows))) * factor
        for across in range(len(columns))
    ]
    lefts = [_ROW_LABEL + sum(widths[:across]) + _GAP * across for across in range(len(columns))]
    head = 3 * _LINE + 2 * _GAP
    tops = [head + sum(heights[:down]) + _GAP * down for down in range(len(rows))]
    sheet = Image.new(
        "RGB", (lefts[-1] + widths[-1] + _GAP, tops[-1] + heights[-1] + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill="black", font=font)
    for left, lines in zip(lefts, columns, strict=True):
        for number, line in enumerate(lines, start=1):
            draw.text((left, _GAP + number * _LINE), line, fill="black", font=font)
    for down, (label, below) in enumerate(rows):
        label_lines = [*wrap(label, _CHARACTERS)[: max(1, heights[down] // _LINE - 1)], below]
        draw.multiline_text(
            (_GAP, tops[down]),
            "\n".join(label_lines),
            fill="black",
            font=font,
            spacing=_LINE - _TEXT,
        )
        for across in range(len(columns)):
            picture = Image.fromarray(images[down, across])
            if factor > 1:
                picture = picture.resize(
                    (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
                )
            sheet.paste(picture, (lefts[across], tops[down]))
    return sheet
