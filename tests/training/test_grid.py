"""The contact sheet: which images it has, and where."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import DEMO_DATA, GOLDEN_JOBS

from fidelora.errors import JobFolderError
from fidelora.training.grid import MAX_IMAGES, Column, cells, columns_of, contact_sheet, rows_of
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

JOB = read_run(GOLDEN_JOBS / "checkpoints_jpg")


def test_columns_are_checkpoints_with_multipliers_and_the_base_once():
    assert columns_of(JOB, [0, 4], [0.5, 1]) == [Column(0, 0.0), Column(4, 0.5), Column(4, 1)]
    assert columns_of(JOB, [4, 4], [1, 1]) == [Column(4, 1)]
    with pytest.raises(
        JobFolderError, match="no checkpoint of step 3; there are: 2, 4, 6, 8, and 0"
    ):
        columns_of(JOB, [3], [1])
    with pytest.raises(JobFolderError, match="no checkpoint at all"):
        columns_of(JOB, [], [1])


def test_rows_are_samples_of_the_job_or_prompts_with_its_settings():
    job = read_run(DEMO_DATA / "lora_linear_f32")
    planned = [plan.recipe for plan in plan_samples(job, 0)]
    assert [row.recipe for row in rows_of(job, [])] == planned
    assert [row.recipe for row in rows_of(job, ["2", "0"])] == [planned[2], planned[0]]
    (own,) = rows_of(job, ["[trigger] cat --cfg 3"])
    assert (own.label, own.recipe.prompt) == ("sks cat", "sks cat")
    assert (own.recipe.guidance_scale, own.recipe.steps, own.recipe.seed) == (
        3,
        planned[0].steps,
        job.seed,
    )
    with pytest.raises(JobFolderError, match="has 3 samples, counted from 0: there is no sample 3"):
        rows_of(job, ["3"])


def test_every_cell_has_its_recipe():
    rows, columns = rows_of(JOB, ["0", "1"]), columns_of(JOB, [0, 8], [0.5, 1])
    found = {(down, across): recipe for down, across, recipe in cells(JOB, rows, columns)}
    assert set(found) == {(down, across) for down in range(2) for across in range(3)}
    assert found[0, 0].adapters == ()
    assert [found[1, across].adapters[0].multiplier for across in (1, 2)] == [0.5, 1]
    assert found[1, 2] == plan_samples(JOB, 8)[1].recipe, "the job's own preview"
    with pytest.raises(JobFolderError, match="choose fewer"):
        list(cells(JOB, rows, columns * MAX_IMAGES))


def test_the_sheet_shows_every_image_whole_and_in_its_place():
    rows, columns = rows_of(JOB, ["0", "1"]), columns_of(JOB, [0, 8], [0.5, 1])
    shapes = {0: (64, 72), 1: (48, 80)}
    colours = {
        (down, across): (255, 40 * (down * 3 + across + 1), 0)
        for down in (0, 1)
        for across in range(3)
    }
    images = {
        place: np.full((*shapes[place[0]], 3), colour, np.uint8)
        for place, colour in colours.items()
    }
    sheet = np.asarray(contact_sheet("title", rows, columns, images))
    for place, colour in colours.items():
        there = np.argwhere((sheet == colour).all(axis=2))
        (top, left), (bottom, right) = there.min(axis=0), there.max(axis=0) + 1
        assert len(there) == (bottom - top) * (right - left), place
        assert (bottom - top, right - left) == (shapes[place[0]][0] * 4, shapes[place[0]][1] * 4), (
            "enlarged whole-fold"
        )
    dark = sheet.max(axis=2) < 30
    assert dark[:60].any(), "labels of the columns"
    assert dark[70:, :190].any(), "labels of the rows"
