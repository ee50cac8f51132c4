"""Output folders as people hand them on: renamed, converted, incomplete, or the folder above."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tests.support import GOLDEN_JOBS

from fidelora.errors import NothingToCheckError, TrainingRunError
from fidelora.training.run_folder import read_run
from fidelora.training.selection import incomplete_parts, steps_to_check

NAME = "lora_linear_f32"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN_JOBS / NAME, tmp_path / NAME))


def config_of(folder: Path) -> Path:
    return folder / "config.yaml"


def problem(folder: Path) -> str:
    with pytest.raises((TrainingRunError, NothingToCheckError)) as raised:
        steps_to_check(read_run(folder), "all")
    return str(raised.value)


@pytest.mark.parametrize(
    "name", ["config.yml", "CONFIG.YAML", f"{NAME}.yaml", "config.yaml.txt", "my lora.yml"]
)
def test_one_configuration_of_another_name_is_used_and_named(folder, name):
    config_of(folder).rename(folder / name)
    run = read_run(folder)
    assert steps_to_check(run, "all") == [6]
    assert run.notes == (
        f"The folder has no config.yaml, so the configuration is read from {name}.",
    )


@pytest.mark.parametrize("name", ["config.json", "job_config.json"])
def test_a_configuration_in_json_is_read(folder, name):
    document = yaml.safe_load(config_of(folder).read_text())
    config_of(folder).unlink()
    (folder / name).write_text(json.dumps(document))
    assert steps_to_check(read_run(folder), "all") == [6]


def test_several_configurations_of_other_names_are_refused(folder):
    shutil.copy(config_of(folder), folder / "a.yaml")
    config_of(folder).rename(folder / "b.yaml")
    assert "several other configurations (a.yaml, b.yaml); rename the one" in problem(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_configuration_with_a_byte_order_mark_is_read(folder, encoding):
    text = config_of(folder).read_text()
    config_of(folder).write_text(text, encoding=encoding)
    assert steps_to_check(read_run(folder), "all") == [6]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "latin-1"])
def test_a_configuration_in_another_encoding_is_refused(folder, encoding):
    text = config_of(folder).read_text().replace("oil painting", "öl")
    config_of(folder).write_bytes(text.encode(encoding))
    assert "it is not UTF-8 text" in problem(folder)
    assert "save it as UTF-8" in problem(folder)


def test_the_backslashes_of_windows_are_explained(folder):
    text = config_of(folder).read_text()
    plain = text.replace("training_folder: output", r"training_folder: C:\Users\me\output")
    config_of(folder).write_text(plain)
    assert steps_to_check(read_run(folder), "all") == [6]
    quoted = text.replace("training_folder: output", r'training_folder: "C:\Users\me\output"')
    config_of(folder).write_text(quoted)
    assert "write Windows paths without quotes" in problem(folder)


@pytest.mark.parametrize("name", ["my_style.safetensors", "lora/lora_linear_f32.safetensors"])
def test_a_checkpoint_of_another_name_or_place_is_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / f"{NAME}.safetensors").rename(folder / name)
    assert f"The folder has other files ({name})" in problem(folder)


def test_a_configuration_of_another_run_is_explained(folder):
    text = config_of(folder).read_text()
    config_of(folder).write_text(text.replace(f"name: {NAME}", "name: other"))
    assert f"other files ({NAME}.safetensors)" in problem(folder)
    assert "with the name in the configuration (other)" in problem(folder)


@pytest.mark.parametrize("place", ["samples/{}", "samples/copy of {}", "{}", "samples/6/{}"])
@pytest.mark.parametrize("suffix", [" (1).png", ".bmp"])
def test_images_of_other_names_or_places_are_named(folder, place, suffix):
    paths = sorted((folder / "samples").iterdir())
    for path in paths:
        target = folder / place.format(path.stem + suffix)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    first = Path(place.format(paths[0].stem + suffix)).name
    assert f"has images ({first}" in problem(folder)
    assert "restore the original names and place" in problem(folder)


def test_without_any_images_there_is_nothing_to_restore(folder):
    shutil.rmtree(folder / "samples")
    assert problem(folder).endswith("so there is nothing to compare with.")


def test_converted_samples_are_noted(folder):
    assert incomplete_parts(read_run(folder)) == []
    for path in (folder / "samples").glob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    run = read_run(folder)
    assert steps_to_check(run, "all") == [6]
    assert incomplete_parts(run) == [
        "The samples are jpg files, but the configuration says png. If another program converted "
        "them, their pixels are not those of the trainer."
    ]


def test_the_folder_above_and_the_folder_inside_are_recognised(folder):
    shutil.copytree(folder, folder.parent / "second")
    assert f"folders in it have one: {NAME}, second; give one of them" in problem(folder.parent)
    assert f"the folder of its samples; give {folder}." in problem(folder / "samples")


@pytest.mark.parametrize("name", ["config.yaml", f"{NAME}.safetensors"])
def test_the_folder_of_a_given_file_is_named(folder, name):
    assert f"The file is in such a folder: {folder}." in problem(folder / name)


def test_an_archive_has_to_be_unpacked(tmp_path):
    (tmp_path / "run.zip").write_bytes(b"PK")
    assert "Unpack the archive first." in problem(tmp_path / "run.zip")


@pytest.mark.parametrize(
    ("name", "trainer"), [("config.toml", "kohya's trainer"), ("OneTrainer.json", "OneTrainer")]
)
def test_folders_of_other_trainers_are_named(folder, name, trainer):
    config_of(folder).unlink()
    (folder / name).write_text("")
    assert f"a folder of {trainer}, whose samples cannot be verified" in problem(folder)


def test_files_of_the_user_interface_are_no_obstacle(folder):
    for name in ("aitk_db.db", "loss_log.db", "log.txt", "pid.txt", "optimizer.pt"):
        (folder / name).write_bytes(b"x")
    shutil.copy(folder / f"{NAME}.safetensors", folder / "second_run_000000003.safetensors")
    run = read_run(folder)
    assert {step: path.name for step, path in run.checkpoints.items()} == {6: f"{NAME}.safetensors"}
