"""Model family of an adapter, by the names and shapes of its modules and by its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fidelora.adapters.module_names import is_original_name
from fidelora.adapters.read import Adapter
from fidelora.adapters.targets import Targets
from fidelora.engine.other_families import made_for_other, other_family
from fidelora.errors import AdapterMismatchError
from fidelora.families import Family, Part, all_families, get_family
from fidelora.weights.configs import read_config
from fidelora.weights.files import BaseFiles
from fidelora.weights.part_config import config_of
from fidelora.weights.strict import empty_part


@dataclass(frozen=True)
class FamilyFit:
    """Comparison of an adapter with a given base model, or with the default one of a family.

    Attributes:
        model: id of the family; empty if no family has any of the modules.
        matched: number of modules, or of tensors of an embedding, that exist in the family.
        same_shapes: number of these that also have the shapes of the base model.
        unmatched, repeated: names of modules; see `targets.Matches`.
    """

    model: str
    matched: int = 0
    same_shapes: int = 0
    unmatched: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()


def size_of(adapter: Adapter) -> int:
    """Return the number of modules of an adapter, or of tensors of an embedding."""
    return len(adapter.embedding if adapter.is_embedding else adapter.modules)


def best_family(adapter: Adapter) -> FamilyFit:
    """Return the family that has the most modules of the adapter.

    Ties are decided by the number of modules with the same shapes, then by the adapter's metadata.
    If no shape is the same, the names alone do not identify a family. The family in the metadata is
    then returned if it has most of the modules.
    """
    made_for = adapter.metadata.get("ss_base_model_version", "")
    best, best_key = FamilyFit("", unmatched=adapter.modules), (0, 0, False)
    for model, family in all_families().items():
        fit = _fit(adapter, model)
        key = (fit.matched, fit.same_shapes, made_for in family.adapter_base_versions)
        if fit.matched and key > best_key:
            best, best_key = fit, key
    if best.model and not best.same_shapes and (named := _named_family(made_for)):
        fit = _fit(adapter, named.id)
        return fit if is_named(adapter, fit) else best
    return best


def is_named(adapter: Adapter, fit: FamilyFit) -> bool:
    """Return True if the metadata names the family of `fit` and it has most of the modules."""
    versions = get_family(fit.model).adapter_base_versions
    made_for = adapter.metadata.get("ss_base_model_version", "")
    return made_for in versions and fit.matched * 2 > size_of(adapter)


def fit_of_base(adapter: Adapter, base: BaseFiles) -> FamilyFit:
    """Return the comparison of an adapter with a base model; weights are not read.

    Raises:
        BaseModelError, WeightsFileError: a configuration is missing, does not describe such a part,
            or cannot be derived.
    """
    configs = {part.name: config_of(base, part) for part in _changed_parts(base.family)}
    return _compare(adapter, _targets(base.family, configs))


def explain_mismatch(
    adapter: Adapter, spec: Family, error: AdapterMismatchError
) -> AdapterMismatchError:
    """Return an error that names the adapter's family if its metadata or modules identify it.

    Otherwise `error` is returned. Metadata takes precedence. Names of the original code, and names
    that also exist in `spec`, do not identify a family unless the shapes match, too. The error can
    also name a model that Fidelora does not support.
    """
    made_for = adapter.metadata.get("ss_base_model_version", "")
    if made_for in spec.adapter_base_versions:
        return error
    if (other := _named_family(made_for)) is not None:
        return _other_family_error(adapter, other, spec)
    fit = best_family(adapter)
    if title := unsupported_family(adapter, fit):
        return AdapterMismatchError(f"{adapter.name} {made_for_other(title)}")
    if made_for:
        return error
    # Related families share names, so an adapter of the right family may only have wrong shapes.
    has_own_names = _fit(adapter, spec.id).matched == size_of(adapter)
    has_names_of_one = not has_own_names and not any(map(is_original_name, adapter.modules))
    is_certain = fit.same_shapes > 0 or has_names_of_one
    return (
        _other_family_error(adapter, get_family(fit.model), spec)
        if fit.model
        and fit.matched == size_of(adapter)
        and get_family(fit.model).parts != spec.parts
        and is_certain
        else error
    )


def unsupported_family(adapter: Adapter, fit: FamilyFit) -> str:
    """Return the title of the model that an adapter was made for; "" if it may be supported.

    Args:
        fit: `best_family(adapter)`.
    """
    if adapter.is_embedding or fit.same_shapes == size_of(adapter):
        return ""
    versions = [one for family in all_families().values() for one in family.adapter_base_versions]
    widths = {module: _width(adapter, module) for module in adapter.modules}
    return other_family(adapter.metadata.get("ss_base_model_version", ""), widths, versions)


def _width(adapter: Adapter, module: str) -> int:
    """Return the input width of a module; 0 if only its bias changes."""
    delta = adapter.deltas.get(module)
    if delta is None:
        return 0
    shape = delta.shape_for(torch.Size((0, 0)))
    return shape[1] if len(shape) > 1 else 0


def check_family(adapter: Adapter, spec: Family) -> str | None:
    """Return a note if the adapter's metadata names another base model than `spec`.

    Metadata is copied between files and is sometimes wrong. If it names another supported family,
    it is ignored only if all modules exist in `spec` and one of these conditions holds:

    * some modules do not exist in the named family;
    * all modules have the shapes of the default base of `spec`, but not all have those of the named
      family.

    Raises:
        AdapterMismatchError: the metadata names another supported family, and is not ignored.
    """
    made_for = adapter.metadata.get("ss_base_model_version", "")
    if not made_for or made_for in spec.adapter_base_versions:
        return None
    other = _named_family(made_for)
    if other is not None:
        total, own, named = size_of(adapter), _fit(adapter, spec.id), _fit(adapter, other.id)
        is_wrong = named.matched < total or own.same_shapes == total > named.same_shapes
        if own.matched < total or not is_wrong:
            raise _other_family_error(adapter, other, spec)
    return metadata_note(made_for, spec)


def metadata_note(made_for: str, spec: Family) -> str:
    """Return a note about an adapter that fits `spec`, but whose metadata names another base."""
    return (
        f"Its metadata says that it was trained on {made_for:.100}, which is not {spec.title}. All "
        f"its modules exist in {spec.title}, so the metadata is ignored."
    )


def _named_family(made_for: str) -> Family | None:
    """Return the family that metadata names; None if it is not supported."""
    families = all_families().values()
    return next((one for one in families if made_for in one.adapter_base_versions), None)


def _other_family_error(adapter: Adapter, other: Family, spec: Family) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"{adapter.name} is an adapter for {other.title}, but the base model is of family "
        f"{spec.title}. Use the adapter with model {other.id}. On the command line, that is "
        f"`--model {other.id}`, with `--base-model BASE` for your own base model. A request to a "
        f'server names it with "model": "{other.id}"; start the server with '
        f"`--base-model {other.id}=BASE`, or set it in FIDELORA_BASE_MODEL."
    )


def _fit(adapter: Adapter, model: str) -> FamilyFit:
    return _compare(adapter, default_targets(model))


def _compare(adapter: Adapter, targets: Targets) -> FamilyFit:
    model = targets.family.id
    if adapter.is_embedding:
        matches, fits = targets.match_embedding(adapter)
        size = size_of(adapter)
        return FamilyFit(model, matches * size, fits * size)
    found = targets.match(adapter)
    same = found.found - len(found.misshapen)
    return FamilyFit(model, found.found, same, tuple(found.unmatched), tuple(found.repeated))


@cache
def default_targets(model: str) -> Targets:
    """Return the targets of a family's default base."""
    family = get_family(model)
    configs = {
        part.name: read_config(family.layout / part.name / "config.json")
        for part in _changed_parts(family)
    }
    return _targets(family, configs)


def _changed_parts(family: Family) -> list[Part]:
    return [part for part in family.parts if part.adapter_prefixes]


def _targets(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> Targets:
    """Return the names and shapes of the base model that configurations describe, by part."""
    modules = {part.name: empty_part(part, configs[part.name]) for part in _changed_parts(family)}
    return Targets(family, modules)
