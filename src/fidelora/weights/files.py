"""Find and read the files of a base model."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fidelora.errors import BaseModelFilesError, BaseModelNotFoundError, RecipeError
from fidelora.families import Family, Part, all_families
from fidelora.safetensors_header import read_file_header
from fidelora.weights.configs import check_index, read_config
from fidelora.weights.locate import locate
from fidelora.weights.part_files import is_single_file, weight_files

if TYPE_CHECKING:
    from torch import Tensor

Stamp = tuple[tuple[str, int, int], ...]
"""Path, size in bytes and modification time in ns of each file."""


@dataclass(frozen=True)
class BaseFiles:
    """All files of one base model.

    Attributes:
        source: the diffusers folder, the folder of the original layout or the single-file
            checkpoint.
        configs: path of each part's `config.json`, by part. Single files of the original layout
            (`Part.original`) have no entry.
        tokenizers: tokenizer folder of each text encoder, by part; None for the bundled tokenizer.
        weights: weight files by part. Parts inside a single-file checkpoint have no entry.
        given_configs: configurations that the caller gave for a single-file checkpoint, by part.
            The checkpoint does not contain them, but images depend on them.
        stamp: stamp of all files at the time of `find`; see `is_unchanged`.
    """

    family: Family
    source: Path
    configs: Mapping[str, Path]
    tokenizers: Mapping[str, Path | None]
    weights: Mapping[str, tuple[Path, ...]]
    given_configs: Mapping[str, Path]
    stamp: Stamp

    @classmethod
    def find(
        cls,
        family: Family,
        base_model: str,
        *,
        variant: str = "",
        config: str = "",
        decoder: str = "",
        cache_dir: Path | None = None,
    ) -> BaseFiles:
        """Find the files of a base model, and download missing ones from the hub.

        Args:
            base_model: hub id, diffusers folder, folder of the original layout or single-file
                checkpoint.
            variant: variant of a folder's weight files, such as `fp16`; may be empty.
            config: folder with the configurations for a single-file checkpoint and with the parts
                that the checkpoint does not contain (`Part.companion`). Parts that it lacks come
                from the hub. Empty for the family's own configurations.
            decoder: hub id, folder or file of a decoder that replaces the base model's; may be
                empty.
            cache_dir: the hub's cache; None for the default.

        Raises:
            BaseModelError, WeightsFileError: a file is missing, damaged or unsuitable.
            RecipeError: `config` was given for a folder.
        """
        source = locate(base_model, family.parts, variant=variant, cache_dir=cache_dir)
        replaced = family.part("decoder").name if decoder else ""
        is_checkpoint = source.is_file()
        is_original = _is_original(source, family)
        if config and not is_checkpoint:
            raise RecipeError(
                f"{source} is a folder with its own configurations; leave out config.",
                field="config",
            )
        layout = _layout(family, config, source) if is_checkpoint else source
        part_variant = "" if is_checkpoint else variant
        others = _folders_of_other_parts(source, family, config, part_variant, cache_dir)
        if not is_checkpoint and not is_original:
            check_index(source, family, others)
        roots = {part.name: others.get(part.name, layout) for part in family.parts}
        paths = {
            part.name: _path_of(roots[part.name], part, is_original, is_checkpoint)
            for part in family.parts
        }
        weights = {
            part.name: weight_files(paths[part.name], part, part_variant)
            for part in family.parts
            if part.name != replaced and (part.name in others or not is_checkpoint)
        }
        configs = {
            name: path / "config.json" for name, path in paths.items() if not is_single_file(path)
        }
        given = {name: path for name, path in configs.items() if config and roots[name] == layout}
        if decoder:
            part = family.part("decoder")
            folder, weights[replaced] = _decoder_files(decoder, part, variant, cache_dir)
            if folder is not None:
                configs[replaced] = folder / "config.json"
        tokenizers = {
            one.name: path
            if (path := paths[one.name]).name == one.original
            else _tokenizer(roots[one.name], one)
            for one in family.text_encoders
        }
        folders = [path for path in tokenizers.values() if path is not None]
        stamp = _stamp(source, *configs.values(), *folders, *sum(weights.values(), ()))
        return cls(family, source, configs, tokenizers, weights, given, stamp)

    @property
    def is_checkpoint(self) -> bool:
        """True if `source` is a single-file checkpoint."""
        return self.source.is_file()

    def is_unchanged(self) -> bool:
        """True if none of these files has changed since they were found.

        A file added to the base model's folder or a tokenizer's folder counts as a change, but not
        one added to the folder of another part.
        """
        folders = [path for path in self.tokenizers.values() if path is not None]
        return self.stamp == _stamp(
            self.source, *self.configs.values(), *folders, *sum(self.weights.values(), ())
        )

    def read(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
        """Return configurations and weights by part; tensors may be memory-mapped from the files.

        Raises:
            BaseModelError, WeightsFileError: a file is missing, damaged or unsuitable.
        """
        from fidelora.weights.strict import read_weights  # loads torch

        configs = {name: read_config(path) for name, path in self.configs.items()}
        weights: dict[str, dict[str, Tensor]] = {}
        if self.is_checkpoint:
            others = all_families().values()
            converter = importlib.import_module(self.family.checkpoint)
            found = read_weights([self.source])
            weights = converter.split(found, configs, self.family, others, self.source.name)
        weights |= {name: read_weights(paths) for name, paths in self.weights.items()}
        decoder = self.family.part("decoder").name
        if self.family.checkpoint:
            converter = importlib.import_module(self.family.checkpoint)
            # Files of the original layout have no configuration; their converter needs none.
            config = configs.get(decoder, {})
            weights[decoder] = converter.convert_decoder(weights[decoder], config)
        for part in self.family.parts:
            if part.convert:
                module, _, function = part.convert.partition(":")
                convert = getattr(importlib.import_module(module), function)
                weights[part.name], configs[part.name] = convert(
                    weights[part.name], configs.get(part.name)
                )
        return configs, weights

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters that each part uses, read from the file headers.

        Raises:
            WeightsFileError: a file is damaged.
        """
        counts = {part.name: 0 for part in self.family.parts}
        for part in self.family.parts:
            for path in self.weights.get(part.name, ()):
                counts[part.name] += sum(
                    math.prod(tensor.shape)
                    for key, tensor in read_file_header(path).tensors.items()
                    if not part.ignores(key)
                )
        if self.is_checkpoint:
            for key, tensor in read_file_header(self.source).tensors.items():
                inside = [part for part in self.family.parts if part.name not in self.weights]
                owner = next((one for one in inside if key.startswith(one.checkpoint_prefix)), None)
                if owner is not None:
                    counts[owner.name] += math.prod(tensor.shape)
        return counts


def _stamp(*paths: Path) -> Stamp:
    files: list[Path] = []
    for path in dict.fromkeys(paths):
        files += sorted(path.glob("*")) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((str(file), status.st_size, status.st_mtime_ns) for file, status in stats)


def _layout(family: Family, config: str, checkpoint: Path) -> Path:
    """Return the folder with the configurations for a single-file checkpoint."""
    if not family.checkpoint:
        raise BaseModelFilesError(
            f"{checkpoint.name} is a single file, which is not supported for {family.title}. "
            "Use a diffusers folder."
        )
    if not config:
        return family.layout
    folder = Path(config).expanduser()
    if not folder.is_dir():
        raise BaseModelNotFoundError(
            f"The configuration folder {config} does not exist. Set config to a folder in the "
            f"diffusers layout, or leave it out to use the configurations of {family.title}."
        )
    return folder


def _is_original(source: Path, family: Family) -> bool:
    """Return True if `source` is a folder in the model's original layout."""
    part = family.part("denoiser")
    is_diffusers = (source / part.name).is_dir()
    return bool(part.original) and not is_diffusers and (source / part.original).exists()


def _path_of(root: Path, part: Part, is_original: bool, is_checkpoint: bool) -> Path:
    """Return the path of a part in the folder `root`: a folder, or a file of the original layout.

    Args:
        is_original: True if the base model is a folder in the original layout.
        is_checkpoint: True if the base model is a single file. Then `root` is another folder, which
            has either layout.
    """
    if is_checkpoint and part.original:
        is_original = not (root / part.name).is_dir()
    return root / (part.original if is_original else part.name)


def is_complete(base_model: str, family: Family) -> bool:
    """Return True if a file or folder on this machine has all parts, so none come from the hub."""
    source = Path(base_model).expanduser()
    return not _other_parts(source, family)


def _other_parts(source: Path, family: Family) -> list[tuple[Part, str]]:
    """Return the parts that `source` does not contain, each with the hub id of a repository."""
    if source.is_file():
        return [(part, part.companion) for part in family.parts if part.companion]
    return [(part, family.extras) for part in _missing_parts(source, family)]


def _folders_of_other_parts(
    source: Path, family: Family, config: str, variant: str, cache_dir: Path | None
) -> dict[str, Path]:
    """Return the folder of another base model for each part that `source` does not contain.

    The folder `config` is used for the parts that it has, and repositories on the hub for the
    others.
    """
    own = Path(config).expanduser() if config else None
    found: dict[str, Path] = {}
    missing: dict[str, list[Part]] = {}
    for part, repository in _other_parts(source, family):
        if own is not None and _has_part(own, part):
            found[part.name] = own
        else:
            missing.setdefault(repository, []).append(part)
    for repository, parts in missing.items():
        try:
            folder = locate(
                repository,
                parts,
                what=f"repository for {family.title}",
                instead="Set --config (config in Python) to a local folder that has them"
                if source.is_file()
                else "Add them to the folder",
                variant=variant,
                cache_dir=cache_dir,
            )
        except BaseModelNotFoundError as error:
            names = ", ".join(part.title for part in parts)
            raise BaseModelNotFoundError(
                f"{source.name} lacks these parts of {family.title}: {names}. {error}"
            ) from error
        found |= {part.name: folder for part in parts}
    return found


def _has_part(folder: Path, part: Part) -> bool:
    """Return True if a folder has a part, in either layout."""
    if (folder / part.name).is_dir():
        return True
    return bool(part.original) and (folder / part.original).exists()


def _tokenizer(layout: Path, part: Part) -> Path | None:
    """Return the tokenizer's folder, or None for the bundled one."""
    assert part.tokenizer is not None, "a text encoder has a tokenizer"
    folder = layout / part.tokenizer.folder
    if folder.is_dir():
        return folder
    if part.tokenizer.bundled is None:
        raise BaseModelFilesError(
            f"The base model has no folder {part.tokenizer.folder}; download it again."
        )
    return None


def _missing_parts(source: Path, family: Family) -> tuple[Part, ...]:
    """Return the parts that a folder lacks and `Family.extras` has.

    A folder with a `model_index.json` must have all parts.
    """
    if not family.extras or (source / "model_index.json").is_file():
        return ()
    missing = [part for part in family.parts if not (source / part.name).is_dir()]
    return () if family.part("denoiser") in missing else tuple(missing)


def _decoder_files(
    name: str, part: Part, variant: str, cache_dir: Path | None
) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the folder and the weight files of a decoder that replaces the base model's.

    The folder is None for a single file, which has no configuration of its own.
    """
    source = locate(
        name,
        [part],
        what="VAE",
        instead="Set --vae (vae in Python) to a local folder or file",
        variant=variant,
        cache_dir=cache_dir,
    )
    if not source.is_dir():
        return None, (source,)
    folder = source if (source / "config.json").is_file() else source / part.name
    return folder, weight_files(folder, part, variant)
