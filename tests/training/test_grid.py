"""Grid sheets: their rows, columns and layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support import GOLDEN_JOBS

from fidelora.errors import TrainingRunError
from fidelora.training.grid import (
    MAX_IMAGES,
    Column,
    contact_sheet,
    iterate_cells,
    make_columns,
    make_rows,
)
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

RUN = read_run(GOLDEN_JOBS / "checkpoints_jpg")


def test_columns_are_checkpoints_by_multipliers_and_one_base_model():
    assert make_columns(RUN, [0, 4], [0.5, 1]) == [Column(0, None), Column(4, 0.5), Column(4, 1)]
    assert make_columns(RUN, [4, 4], [1, 1]) == [Column(4, 1)]
    with pytest.raises(
        TrainingRunError, match="no checkpoint of step 3; available steps: 2, 4, 6, 8, and 0"
    ):
        make_columns(RUN, [3], [1])
    with pytest.raises(TrainingRunError, match="no checkpoints"):
        make_columns(RUN, [], [1])


def test_rows_are_samples_or_prompts_with_the_settings_of_the_run():
    run = read_run(GOLDEN_JOBS / "lora_linear_f32")
    planned = [plan.recipe for plan in plan_samples(run, 0)]
    assert [row.recipe for row in make_rows(run, [])] == planned
    assert [row.recipe for row in make_rows(run, ["2", "0"])] == [planned[2], planned[0]]
    (own,) = make_rows(run, ["[trigger] cat --cfg 3"])
    assert (own.label, own.recipe.prompt) == ("sks cat", "sks cat")
    assert (own.recipe.guidance_scale, own.recipe.steps, own.recipe.seed) == (
        3,
        planned[0].steps,
        run.seed,
    )
    with pytest.raises(TrainingRunError, match=r"Sample 3 does not exist: .* has 3 samples"):
        make_rows(run, ["3"])


def test_every_cell_has_its_recipe():
    rows, columns = make_rows(RUN, ["0", "1"]), make_columns(RUN, [0, 8], [0.5, 1])
    found = {(down, across): recipe for down, across, recipe in iterate_cells(RUN, rows, columns)}
    assert set(found) == {(down, across) for down in range(2) for across in range(3)}
    assert found[0, 0].adapters == ()
    assert [found[1, across].adapters[0].multiplier for across in (1, 2)] == [0.5, 1]
    sample = plan_samples(RUN, 8)[1].recipe
    assert found[1, 2] == replace(sample, history=()), (
        "the cell differs from its sample, apart from earlier rounds"
    )
    with pytest.raises(TrainingRunError, match="choose fewer"):
        list(iterate_cells(RUN, rows, columns * MAX_IMAGES))


def test_the_sheet_shows_every_image_completely_and_in_position():
    rows, columns = make_rows(RUN, ["0", "1"]), make_columns(RUN, [0, 8], [0.5, 1])
    shapes = {0: (64, 72), 1: (48, 80)}
    colours = {
        (down, across): (255, 40 * (down * 3 + across + 1), 0)
        for down in (0, 1)
        for across in range(3)
    }
    images = {
        position: np.full((*shapes[position[0]], 3), colour, np.uint8)
        for position, colour in colours.items()
    }
    sheet = np.asarray(contact_sheet("title", rows, columns, images))
    for position, colour in colours.items():
        there = np.argwhere((sheet == colour).all(axis=2))
        (top, left), (bottom, right) = there.min(axis=0), there.max(axis=0) + 1
        assert len(there) == (bottom - top) * (right - left), position
        assert (bottom - top, right - left) == (
            shapes[position[0]][0] * 4,
            shapes[position[0]][1] * 4,
        ), "the image was not enlarged by the factor 4"
    dark = sheet.max(axis=2) < 30
    assert dark[:60].any(), "there are no column labels"
    assert dark[70:, :190].any(), "there are no row labels"
