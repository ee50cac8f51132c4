"""Files in a run folder: checkpoints and images by step."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fidelora.errors import WeightsFileError
from fidelora.families.spec import Stage
from fidelora.safetensors_header import read_file_header
from fidelora.training.config_file import read_small_yaml

_SAMPLE_FILE = re.compile(
    r"(?P<time>\d+)__(?P<step>\d{9})_(?P<index>\d+)\.(jpg|jpeg|png|webp)", re.IGNORECASE
)


def find_checkpoints(
    folder: Path, name: str, steps: int, *, full_models: bool = False, ending: str = ""
) -> dict[int, Path]:
    """Return the checkpoints by step.

    The last checkpoint has no number in its name, but its metadata contains its step. That step is
    not the configured number of steps if the number was increased later to continue the run.

    Args:
        name: start of the file names.
        full_models: True to include diffusers folders.
        ending: end of the file names before the suffix.
    """
    number, suffix = r"(_(?P<step>\d{9}))?", r"(?P<suffix>\.safetensors)?"
    names = re.compile(re.escape(name) + number + re.escape(ending) + suffix, re.I)
    found, final = {}, None
    for path in sorted(folder.glob("*")):
        match = names.fullmatch(path.name)
        if match is None or not path.name.startswith(name):  # only the suffix may vary in case
            continue
        if not (path.is_file() if match["suffix"] else full_models and is_full_model(path)):
            continue
        if match["step"]:
            found[int(match["step"])] = path
        else:
            final = path
    if final is not None:
        found[_saved_step(final, steps)] = final
    return found


def stage_checkpoints(
    folder: Path, name: str, steps: int, stages: Sequence[Stage]
) -> dict[Stage, dict[int, Path]]:
    """Return the checkpoints by stage and step, of families with a denoiser for each stage.

    Args:
        name, steps: as for `find_checkpoints`.
    """
    return {
        stage: find_checkpoints(folder, name, steps, ending=f"_{stage}_noise") for stage in stages
    }


def is_full_model(path: Path) -> bool:
    """Return True for a diffusers folder with weights."""
    return _is_diffusers_folder(path) and any(path.glob("*/*.safetensors"))


def _is_diffusers_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("aitk_meta.yaml", "model_index.json"))


def folders_without_weights(folder: Path, name: str) -> list[str]:
    """Return a sentence for each folder of a saved model that has no weights.

    Args:
        name: start of the folder names.
    """
    return [
        f"{path.name} is the folder of a saved model, but it has no .safetensors files."
        for path in sorted(folder.glob("*"))
        if path.name.startswith(name) and _is_diffusers_folder(path) and not is_full_model(path)
    ]


def _saved_step(path: Path, default: int) -> int:
    """Return the step in the metadata of a checkpoint; `default` if it is missing or invalid."""
    try:
        metadata = checkpoint_metadata(path)
        # Embeddings have the step in a field of its own.
        field = "training_info" if "training_info" in metadata else "step"
        info = json.loads(metadata[field])
        step = info["step"] if field == "training_info" else info
    except (KeyError, TypeError, ValueError, RecursionError, WeightsFileError):
        return default
    return step if type(step) is int and step >= 0 else default


def checkpoint_metadata(path: Path) -> Mapping[str, str]:
    """Return the trainer's metadata of a checkpoint, with each value as JSON or plain text.

    Raises:
        WeightsFileError: the file is not a valid .safetensors file.
    """
    if path.is_file():
        return read_file_header(path).metadata
    document = read_small_yaml(path / "aitk_meta.yaml")
    if not isinstance(document, dict):
        return {}
    return {
        str(key): value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)
        for key, value in document.items()
    }


def image_rounds(folder: Path) -> dict[int, list[dict[int, Path]]]:
    """Return the rounds of images of each step, in order of time, each by index.

    A round begins where the index does not increase.
    """
    rounds: dict[int, list[dict[int, Path]]] = {}
    found = ((path, _SAMPLE_FILE.fullmatch(path.name)) for path in folder.glob("*"))
    matches = [(path, match) for path, match in found if match]
    for path, match in sorted(matches, key=_time_and_index):
        step_rounds = rounds.setdefault(int(match["step"]), [])
        index = int(match["index"])
        if not step_rounds or index <= max(step_rounds[-1]):
            step_rounds.append({})
        step_rounds[-1][index] = path
    return rounds


def _time_and_index(found: tuple[Path, re.Match[str]]) -> tuple[int, int, str]:
    path, match = found
    return int(match["time"]), int(match["index"]), path.name


def latest_images(rounds: Mapping[int, list[dict[int, Path]]]) -> dict[tuple[int, int], Path]:
    """Return the last image of each step and index."""
    return {
        (step, index): path
        for step, step_rounds in rounds.items()
        for images in step_rounds
        for index, path in images.items()
    }
