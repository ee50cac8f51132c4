"""Grid sheets: the same prompts and seeds with several checkpoints and multipliers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fidelora.errors import TrainingRunError
from fidelora.recipe import Recipe
from fidelora.training.plan import plan_samples, with_multiplier
from fidelora.training.run_folder import TrainingRun

MAX_IMAGES = 500
# Sizes in pixels:
_STRIP_FRAMES = 4  # frames of a video in one cell
_MIN_SIDE = 192  # smaller images are enlarged
_GAP = 6
_FONT_SIZE = 14
_LINE_HEIGHT = 18
_ROW_LABEL_WIDTH = 200
_ROW_LABEL_CHARACTERS = 26  # fit into _ROW_LABEL_WIDTH


@dataclass(frozen=True)
class Column:
    """A checkpoint with a multiplier; `multiplier` is None for base models, such as step 0."""

    step: int
    multiplier: float | None


@dataclass(frozen=True)
class Row:
    """A prompt, with its label and the recipe without adapters."""

    label: str
    recipe: Recipe


def make_columns(
    run: TrainingRun, steps: Sequence[int], multipliers: Sequence[float]
) -> list[Column]:
    """Return a column for each checkpoint with each multiplier, and one for each base model.

    Raises:
        TrainingRunError: a step has no checkpoint, `steps` is empty, or `multipliers` contains
            values other than 1 although the checkpoints are base models or embeddings.
    """
    missing = [step for step in steps if step != 0 and step not in run.checkpoints]
    if missing or not steps:
        available = ", ".join(map(str, sorted(run.checkpoints))) or "none"
        problem = f"no checkpoint of step {missing[0]}" if missing else "no checkpoints"
        raise TrainingRunError(
            f"The training run {run.name} has {problem}; "
            f"available steps: {available}, and 0 for the base model."
        )
    if run.full_models and set(multipliers) != {1}:
        raise TrainingRunError(
            f"The checkpoints of the training run {run.name} are base models, which have no "
            "multiplier; leave the multipliers out."
        )
    if not run.has_network and set(multipliers) != {1}:
        raise TrainingRunError(
            f"The training run {run.name} trains an embedding, which has no strength; set the "
            "multiplier to 1."
        )
    pairs = [
        Column(step, multiplier)
        for step in steps
        for multiplier in (multipliers if step and not run.full_models else [None])
    ]
    return list(dict.fromkeys(pairs))


def make_rows(
    run: TrainingRun, prompts: Sequence[str], *, base_model: str | None = None
) -> list[Row]:
    """Return a row for each prompt.

    Args:
        prompts: indices of samples of the run, or texts. A text may contain `[trigger]` and flags.
            It has the seed of the sample block; its other settings are those of the first sample.
            An empty list selects all samples.
        base_model: replaces the base model in the configuration.

    Raises:
        TrainingRunError: an index is out of range, or the run has no samples.
    """
    samples = list(run.samples)
    chosen = []
    for prompt in prompts or [str(index) for index in range(len(run.samples))]:
        if not prompt.isdigit():
            if not run.samples:
                raise TrainingRunError(
                    f"The training run {run.name} has no samples, so it has no settings for the "
                    f"prompt {prompt!r}."
                )
            samples.append(replace(run.samples[0], prompt=prompt, seed=run.seed))
            chosen.append(len(samples) - 1)
        elif int(prompt) < len(run.samples):
            chosen.append(int(prompt))
        else:
            raise TrainingRunError(
                f"Sample {prompt} does not exist: the training run {run.name} has "
                f"{len(run.samples)} samples, counted from 0. Use a smaller index."
            )
    if not chosen:
        raise TrainingRunError(
            f"The training run {run.name} has no sample prompts; set some with --prompts."
        )
    planned = plan_samples(replace(run, samples=tuple(samples)), 0, base_model=base_model)
    return [
        Row(planned[index].recipe.prompt or "(no prompt)", planned[index].recipe)
        for index in chosen
    ]


def iterate_cells(
    run: TrainingRun, rows: Sequence[Row], columns: Sequence[Column]
) -> Iterator[tuple[int, int, Recipe]]:
    """Yield row, column and recipe of each image.

    The order is column by column, so that each adapter is merged only once.

    Raises:
        TrainingRunError: the grid has more than `MAX_IMAGES` images.
    """
    if len(rows) * len(columns) > MAX_IMAGES:
        raise TrainingRunError(
            f"A grid of {len(rows)} x {len(columns)} images is more than {MAX_IMAGES}; "
            "choose fewer."
        )
    refs = {
        step: run.adapters(step)
        for step in {column.step for column in columns if column.multiplier is not None}
    }
    for across, column in enumerate(columns):
        for down, row in enumerate(rows):
            recipe = replace(row.recipe, adapter_mode="merged")
            if column.multiplier is not None:
                adapters = with_multiplier(refs[column.step], column.multiplier)
                recipe = replace(recipe, adapters=adapters)
            elif column.step:
                recipe = replace(recipe, base_model=str(run.checkpoints[column.step]), vae="")
            yield down, across, recipe


def contact_sheet(
    title: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    images: Mapping[tuple[int, int], NDArray[np.uint8]],
) -> Image.Image:
    """Return a sheet labelled with steps and multipliers at the top, prompts and seeds at the left.

    Args:
        images: uint8 RGB [height, width, 3] by row and column.
    """
    heads = []
    for across, column in enumerate(columns):
        new_step = across == 0 or columns[across - 1].step != column.step
        step = f"step {column.step}" if column.step else "base model"
        multiplier = "" if column.multiplier is None else f"multiplier {column.multiplier:g}"
        heads.append((step if new_step else "", multiplier))
    return labelled_sheet(
        title, [(row.label, f"seed {row.recipe.seed}") for row in rows], heads, images
    )


def frame_strip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return frames of a video side by side: the first, the last, and up to two between them.

    Args:
        pixels: uint8 RGB [frames, height, width, 3], or [height, width, 3] of a still image, which
            is returned unchanged.
    """
    if pixels.ndim == 3:
        return pixels
    count = min(_STRIP_FRAMES, len(pixels))
    chosen = np.linspace(0, len(pixels) - 1, count).round().astype(int)
    return np.concatenate(pixels[chosen], axis=1)


def labelled_sheet(
    title: str,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str]],
    images: Mapping[tuple[int, int], NDArray[np.uint8]],
) -> Image.Image:
    """Return a sheet of images with labelled rows and columns.

    Args:
        rows: label of each row, wrapped and truncated to the height of the row, and one more line
            below the label.
        columns: two lines of text above each column.
        images: uint8 RGB [height, width, 3] by row and column. Small images are enlarged by a
            whole factor.
    """
    font = ImageFont.load_default(_FONT_SIZE)
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
    lefts = [
        _ROW_LABEL_WIDTH + sum(widths[:across]) + _GAP * across for across in range(len(columns))
    ]
    head = 3 * _LINE_HEIGHT + 2 * _GAP
    tops = [head + sum(heights[:down]) + _GAP * down for down in range(len(rows))]
    sheet = Image.new(
        "RGB", (lefts[-1] + widths[-1] + _GAP, tops[-1] + heights[-1] + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill="black", font=font)
    for left, lines in zip(lefts, columns, strict=True):
        for number, line in enumerate(lines, start=1):
            draw.text((left, _GAP + number * _LINE_HEIGHT), line, fill="black", font=font)
    for down, (label, below) in enumerate(rows):
        max_lines = max(1, heights[down] // _LINE_HEIGHT - 1)
        label_lines = [*wrap(label, _ROW_LABEL_CHARACTERS)[:max_lines], below]
        draw.multiline_text(
            (_GAP, tops[down]),
            "\n".join(label_lines),
            fill="black",
            font=font,
            spacing=_LINE_HEIGHT - _FONT_SIZE,
        )
        for across in range(len(columns)):
            image = Image.fromarray(images[down, across])
            if factor > 1:
                image = image.resize(
                    (image.width * factor, image.height * factor), Image.Resampling.NEAREST
                )
            sheet.paste(image, (lefts[across], tops[down]))
    return sheet
