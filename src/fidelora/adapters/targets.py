"""Weights of a base model that adapters can change, and the search for those of an adapter.

Adapters change the weights of linear and convolutional modules. Some also change vectors: the
biases of these modules, and the weights and biases of norms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fidelora.accel.weight_protocols import ProvidesWeight
from fidelora.adapters.bound import BoundAdapter
from fidelora.adapters.deltas import Delta, Module
from fidelora.adapters.lycoris_deltas import FullDelta
from fidelora.adapters.name_index import NameIndex
from fidelora.adapters.read import Adapter
from fidelora.adapters.stacked_delta import StackedDelta, shapes_of
from fidelora.errors import AdapterMismatchError
from fidelora.families import Family, Part
from fidelora.families.spec import Stage
from fidelora.texts import listed
from fidelora.weights.strict import changeable

_TEXT_ENCODERS = re.compile(r"lora_te|text_encoder|clip_[lg]\.|t5")
"""Beginnings of the names of modules of text encoders."""


@dataclass(frozen=True, eq=False)
class Target:
    """One linear or convolutional module whose weight adapters can change.

    Attributes:
        name: part and path, such as `unet.conv_in`.
        weight, bias: parameters of the module before offloading replaced them by placeholders. The
            weight of a module that implements `AcceptsWeight` has no data.
        pristine: the weight in the base model's file, mapped from the file and in its dtype; None
            for targets that only have names and shapes.
    """

    name: str
    module: Module
    weight: Tensor
    bias: Tensor | None
    pristine: Tensor | None = None

    def current_weight(self) -> Tensor:
        """Return the weight in use, including merged adapters."""
        module = self.module
        return module.plain_weight() if isinstance(module, ProvidesWeight) else self.weight


@dataclass(frozen=True, eq=False)
class VectorTarget:
    """One vector that adapters can change: a bias, or the weight of a norm.

    Attributes:
        name: part, path and parameter, such as `unet.conv_in.bias`.
        module: name of the target of the same module; empty for norms.
        weight, pristine: see `Target`.
    """

    name: str
    module: str
    weight: Tensor
    pristine: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Matches:
    """Comparison of an adapter's modules with a base model.

    Attributes:
        deltas: delta by name of its target, for all modules that fit.
        found: number of modules that exist in the base model.
        unmatched: modules that do not exist there, or have no such parameter (a bias).
        repeated: modules whose weight another module of the file also changes.
        misshapen: sentence about each module of another shape, by module.
    """

    deltas: Mapping[str, Delta]
    found: int
    unmatched: Sequence[str]
    repeated: Sequence[str]
    misshapen: Mapping[str, str]


class Targets:
    """All targets of one base model, and their lookup by the names in adapter files (`NameIndex`).

    Args:
        modules: the parts of the base model by name.
        pristine: weights of each part by name, as stored in the file; required for merging.
    """

    def __init__(
        self,
        family: Family,
        modules: Mapping[str, nn.Module],
        pristine: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.family = family
        self.by_name: dict[str, Target] = {}
        self.vectors: dict[str, VectorTarget] = {}
        self._names = NameIndex(family)
        self._tables: dict[str, tuple[str, int]] = {}  # part and width by key of embeddings
        for part in family.text_encoders:
            if part.embedding_key:
                encoder: Any = modules[part.name]
                width = encoder.get_input_embeddings().embedding_dim
                self._tables[part.embedding_key] = (part.name, width)
        for part in family.parts:
            if not part.adapter_prefixes:
                continue
            found = dict(changeable(modules[part.name]))
            norms = dict(_norms(modules[part.name]))
            self._names.add(part, found, norms)
            kept = pristine[part.name] if pristine else {}
            for path, module in found.items():
                name = f"{part.name}.{path}"
                weight = kept.get(f"{path}.weight")
                self.by_name[name] = Target(name, module, module.weight, module.bias, weight)
                if module.bias is not None:
                    self._add_vector(part, path, "bias", module.bias, kept, name)
            for path, norm in norms.items():
                for parameter, values in norm.named_parameters(recurse=False):
                    self._add_vector(part, path, parameter, values, kept)

    def _add_vector(
        self,
        part: Part,
        path: str,
        parameter: str,
        values: Tensor,
        kept: Mapping[str, Tensor],
        module: str = "",
    ) -> None:
        name = f"{part.name}.{path}.{parameter}"
        self.vectors[name] = VectorTarget(name, module, values, kept.get(f"{path}.{parameter}"))

    def bind(self, adapter: Adapter, stage: Stage | None = None) -> BoundAdapter:
        """Find the target of every module of `adapter`.

        Args:
            stage: stage of the denoiser that the adapter changes, in families with stages.

        Raises:
            AdapterMismatchError: a module matches no target, does not have the target's shape, or
                is in the file twice.
        """
        matches = self.match(adapter, stage)
        if matches.unmatched or matches.repeated or matches.misshapen:
            raise AdapterMismatchError(self._explain(adapter, matches))
        return BoundAdapter(
            adapter.sha256,
            matches.deltas,
            adapter.alpha,
            tensors_sha256=adapter.tensors_sha256,
        )

    def match(self, adapter: Adapter, stage: Stage | None = None) -> Matches:
        """Compare every module of `adapter` with this base model.

        Args:
            stage: as in `bind`; None compares with the first denoiser that has the module.
        """
        unmatched: list[str] = []
        repeated: list[str] = []
        misshapen: dict[str, str] = {}
        found = 0
        seen: set[str] = set()
        deltas: dict[str, Delta] = {}
        stacked: dict[str, tuple[list[Delta | None], tuple[int, ...]]] = {}
        for module in adapter.modules:
            share = self._names.find_share(module, stage)
            if share is not None and module in adapter.deltas and module not in adapter.biases:
                found += 1
                delta = adapter.deltas[module]
                whole = self.by_name[share.target].weight.shape
                sizes = share.sizes
                shares, _ = stacked.setdefault(share.target, ([None] * len(sizes), sizes))
                if problem := _misfit(module, delta, shapes_of(whole, sizes)[share.index]):
                    misshapen[module] = problem
                elif shares[share.index] is None and share.target not in seen:
                    shares[share.index] = delta
                else:
                    repeated.append(module)
                continue
            names = self.find_names(module, stage)
            if not names:
                unmatched.append(module)
                continue
            changes = self._changes(adapter, module, names)
            if isinstance(changes, str):
                found += 1
                misshapen[module] = changes
                continue
            shapes = [self._shape(target) for target, _ in changes]
            if lacks := [
                target
                for (target, delta), shape in zip(changes, shapes, strict=True)
                if shape is None or _is_vector(delta) != (len(shape) == 1)
            ]:
                what = "bias" if lacks[0].endswith(".bias") else "weight"
                unmatched.append(f"{module} (its {what})")
                continue
            found += 1
            for (target, delta), shape in zip(changes, shapes, strict=True):
                assert shape is not None
                if problem := _misfit(module, delta, shape):
                    misshapen[module] = problem
                elif target not in seen:
                    deltas[target] = delta.fitted(shape)
                if target in seen | stacked.keys() and module not in repeated:
                    repeated.append(module)
                seen.add(target)
        for target, (shares, sizes) in stacked.items():
            stack = StackedDelta(1.0, tuple(shares), sizes)
            deltas.setdefault(target, stack.fitted(self.by_name[target].weight.shape))
        return Matches(deltas, found, unmatched, repeated, misshapen)

    def _changes(
        self, adapter: Adapter, module: str, names: Sequence[str]
    ) -> list[tuple[str, Delta]] | str:
        """Return the deltas of a module of an adapter by their targets.

        Args:
            names: see `find_names`.

        Returns:
            pairs of a target and its delta, or a sentence if the deltas of a fused module cannot be
            divided among `names`.
        """
        given: list[tuple[str, Delta]] = []
        if module in adapter.deltas:
            given.append(("", adapter.deltas[module]))
        if module in adapter.biases:
            given.append((".bias", adapter.biases[module]))
        if len(names) == 1:
            (name,) = names
            weight = name if name in self.by_name else f"{name}.weight"
            return [(name + end if end else weight, delta) for end, delta in given]
        weights = [self.by_name[name].weight for name in names]
        sizes = [len(weight) for weight in weights]
        changes: list[tuple[str, Delta]] = []
        for end, delta in given:
            shape = torch.Size((sum(sizes), *([] if end else weights[0].shape[1:])))
            if problem := _misfit(module, delta, shape):
                return problem
            divided = delta.fitted(shape).divided(sizes)
            if divided is None:
                return f"{module} stands for {len(names)} modules and cannot be divided among them"
            changes += [(name + end, one) for name, one in zip(names, divided, strict=True)]
        return changes

    def _shape(self, target: str) -> torch.Size | None:
        """Return the shape of a weight or vector; None if its module has no such parameter."""
        found = self.by_name.get(target) or self.vectors.get(target)
        return None if found is None else found.weight.shape

    def bind_embedding(self, adapter: Adapter, word: str) -> BoundAdapter:
        """Find the text encoder of every tensor of an embedding.

        Args:
            word: word that stands for the embedding in prompts.

        Raises:
            AdapterMismatchError: the embedding is for other text encoders, or of another width.
        """
        matched, same_widths = self.match_embedding(adapter)
        if not matched or not same_widths:
            has = [f"{key} of width {one.shape[1]}" for key, one in adapter.embedding.items()]
            needs = [f"{key} of width {width}" for key, (_, width) in self._tables.items()]
            raise AdapterMismatchError(
                f"{adapter.name} is an embedding with {' and '.join(has)}, but this "
                f"{self.family.title} base model needs {' and '.join(needs) or 'none'}. Use it "
                "with the base model that it was trained on."
            )
        vectors = {self._tables[key][0]: one for key, one in adapter.embedding.items()}
        return BoundAdapter(
            adapter.sha256,
            {},
            word=word,
            vectors=vectors,
            tensors_sha256=adapter.tensors_sha256,
        )

    def match_embedding(self, adapter: Adapter) -> tuple[bool, bool]:
        """Return True if an embedding has this family's keys, and True if its widths also match."""
        widths = {key: vectors.shape[1] for key, vectors in adapter.embedding.items()}
        own = {key: width for key, (_, width) in self._tables.items()}
        return widths.keys() == own.keys(), widths == own

    def find_name(self, module: str) -> str | None:
        """Return part and path of the module that an adapter file calls `module`.

        Returns:
            None if there is no such module, or if it is fused (`Part.fused_names`).
        """
        names = self.find_names(module)
        return names[0] if len(names) == 1 else None

    def find_names(self, module: str, stage: Stage | None = None) -> tuple[str, ...]:
        """Return part and path of each module that an adapter file calls `module`.

        See `NameIndex.find_names`.
        """
        return self._names.find_names(module, stage)

    def _explain(self, adapter: Adapter, matches: Matches) -> str:
        total = len(adapter.modules)
        if matches.repeated and not matches.unmatched and not matches.misshapen:
            return f"{adapter.name} {repeated_modules(matches.repeated, total)}"
        sentences = [f"{adapter.name} does not fit this {self.family.title} base model"]
        made_for = adapter.metadata.get("ss_base_model_version", "")
        if made_for and made_for not in self.family.adapter_base_versions:
            sentences[0] += f" (its metadata says that it was trained on {made_for})"
        if matches.unmatched:
            sentences.append(
                f"{len(matches.unmatched)} of {total} modules do not exist in it: "
                f"{listed(matches.unmatched)}"
            )
            advice = text_encoder_advice(matches.unmatched)
            if advice and not matches.misshapen:
                return "; ".join(sentences) + f"{advice}."
        if matches.misshapen:
            sentences.append(
                f"{len(matches.misshapen)} of {total} modules have the wrong shape: "
                f"{listed(list(matches.misshapen.values()))}"
            )
        return "; ".join(sentences) + ". Use it with the base model that it was trained on."


def text_encoder_advice(unmatched: Sequence[str]) -> str:
    """Return the end of an error message if all unmatched modules are those of text encoders."""
    if not unmatched or not all(map(_TEXT_ENCODERS.match, unmatched)):
        return ""
    return (
        "; they change a text encoder, which is not supported for this model. Export or train the "
        "adapter without text encoders"
    )


def repeated_modules(modules: Sequence[str], total: int) -> str:
    """Return the predicate of an error message about a file that names modules twice.

    The subject, such as the file's name, goes before it.
    """
    return (
        f"names {len(modules)} of its {total} modules twice, in different formats "
        f"({listed(modules)}). This happens if files in two formats are merged. Delete one of each "
        "pair of modules, or export the adapter again."
    )


def _misfit(module: str, delta: Delta, shape: torch.Size) -> str:
    """Return a sentence about a module whose delta does not fit `shape`; empty if it fits."""
    has = delta.shape_for(shape)
    if has == tuple(shape):
        return ""
    return f"{module} has the shape {list(has)} instead of {list(shape)}"


def _is_vector(delta: Delta) -> bool:
    return isinstance(delta, FullDelta) and delta.difference.dim() == 1


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of each norm with weights."""
    for path, child in module.named_modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm):
            yield path, child
