"""Conversion of adapter files between the namings of kohya and PEFT."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fidelora.adapters.deltas import consecutive_rows
from fidelora.adapters.formats import kind_of
from fidelora.adapters.lycoris_deltas import DecomposedDelta
from fidelora.adapters.read import Adapter, adapter_of, open_adapter, stored_tensors
from fidelora.adapters.tensor_names import modules_of
from fidelora.adapters.write import (
    ModuleParts,
    NamedTensors,
    TargetFormat,
    file_bytes,
    in_format,
)
from fidelora.engine.adapter_family import (
    best_family,
    default_targets,
    unsupported_family,
)
from fidelora.engine.other_families import made_for_other
from fidelora.errors import AdapterConversionError
from fidelora.families import Family, all_families, get_family
from fidelora.texts import listed

_SOURCE = "fidelora_converted_from"
"""Metadata field with the sha256 of the original file."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """A converted adapter.

    Attributes:
        content: bytes of the new file.
        sha256: sha256 of these bytes in hex.
        source_sha256: sha256 of the original file in hex.
        model: id of the model family.
        kind: kinds of the modules, joined by `+`.
        modules: number of modules.
        notes: sentences for the user.
    """

    content: bytes
    sha256: str
    source_sha256: str
    model: str
    kind: str
    modules: int
    notes: tuple[str, ...]


def convert_adapter(path: Path, to: TargetFormat, model: str | None = None) -> Conversion:
    """Return the adapter at `path` in another naming. Its weights are copied byte for byte.

    Alphas are added where the format needs them. The metadata is kept, and extended by the sha256
    of the original file. Converting the same file again gives the same bytes.

    Args:
        model: id of the adapter's model family; None for the family that has all its modules.

    Raises:
        AdapterConversionError: the target format cannot express the adapter, some of its modules
            are in no model family, or its names depend on the family and several families fit.
        UnknownModelError: the family `model` does not exist.
        AdapterError, WeightsFileError: the file cannot be read; see `read_adapter`.
    """
    file = open_adapter(path)
    stored = stored_tensors(file)
    adapter = adapter_of(file, stored)
    if adapter.embedding:
        raise AdapterConversionError(
            f"{file.name} contains an embedding, which the {to} format cannot express. Use the "
            "original file."
        )
    parts = modules_of(file.header, file.name)
    metadata = {**file.header.metadata, _SOURCE: file.sha256}
    written: dict[str, NamedTensors] = {}
    refused: dict[str, AdapterConversionError] = {}
    for family in _families(adapter, model):
        try:
            modules = _module_parts(adapter, parts, stored, family)
            written[family.id] = in_format(to, family, modules, metadata)
        except AdapterConversionError as error:
            refused[family.id] = error
    if not written:
        raise next(iter(refused.values()))
    if refused or len({frozenset(one.tensors) for one in written.values()}) > 1:
        fitting = " and ".join((*written, *refused))
        raise AdapterConversionError(
            f"{file.name} fits {fitting}, whose {to} names differ; set the model."
        )
    model, result = next(iter(written.items()))
    content = file_bytes(result)
    return Conversion(
        content,
        hashlib.sha256(content).hexdigest(),
        file.sha256,
        model,
        "+".join(sorted({kind_of(found) for found in parts.values()})),
        len(parts),
        result.notes,
    )


def _families(adapter: Adapter, model: str | None) -> list[Family]:
    """Return the family `model`, or the families that fit the adapter best.

    Only families that have all modules are candidates. They are narrowed in these steps, each of
    which is skipped if it would leave none:

    1. families in which all modules have the same shapes;
    2. the family in the adapter's metadata;
    3. families whose usual names the file uses.

    Raises:
        AdapterConversionError: a module is in none of the families.
    """
    candidates = [get_family(model)] if model else list(all_families().values())
    unknown: list[str] = []
    fitting: dict[str, bool] = {}  # whether all shapes are the same
    for family in candidates:
        found = _targets_by_module(adapter, family)
        missing = [module for module in adapter.modules if module not in found]
        if missing:
            unknown = missing if not unknown or len(missing) < len(unknown) else unknown
        else:
            fitting[family.id] = _has_same_shapes(adapter, family)
    if not fitting:
        if title := unsupported_family(adapter, best_family(adapter)):
            raise AdapterConversionError(f"{adapter.name} {made_for_other(title)}")
        raise AdapterConversionError(
            f"{len(unknown)} of {len(adapter.modules)} modules of {adapter.name} are not in "
            f"{get_family(model).title if model else 'any supported model family'}, so their names "
            f"cannot be converted: {listed(unknown)}. Use the original file."
        )
    best = [get_family(name) for name, same in fitting.items() if same == any(fitting.values())]
    made_for = adapter.metadata.get("ss_base_model_version", "")
    best = [one for one in best if made_for in one.adapter_base_versions] or best
    return [one for one in best if _has_own_names(adapter, one)] or best


def _has_own_names(adapter: Adapter, family: Family) -> bool:
    """Return True if all names have the family's usual prefixes; families also accept others."""
    starts = [
        start for part in family.parts for start in (*part.adapter_prefixes[:1], f"{part.name}.")
    ]
    return all(module.startswith(tuple(starts)) for module in adapter.modules)


def _targets_by_module(adapter: Adapter, family: Family) -> dict[str, tuple[str, ...]]:
    """Return the targets (part and path) of each module in the family's default base.

    Modules without a target are left out. Fused modules have several.

    Raises:
        AdapterConversionError: two modules of the file have the same target.
    """
    targets = default_targets(family.id)
    looked_up = {module: targets.find_names(module) for module in adapter.modules}
    found = {module: names for module, names in looked_up.items() if names}
    counts = Counter(name for names in found.values() for name in names)
    if twice := [module for module, names in found.items() if any(counts[n] > 1 for n in names)]:
        raise AdapterConversionError(
            f"{adapter.name} names a module of the base model twice ({listed(twice)}); export it "
            "again."
        )
    return found


def _has_same_shapes(adapter: Adapter, family: Family) -> bool:
    """Return True if all modules of the adapter have the shapes of their targets."""
    matches = default_targets(family.id).match(adapter)
    return not matches.unmatched and not matches.misshapen


def _module_parts(
    adapter: Adapter,
    parts: Mapping[str, Mapping[str, str]],
    stored: Mapping[str, Tensor],
    family: Family,
) -> list[ModuleParts]:
    found = _targets_by_module(adapter, family)
    originals = _original_paths(family, has_same_shapes=_has_same_shapes(adapter, family))
    by_name = {part.name: part for part in family.parts}
    modules = []
    for module, keys in parts.items():
        tensors = {name: stored[key] for name, key in keys.items()}
        scale = _scale(adapter, module)
        for target, own in zip(
            found[module], _divided(adapter, module, found[module], tensors, family), strict=True
        ):
            part_name, _, path = target.partition(".")
            part, original = by_name[part_name], originals.get(target, "")
            modules.append(ModuleParts(module, part, path, kind_of(keys), own, scale, original))
    return modules


def _divided(
    adapter: Adapter,
    module: str,
    targets: Sequence[str],
    tensors: Mapping[str, Tensor],
    family: Family,
) -> list[Mapping[str, Tensor]]:
    """Return the tensors of a module for each of its targets.

    The output rows of a fused LoRA are divided among its targets.

    Raises:
        AdapterConversionError: a fused module is not a LoRA, or has other shapes than the default
            base of the family.
    """
    if len(targets) == 1:
        return [tensors]
    by_name = default_targets(family.id).by_name
    sizes = [len(by_name[target].weight) for target in targets]
    if tensors.keys() - {"alpha"} != {"down", "up"} or len(tensors["up"]) != sum(sizes):
        raise AdapterConversionError(
            f"{module} of {adapter.name} stands for {len(targets)} modules of {family.title}. Only "
            "a LoRA with the shapes of the family's default base can be divided; use the original "
            "file."
        )
    return [{**tensors, "up": tensors["up"][rows]} for rows in consecutive_rows(sizes)]


def _scale(adapter: Adapter, module: str) -> float:
    """Return alpha / rank of a module; 1 if its kind has no alpha."""
    delta = adapter.deltas.get(module)
    if isinstance(delta, DecomposedDelta):
        delta = delta.inner
    return 1.0 if delta is None else delta.scale


def _original_paths(family: Family, *, has_same_shapes: bool) -> dict[str, str]:
    """Return the path in the original code of each target whose own path is different.

    Paths that number the blocks consecutively (`Part.numbers_blocks`) depend on the base model.
    They are left out unless all shapes are those of the family's default base.
    """
    originals: dict[str, str] = {}
    for part in family.parts:
        if part.other_names is not None and (has_same_shapes or not part.numbers_blocks):
            start = f"{part.name}."
            names = [name for name in default_targets(family.id).by_name if name.startswith(start)]
            paths = part.other_names(name.removeprefix(start) for name in names)
            originals |= {start + path: original for path, original in paths.items()}
    return originals
