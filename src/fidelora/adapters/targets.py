"""Weights of a base model that adapters can change, and the lookup by names in adapter files.

Adapters change the weights of linear and convolutional modules. Some also change vectors: the
biases of these modules, and the weights and biases of norms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fidelora.accel.weight_protocols import ProvidesWeight
from fidelora.adapters.deltas import Delta, Module
from fidelora.adapters.lycoris_deltas import FullDelta
from fidelora.adapters.module_names import canonical_name
from fidelora.adapters.read import Adapter
from fidelora.adapters.rounded_delta import RoundedDelta
from fidelora.adapters.stacked_delta import StackedDelta, shapes_of
from fidelora.errors import AdapterMismatchError
from fidelora.families import Family, Part
from fidelora.families.spec import Stage
from fidelora.texts import listed
from fidelora.weights.strict import changeable

_Found = TypeVar("_Found")


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


@dataclass(frozen=True)
class _Share:
    """One share of the rows of a target, which adapter files can name as a module.

    Attributes:
        index: index of the share among `sizes`, which are those of `StackedDelta`.
    """

    target: str
    index: int
    sizes: tuple[int, ...]


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


@dataclass(frozen=True, eq=False)
class BoundAdapter:
    """An adapter whose modules were all found in one base model.

    Attributes:
        deltas: delta by name of its target, which may be a `VectorTarget`.
        alpha: see `Adapter.alpha`.
        word: word of an embedding; None for adapters of other kinds.
        vectors: vectors of an embedding, float32 [tokens, width] by text encoder.
        tensors_sha256: see `AdapterFile`.
        rounded_to: dtype to which `rounded` rounded the tensors; None for those of the file.
    """

    sha256: str
    deltas: Mapping[str, Delta]
    alpha: float | None = None
    word: str | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    tensors_sha256: str = ""
    rounded_to: torch.dtype | None = None

    @property
    def identity(self) -> str:
        """Key of the adapter's file and of the alpha, word or rounding that it is used with."""
        if self.word is not None:
            return f"{self.sha256}, word {self.word!r}"
        details = {"alpha": self.alpha, "rounded to": self.rounded_to}
        used = [f"{name} {value!r}" for name, value in details.items() if value is not None]
        return ", ".join([self.sha256, *used])

    def only(self, names: Collection[str]) -> BoundAdapter:
        """Return the same adapter with only the changes of these targets."""
        kept = {name: delta for name, delta in self.deltas.items() if name in names}
        return replace(self, deltas=kept)

    def rounded(self, dtype: torch.dtype) -> BoundAdapter:
        """Return the same adapter with its tensors cast to `dtype`."""
        deltas = {name: one.cast(dtype) for name, one in self.deltas.items()}
        return replace(self, deltas=deltas, rounded_to=dtype)

    def widened(self) -> BoundAdapter:
        """Return the same adapter with its tensors cast to float32, which merging needs."""
        deltas = {name: one.cast(torch.float32) for name, one in self.deltas.items()}
        return replace(self, deltas=deltas)

    def with_rounded_changes(self, dtype: torch.dtype) -> BoundAdapter:
        """Return the same adapter with each change rounded to `dtype` before it is merged."""
        deltas: dict[str, Delta] = {
            name: RoundedDelta.of(one, dtype) for name, one in self.deltas.items()
        }
        return replace(self, deltas=deltas)

    @cached_property
    def components(self) -> frozenset[str]:
        """Names of the parts of the base model that the adapter changes."""
        return frozenset((*(name.partition(".")[0] for name in self.deltas), *self.vectors))

    @cached_property
    def is_dora(self) -> bool:
        """True if the adapter is a DoRA, which the trainer never merges."""
        return any(delta.is_dora for delta in self.deltas.values())


class Targets:
    """All targets of one base model, by the names that adapter files use.

    Adapter files flatten a module's path with underscores
    (`lora_unet_down_blocks_0_attentions_0_proj_in`) or keep its dots
    (`unet.down_blocks.0.attentions.0.proj_in`, PEFT). Both are looked up in the flattened form, and
    so are the names of other code where a family defines them (`Part.other_names`,
    `Part.fused_names`, `Part.accepted_names`).

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
        self._names_by_flat: dict[str, tuple[str, ...]] = {}  # several: see `Part.fused_names`
        self._shares_by_flat: dict[str, _Share] = {}  # see `Part.accepted_names`
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
            others = part.other_names([*found, *norms]) if part.other_names else {}
            for path in (*found, *norms):
                name = f"{part.name}.{path}"
                for spelling in filter(None, (path, others.get(path))):
                    flat = _flatten(part, spelling)
                    other = self._names_by_flat.setdefault(flat, (name,))
                    assert other == (name,), f"{name} and {other} have the same flattened name"
            for fused, paths in (part.fused_names(found) if part.fused_names else {}).items():
                several = tuple(f"{part.name}.{path}" for path in paths)
                self._names_by_flat[_flatten(part, fused)] = several
            accepted = part.accepted_names(found) if part.accepted_names else {}
            for path, names in accepted.items():
                name = f"{part.name}.{path}"
                sizes = Counter(names)
                for index, spelling in enumerate(sizes):
                    flat = _flatten(part, spelling)
                    if len(sizes) == 1:
                        self._names_by_flat[flat] = (name,)
                    else:
                        self._shares_by_flat[flat] = _Share(name, index, tuple(sizes.values()))
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
            AdapterMismatchError: a module matches no target, or does not have the target's shape.
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
            share = self._find(module, self._shares_by_flat, stage)
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
        """Return two booleans: an embedding has this family's keys; its widths match, too."""
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

        With a `stage`, the denoisers of other stages are left out.

        There are several if the file has the name of a module of the original code, whose output
        rows are divided among these (`Part.fused_names`). There is none if the name is unknown.
        """
        return self._find(module, self._names_by_flat, stage) or ()

    def _find(
        self, module: str, by_flat: Mapping[str, _Found], stage: Stage | None
    ) -> _Found | None:
        """Return the entry of `by_flat` for what an adapter file calls `module`, or None."""
        module = canonical_name(module)
        for part in self.family.parts:
            if stage is not None and part.stage not in (None, stage):
                continue
            for prefix in part.adapter_prefixes:
                if module.startswith(prefix):
                    flat = _flatten(part, module.removeprefix(prefix))
                    if flat in by_flat:
                        return by_flat[flat]
        return None

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
        if matches.misshapen:
            sentences.append(
                f"{len(matches.misshapen)} of {total} modules have the wrong shape: "
                f"{listed(list(matches.misshapen.values()))}"
            )
        return "; ".join(sentences) + ". Use it with the base model that it was trained on."


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


def _flatten(part: Part, path: str) -> str:
    """Return the key under which a module of this part is looked up."""
    flat = path.replace(".", "_")
    if part.optional_prefix:
        flat = flat.removeprefix(part.optional_prefix.replace(".", "_"))
    return f"{part.name}:{flat}"
