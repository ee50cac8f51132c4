"""`fidelora grid`: sheets of checkpoints and multipliers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tests.cli.training_support import BASE, RUN, SDXL_BASE
from tests.support import GOLDEN_JOBS, SDXL_DORA

from fidelora import Engine

pytestmark = pytest.mark.usefixtures("golden_threads")


def test_grid_writes_a_sheet(fidelora, tmp_path):
    code, out, err = fidelora(
        "grid",
        str(GOLDEN_JOBS / "checkpoints_jpg"),
        "--steps",
        "0,last",
        "--multipliers",
        "0,1",
        "--prompts",
        "1",
        "--prompts",
        "[trigger] cat, asleep --steps 2",
        "--out",
        "sheets/grid.png",
        *BASE,
    )
    assert (code, out, err) == (0, "sheets/grid.png\n", "")
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "grid.png"))
    side, gap, left, head = 80 * 3, 6, 200, 3 * 18 + 2 * 6
    base, zero = (sheet[head : head + 64 * 3, left + n * (side + gap) :][:, :side] for n in (0, 1))
    full = sheet[head : head + 64 * 3, left + 2 * (side + gap) :][:, :side]
    assert np.array_equal(base, zero), "multiplier 0 gives another image than the base model"
    assert not np.array_equal(base, full)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "5"), "no checkpoint of step 5"),
        (("--steps", "some"), "'some', which is not a step"),
        (("--steps", ","), "--steps is empty"),
        (("--multipliers", "one"), "set numbers separated by commas"),
        (("--multipliers", "6"), "multiplier"),
        (("--prompts", "7"), "Sample 7 does not exist"),
        (("--out", "grid.bmp"), "bmp"),
    ],
)
def test_invalid_grids_exit_with_2(fidelora, tmp_path, options, words):
    code, out, err = fidelora("grid", str(RUN), *BASE, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []


SMALL_GRID = ("--steps", "0", "--prompts", "0", *BASE)


def test_grid_replaces_only_a_file_that_was_named(fidelora, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"mine")
    folder = tmp_path / "sheets"
    folder.mkdir()
    (folder / "grid.png").write_bytes(b"mine")
    run = str(GOLDEN_JOBS / "checkpoints_jpg")
    assert fidelora("grid", run, *SMALL_GRID)[:2] == (0, "grid_2.png\n")
    assert fidelora("grid", run, *SMALL_GRID, "-o", "sheets")[:2] == (0, "sheets/grid_2.png\n")
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
    assert (folder / "grid.png").read_bytes() == b"mine"
    assert fidelora("grid", run, *SMALL_GRID, "-o", "grid.png")[:2] == (0, "grid.png\n")
    assert (tmp_path / "grid.png").read_bytes() != b"mine"


def test_an_interrupted_grid_leaves_no_empty_folders(fidelora, tmp_path, monkeypatch):
    def interrupt(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", interrupt)
    out = "new/sheets/grid.png"
    code, _, err = fidelora(
        "grid", str(GOLDEN_JOBS / "checkpoints_jpg"), *SMALL_GRID, "--device", "cpu", "-o", out
    )
    assert (code, err) == (130, "error: Interrupted; no grid was written.\n")
    assert list(tmp_path.iterdir()) == []


def test_grid_supports_doras(fidelora, tmp_path):
    code, _, _ = fidelora(
        "grid",
        str(SDXL_DORA.parent),
        *SDXL_BASE,
        "--steps",
        "0,last",
        "--multipliers",
        "0.5",
        "--prompts",
        "0",
        "--out",
        "g.png",
    )
    assert code == 0
    assert Image.open(tmp_path / "g.png").format == "PNG"
