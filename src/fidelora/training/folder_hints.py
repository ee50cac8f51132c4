"""Advice for folders that are not, or not completely, the output folder of a training run.

People rename files, copy parts of a folder, or give the folder above. Each function returns the end
of an error message that says what was found and what to do, or an empty string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from fidelora.texts import listed

MAX_LISTED_FILES = 10_000  # of a folder; those of training runs have a few hundred
_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff"})
_SAMPLES = "samples"  # folder of the trainer's images
_OTHER_TRAINERS = {
    "OneTrainer": ("*onetrainer*.json", "*OneTrainer*.json"),
    "kohya's trainer": ("*.toml",),
}
"""Patterns of the configuration files of other trainers."""


def file_advice(path: Path) -> str:
    """Return advice on a file that was given instead of a folder."""
    if path.suffix.lower() in (".zip", ".7z", ".rar", ".gz", ".tar"):
        return " Unpack the archive first."
    if has_config(path.parent):
        return f" The file is in such a folder: {path.parent}."
    return ""


def config_advice(folder: Path, names: Sequence[str]) -> str:
    """Return advice on a folder without a configuration.

    Args:
        names: configurations with other names, if there are several.
    """
    if names:
        return (
            f" It has several other configurations ({listed(names)}); rename the one of this "
            "training run to config.yaml."
        )
    if folder.name.lower() == _SAMPLES and has_config(folder.parent):
        return f" This is the folder of its samples; give {folder.parent}."
    inside = [one.name for one in _children(folder) if one.is_dir() and has_config(one)]
    if inside:
        return f" These folders in it have one: {listed(inside)}; give one of them."
    for trainer, patterns in _OTHER_TRAINERS.items():
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return f" It looks like a folder of {trainer}, whose samples cannot be verified."
    return ""


def has_config(folder: Path) -> bool:
    """Return True if a folder has a configuration with one of the trainer's names."""
    return any((folder / name).is_file() for name in ("config.yaml", ".job_config.json"))


def checkpoint_advice(folder: Path, name: str, known: Iterable[Path]) -> str:
    """Return advice on a run whose checkpoints were not found.

    Args:
        name: name of the run in its configuration.
        known: checkpoints that were found, of other steps.
    """
    others = {path.name for path in known}
    found = [
        path.relative_to(folder).as_posix()
        for pattern in ("*.safetensors", "*/*.safetensors")
        for path in islice(folder.glob(pattern), MAX_LISTED_FILES)
        if path.name not in others
    ]
    if not found:
        return ""
    return (
        f" The folder has other files ({listed(sorted(found))}). The trainer's checkpoints are "
        "beside the configuration, and their names begin with the name in the configuration "
        f"({name}): restore the name and place of a file that belongs to this run, or use the "
        "configuration of the run that it belongs to."
    )


def sample_advice(folder: Path) -> str:
    """Return advice on a run without images that have the trainer's file names."""
    for place in _sample_folders(folder):
        images = [one.name for one in _children(place) if one.suffix.lower() in _IMAGES]
        if images:
            where = place.relative_to(folder).as_posix()
            return (
                f" {'The folder' if where == '.' else where} has images ({listed(images)}). The "
                "trainer's have names such as 1795379975004__000000006_0.png (time, step, sample) "
                f"and are in the folder {_SAMPLES}: restore the original names and place."
            )
    return ""


def format_note(images: Iterable[Path], image_format: str) -> str:
    """Return a sentence if images have another format than the configuration says."""
    same = {"jpg": {".jpg", ".jpeg"}, "jpeg": {".jpg", ".jpeg"}}.get(
        image_format.lower(), {f".{image_format.lower()}"}
    )
    suffixes = {path.suffix.lower() for path in images}
    if not suffixes or suffixes & same:
        return ""
    return (
        f"The samples are {' and '.join(sorted(one[1:] for one in suffixes))} files, but the "
        f"configuration says {image_format}. If another program converted them, their pixels are "
        "not those of the trainer."
    )


def _sample_folders(folder: Path) -> list[Path]:
    inside = [one for one in _children(folder) if one.is_dir()]
    samples = [one for one in inside if one.name.lower() == _SAMPLES]
    deeper = [one for place in samples for one in _children(place) if one.is_dir()]
    return [*samples, *deeper, folder]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(islice(folder.iterdir(), MAX_LISTED_FILES))
    except OSError:
        return []
