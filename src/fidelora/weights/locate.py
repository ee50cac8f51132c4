"""Where the files of a base model are: a folder, a single file, or a repository on the Hugging Face hub."""

from __future__ import annotations

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
from fidelora.families import Component
from fidelora.safetensors_header import refuse_pickle

_COME_ALONG = {"fidelora:miniature": Path(__file__).parent.parent / "miniature"}
"""The base models that are in the package, by the names that mean them on every machine."""
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate(
    place: str,
    components: Sequence[Component],
    *,
    what: str = "base model",
    variant: str = "",
    cache_dir: Path | None = None,
) -> Path:
    """The local folder or file that `place` means, downloaded from the hub if it is an id and not in the cache.

    `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are honoured by the hub's own client. Only configurations, the tokenizer and
    the .safetensors files of one variant are fetched.

    Raises:
        BaseModelNotFoundError: neither a file, nor a folder, nor a repository that can be reached.
        PickleRefusedError: a `.ckpt`, `.bin` or the like.
        BaseModelFilesError: a file of another kind.
    """
    path = _path(place)
    if is_local(place):
        if path.is_file():
            refuse_pickle(path)
            if path.suffix.lower() != ".safetensors":
                raise BaseModelFilesError(
                    f"{path.name} is neither a diffusers folder nor a .safetensors checkpoint."
                )
        return path
    match = _HUB_ID.fullmatch(place)
    if match is None:
        raise BaseModelNotFoundError(
            f"There is no {what} at {place:.300}; give a diffusers folder, a .safetensors checkpoint, a hub id (owner/name) "
            f"or {', '.join(_COME_ALONG)}."
        )
    patterns = [
        "model_index.json",
        *(f"{component.tokenizer}/*" for component in components if component.tokenizer),
    ]
    for component in components:
        patterns.append(f"{component.name}/config.json")
        patterns += [
            f"{component.name}/{pattern}" for pattern in weight_file_patterns(component, variant)
        ]
    if len(components) == 1:  # a repository of one component may have it at its root
        patterns += ["config.json", *weight_file_patterns(components[0], variant)]
    return _snapshot(match["repo"], match["revision"], patterns, cache_dir)


def is_name(place: str) -> bool:
    """Whether `place` means the same on every machine: a repository on the hub, or a base model that comes with the package."""
    return place in _COME_ALONG or (not is_local(place) and _HUB_ID.fullmatch(place) is not None)


def is_local(place: str) -> bool:
    """Whether there is a file or folder at `place`."""
    try:
        return _path(place).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def fingerprint(*places: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file at local places, so that what was overwritten is not taken for what it was."""
    files: list[Path] = []
    for place in places:
        if place and is_local(place):
            path = _path(place)
            files += (
                [path]
                if path.is_file()
                else sorted(path.rglob("*.safetensors")) + sorted(path.rglob("*.json"))
            )
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _path(place: str) -> Path:
    return _COME_ALONG.get(place) or Path(place).expanduser()


def weight_file_patterns(component: Component, variant: str) -> list[str]:
    """File names, with wildcards, that a component's weights may have: in one file, or in shards with an index."""
    name, shard = component.weights, "[0-9]*-of-[0-9][0-9][0-9][0-9][0-9]"
    if not variant:
        return [f"{name}.safetensors", f"{name}-{shard}.safetensors"]
    return [
        f"{name}.{variant}.safetensors",
        f"{name}.{variant}-{shard}.safetensors",
        f"{name}-{shard}.{variant}.safetensors",
    ]


def _snapshot(repo: str, revision: str | None, patterns: list[str], cache_dir: Path | None) -> Path:
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, cache_dir=cache_dir)
        )
    except GatedRepoError as error:
        raise BaseModelNotFoundError(
            f"{repo} is gated: accept its licence on the hub and set HF_TOKEN to a token of that account."
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelNotFoundError(f"{repo} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise BaseModelNotFoundError(
            f"There is no {repo} here nor on the hub, or it is private: check the name, and set HF_TOKEN if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BaseModelNotFoundError(
            f"{repo} is not in the local cache and the hub cannot be reached: connect once to download it, unset HF_HUB_OFFLINE, "
            "or give a local folder or file."
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise BaseModelNotFoundError(
            f"{repo} could not be fetched from the hub: {error}."
        ) from error
