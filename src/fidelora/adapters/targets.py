"""Weights of a base model that adapters can change, and the lookup by names in adapter files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fidelora.accel.weight_protocols import ProvidesWeight
from fidelora.adapters.deltas import Delta, Module
from fidelora.adapters.read import Adapter
from fidelora.errors import AdapterMismatchError, some
from fidelora.families import Family, Part
from fidelora.weights.strict import changeable


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

    def numbers(self) -> Tensor:
        """Return the weight in use, including merged adapters."""
        module = self.module
        return module.plain_weight() if isinstance(module, ProvidesWeight) else self.weight


@dataclass(frozen=True, eq=False)
class BoundAdapter:
    """An adapter whose modules were all found in one base model.

    Attributes:
        deltas: delta by name of its target.
        alpha: see `Adapter.alpha`.
        word: word of an embedding; None for adapters of other kinds.
        vectors: vectors of an embedding, float32 [tokens, width] by text encoder.
        tensors_sha256: see `AdapterFile`.
    """

    sha256: str
    deltas: Mapping[str, Delta]
    alpha: float | None = None
    word: str | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    tensors_sha256: str = ""

    @property
    def identity(self) -> str:
        """Key that identifies the adapter's file and the alpha or word from the recipe."""
        if self.word is not None:
            return f"{self.sha256}, word {self.word!r}"
        return self.sha256 if self.alpha is None else f"{self.sha256}, alpha {self.alpha!r}"

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
    so are the names of the original code where a family defines them (`Part.other_names`).

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
        self._family = family
        self.by_name: dict[str, Target] = {}
        self._names_by_flat: dict[str, str] = {}
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
            others = part.other_names(found) if part.other_names else {}
            for path, module in found.items():
                name = f"{part.name}.{path}"
                for spelling in filter(None, (path, others.get(path))):
                    flat = _flatten(part, spelling)
                    other = self._names_by_flat.setdefault(flat, name)
                    assert other == name, f"{name} and {other} have the same flattened name"
                kept = pristine[part.name][f"{path}.weight"] if pristine else None
                self.by_name[name] = Target(name, module, module.weight, module.bias, kept)

    def bind(self, adapter: Adapter) -> BoundAdapter:
        """Find the target of every module of `adapter`.

        Raises:
            AdapterMismatchError: a module matches no target, or does not have the target's shape.
        """
        unmatched: list[str] = []
        misshapen: list[str] = []
        deltas: dict[str, Delta] = {}
        for module, delta in adapter.deltas.items():
            target = self.find(module)
            if target is None:
                unmatched.append(module)
            elif delta.shape_for(target.weight.shape) != tuple(target.weight.shape):
                has, needs = list(delta.shape_for(target.weight.shape)), list(target.weight.shape)
                misshapen.append(f"{module} has the shape {has} instead of {needs}")
            elif target.name in deltas:
                unmatched.append(f"{module} (another module of the file has the same target)")
            else:
                deltas[target.name] = delta
        if unmatched or misshapen:
            raise AdapterMismatchError(self._explain(adapter, unmatched, misshapen))
        return BoundAdapter(
            adapter.sha256, deltas, adapter.alpha, tensors_sha256=adapter.tensors_sha256
        )

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
                f"{self._family.title} base model needs {' and '.join(needs) or 'none'}. Use it "
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
        """Return whether an embedding has this family's keys, and whether the widths also match."""
        widths = {key: vectors.shape[1] for key, vectors in adapter.embedding.items()}
        own = {key: width for key, (_, width) in self._tables.items()}
        return widths.keys() == own.keys(), widths == own

    def find(self, module: str) -> Target | None:
        """Return the target that an adapter file calls `module`, or None."""
        for part in self._family.parts:
            for prefix in part.adapter_prefixes:
                if module.startswith(prefix):
                    flat = _flatten(part, module.removeprefix(prefix))
                    if flat in self._names_by_flat:
                        return self.by_name[self._names_by_flat[flat]]
        return None

    def _explain(self, adapter: Adapter, unmatched: Sequence[str], misshapen: Sequence[str]) -> str:
        sentences = [f"{adapter.name} does not fit this {self._family.title} base model"]
        made_for = adapter.metadata.get("ss_base_model_version", "")
        if made_for and made_for not in self._family.adapter_base_versions:
            sentences[0] += f" (its metadata says that it was trained on {made_for})"
        total = len(adapter.deltas)
        if unmatched:
            sentences.append(
                f"{len(unmatched)} of {total} modules do not exist in it: {some(unmatched)}"
            )
        if misshapen:
            sentences.append(
                f"{len(misshapen)} of {total} modules have the wrong shape: {some(misshapen)}"
            )
        return "; ".join(sentences) + ". Use it with the base model that it was trained on."


def _flatten(part: Part, path: str) -> str:
    """Return the key under which a module of this part is looked up."""
    flat = path.replace(".", "_")
    if part.optional_prefix:
        flat = flat.removeprefix(part.optional_prefix.replace(".", "_"))
    return f"{part.name}:{flat}"
