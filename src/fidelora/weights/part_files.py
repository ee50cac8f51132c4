"""Weight files of one part of a base model."""

from __future__ import annotations

import re
from pathlib import Path

from fidelora.errors import BaseModelFilesError
from fidelora.families import Part
from fidelora.texts import listed
from fidelora.weights.locate import weight_file_patterns


def is_single_file(path: Path) -> bool:
    """Return True if `path` is that of a file with a whole part, as in an original layout."""
    return path.suffix == ".safetensors"


def weight_files(folder: Path, part: Part, variant: str) -> tuple[Path, ...]:
    """Return the weight files in a part's folder, or the file that contains the whole part.

    Args:
        folder: the part's folder, or the file.
        variant: variant of the files, such as `fp16`; may be empty.

    Raises:
        BaseModelFilesError: weights are missing, are pickles, or are not one complete set.
    """
    if is_single_file(folder):
        if not folder.is_file():
            raise BaseModelFilesError(
                f"The base model has no {folder.name}; download it into {folder.parent}."
            )
        return (folder,)
    if part.original and folder.name == part.original and not folder.is_dir():
        raise BaseModelFilesError(
            f"The base model has no folder {folder.name} with the {part.name} and its tokenizer. "
            f"Create it in {folder.parent}, or use a diffusers folder."
        )
    for pattern in weight_file_patterns(part, variant):
        if found := sorted(folder.glob(pattern)):
            _check_shards(found)
            return tuple(found)
    wanted = weight_file_patterns(part, variant)[0]
    pickles = [one.name for suffix in (".bin", ".ckpt", ".pt") for one in folder.glob(f"*{suffix}")]
    if pickles:
        raise BaseModelFilesError(
            f"The base model's {folder.name} has only {pickles[0]}, a pickle, which can run code "
            f"when it is opened. Convert it to {wanted}."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = (
        f" (found: {', '.join(others)}; change the variant to use them)"
        if others
        else "; download it again"
    )
    raise BaseModelFilesError(f"The base model has no {folder.name}/{wanted}{hint}.")


def _check_shards(paths: list[Path]) -> None:
    """Raise if shards are missing, or if the folder also has shards of another export."""
    matches = [re.search(r"-(\d+)-of-(\d+)\.", path.name) for path in paths]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match]
    expected = [(number, len(paths)) for number in range(1, len(paths) + 1)]
    present = {number for number, _ in numbers}
    wanted = set(range(1, numbers[0][1] + 1)) if numbers else set()
    if len({total for _, total in numbers}) == 1 and present < wanted:
        missing = sorted(wanted - present)
        names = [re.sub(r"-\d+-of", f"-{one:05}-of", paths[0].name) for one in missing]
        raise BaseModelFilesError(
            f"The base model has no {paths[0].parent.name}/{listed(names)}: {len(missing)} of "
            f"{len(wanted)} shards are missing. Download it again."
        )
    if numbers and numbers != expected:
        found = ", ".join(path.name for path in paths)
        raise BaseModelFilesError(
            f"The shards in {paths[0].parent.name} are not one complete set: {found}. Download the "
            "folder again."
        )
