"""Find a base model: a folder, a single file, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fidelora.errors import BaseModelFilesError, BaseModelNotFoundError
from fidelora.families.spec import Part
from fidelora.safetensors_header import refuse_pickle

_BUNDLED = {"fidelora:miniature": Path(__file__).parents[1] / "miniature"}
"""Folders of the base models in this package, by name. The names are valid on every machine."""
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
"""Ids of repositories on the hub. Names that begin with a dot, such as ./models/base, are paths."""
_WEIGHT_FILE = re.compile(r"\.(safetensors|ckpt)", re.IGNORECASE)
"""Suffixes of files; a name with one of them is a path."""


def locate(
    name: str,
    parts: Sequence[Part],
    *,
    what: str = "base model",
    instead: str = "Set --base-model (base_model in Python) to a local folder or file",
    variant: str = "",
    cache_dir: Path | None = None,
) -> Path:
    """Return the local folder or file that `name` refers to.

    Parts that are single files (`Part.is_single_file`) are located as NAME.safetensors of the
    repository owner/NAME. From other repositories that are not in the cache, only the
    configurations, the tokenizers and the .safetensors files of one variant are downloaded. The
    environment variables `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` apply.

    Args:
        name: a path, a hub id, or the name of a bundled base model.
        parts: the parts that are needed.
        what: name of the object in error messages.
        instead: advice in the error if the hub cannot be reached, without a full stop.
        variant: variant of the weight files, such as `fp16`; empty for files without a variant.
        cache_dir: the hub's cache; None for the default.

    Raises:
        BaseModelNotFoundError: the file or folder does not exist, or the repository cannot be
            reached.
        PickleRefusedError: the file is a `.ckpt`, a `.bin` or another pickle.
        BaseModelFilesError: the file is neither a .safetensors file nor a pickle.
    """
    path = _path(name)
    if is_local(name):
        if path.is_file():
            refuse_pickle(path)
            if path.suffix.lower() != ".safetensors":
                raise BaseModelFilesError(
                    f"{path.name} is neither a diffusers folder nor a .safetensors checkpoint. "
                    "Use one of these."
                )
        return path
    match = _hub_id(name)
    if match is None:
        raise BaseModelNotFoundError(
            f"The {what} {name:.300} was not found on this machine. Give a diffusers folder, a "
            f".safetensors checkpoint, a hub id (owner/name) or {', '.join(_BUNDLED)}."
        )
    if file := _single_file(match["repo"], parts):
        found = _snapshot(match["repo"], match["revision"], [file], cache_dir, instead) / file
        if not found.is_file():
            raise BaseModelFilesError(
                f"{match['repo']} has no {file} at its root. Download a checkpoint, and set "
                "the file as the base model."
            )
        return found
    patterns = _patterns(parts, variant)
    return _snapshot(match["repo"], match["revision"], patterns, cache_dir, instead)


def is_downloaded(
    name: str, parts: Sequence[Part], *, variant: str = "", cache_dir: Path | None = None
) -> bool:
    """True if `locate` finds `name` without a download: a local path, or a cached repository.

    A repository counts as cached if it has weights of every part. Nothing is downloaded.
    """
    if is_local(name):
        return True
    match = _hub_id(name)
    if match is None:
        return False
    try:
        folder = Path(
            snapshot_download(
                match["repo"],
                revision=match["revision"],
                cache_dir=cache_dir,
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    if file := _single_file(match["repo"], parts):
        return (folder / file).is_file() and all(
            is_downloaded(part.companion, [part], cache_dir=cache_dir)
            for part in parts
            if part.companion
        )
    return all(
        any(
            any(folder.glob(f"{prefix}{pattern}"))
            for pattern in weight_file_patterns(part, variant)
            for prefix in ([f"{part.name}/", ""] if len(parts) == 1 else [f"{part.name}/"])
        )
        for part in parts
    )


def is_portable(name: str) -> bool:
    """True if `name` is a hub id or a bundled model, which are the same on every machine."""
    return name in _BUNDLED or (not is_local(name) and _hub_id(name) is not None)


def cached(name: str, cache_dir: Path | None = None) -> Path | None:
    """Return the folder of a hub repository in the hub's local cache, without using the network.

    Args:
        name: a hub id.

    Returns:
        the folder, which may lack files; None if the repository is not in the cache.
    """
    match = _hub_id(name)
    if match is None:
        return None
    try:
        found = snapshot_download(
            match["repo"], revision=match["revision"], cache_dir=cache_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


def is_local(name: str) -> bool:
    """True if `name` is an existing file or folder, or a bundled base model."""
    try:
        return _path(name).exists()
    except (OSError, ValueError):  # not a valid file name
        return False


def weight_file_patterns(part: Part, variant: str) -> list[str]:
    """Return glob patterns for a part's weights: first for a single file, then for shards."""
    name, shard = part.weights, "[0-9]*-of-[0-9][0-9][0-9][0-9][0-9]"
    if not variant:
        return [f"{name}.safetensors", f"{name}-{shard}.safetensors"]
    return [
        f"{name}.{variant}.safetensors",
        f"{name}.{variant}-{shard}.safetensors",
        f"{name}-{shard}.{variant}.safetensors",
    ]


def _hub_id(name: str) -> re.Match[str] | None:
    """Return the parts of a hub id; None for a path, even if it does not exist."""
    return None if _WEIGHT_FILE.fullmatch(Path(name).suffix) else _HUB_ID.fullmatch(name)


def _path(name: str) -> Path:
    return _BUNDLED.get(name) or Path(name).expanduser()


def _single_file(repo: str, parts: Sequence[Part]) -> str:
    """Return the name of the file with the single-file part among `parts`; empty without one."""
    name = repo.partition("/")[2]
    return f"{name}.safetensors" if any(part.is_single_file for part in parts) else ""


def _patterns(parts: Sequence[Part], variant: str) -> list[str]:
    """Return the patterns of the files to download."""
    patterns = [
        "model_index.json",
        *(f"{part.tokenizer.folder}/*" for part in parts if part.tokenizer),
    ]
    for part in parts:
        patterns.append(f"{part.name}/config.json")
        patterns += [f"{part.name}/{pattern}" for pattern in weight_file_patterns(part, variant)]
    if len(parts) == 1:  # a repository with only one part may have it at its root
        patterns += ["config.json", *weight_file_patterns(parts[0], variant)]
    return patterns


def _snapshot(
    repo: str, revision: str | None, patterns: list[str], cache_dir: Path | None, instead: str
) -> Path:
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, cache_dir=cache_dir)
        )
    except GatedRepoError as error:
        raise BaseModelNotFoundError(
            f"{repo} is gated. Accept its licence on the hub, and set HF_TOKEN to a token of the "
            "account that accepted it."
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelNotFoundError(
            f"{repo} has no revision {revision!r} on the hub. Use an existing branch, tag or "
            "commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelNotFoundError(
            f"{repo} is neither a folder on this machine nor a repository on the hub. Check the "
            "name, and set HF_TOKEN if the repository is private."
        ) from error
    except LocalEntryNotFoundError as error:
        download = "connect to the internet"
        if "HF_HUB_OFFLINE" in os.environ:
            download = "unset HF_HUB_OFFLINE"
        raise BaseModelNotFoundError(
            f"{repo} is neither a folder on this machine nor in the hub's local cache, and the hub "
            f"cannot be reached. {instead}, or {download} to download it."
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise BaseModelNotFoundError(
            f"{repo} could not be downloaded from the hub: {error}."
        ) from error
