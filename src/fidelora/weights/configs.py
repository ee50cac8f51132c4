"""Configuration files of a base model: `config.json` of its parts, and `model_index.json`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fidelora.errors import BaseModelFilesError
from fidelora.families import Family, all_families

_ABSENT = [None, None]
"""Value of optional parts in `model_index.json` that a base model does not have."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a part's `config.json`.

    Raises:
        BaseModelFilesError: the file is missing, cannot be read or is not a JSON object.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelFilesError(f"The base model has no {name}; download it again.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BaseModelFilesError(
            f"The base model's {name} cannot be read: {error}. Download it again."
        ) from error
    if not isinstance(config, dict):
        raise BaseModelFilesError(
            f"The base model's {name} is not a JSON object; download it again."
        )
    return config


def check_index(folder: Path, family: Family, extra: Collection[str]) -> None:
    """Check that the folder's `model_index.json` describes a model of this family.

    Without this file, the folder must have a folder for each part.

    Args:
        extra: parts that are not expected in the folder.

    Raises:
        BaseModelFilesError: it describes another kind of model, or a part is missing.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        names = [part.name for part in family.parts if part.name not in extra]
        missing = [name for name in names if not (folder / name).is_dir()]
        if missing:
            raise BaseModelFilesError(
                f"{folder} is not a diffusers folder: it has neither a model_index.json nor the "
                f"folder {missing[0]}. Give the folder of a base model."
            )
        return
    entries = read_config(index)
    if not _has_parts_of(family, entries) and (other := _family_of(entries)) is not None:
        raise BaseModelFilesError(
            f"{folder.name} is a base model of {other.title}, not of {family.title}; "
            f"use it with model {other.id}."
        )
    kind = entries.get("_class_name", "model of unknown kind")
    for part in family.parts:
        entry = entries.get(part.name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name != part.class_name:
            raise BaseModelFilesError(
                f"{folder.name} is a {kind} whose {part.name} is {class_name or 'absent'}; "
                f"{family.title} needs a {part.class_name}."
            )
    known = {part.name for part in family.parts}
    others = ("text_encoder", family.part("denoiser").name)
    if more := sorted(
        name
        for name, value in entries.items()
        if name.startswith(others) and name not in known and value != _ABSENT
    ):
        raise BaseModelFilesError(
            f"{folder.name} is a {kind} with {more[0]}, which {family.title} does not have. Use "
            f"a base model of {family.title}."
        )


def _family_of(index: Mapping[str, Any]) -> Family | None:
    """Return the family whose parts are exactly those of a `model_index.json`, or None."""
    return next((one for one in all_families().values() if _has_parts_of(one, index)), None)


def _has_parts_of(family: Family, index: Mapping[str, Any]) -> bool:
    """Return True if a `model_index.json` has exactly the parts of a family."""
    wanted = {part.name: [part.library, part.class_name] for part in family.parts}
    others = ("text_encoder", family.part("denoiser").name)  # such as a second denoiser
    found = {
        name: value
        for name, value in index.items()
        if name in wanted or (name.startswith(others) and value != _ABSENT)
    }
    return found == wanted
