"""The weights of a base model that adapters can change, and the binding of an adapter's modules to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fidelora.adapters.deltas import Delta, DoraDelta, Module
from fidelora.adapters.read import Adapter
from fidelora.errors import AdapterMismatchError, some
from fidelora.families import Family
from fidelora.families.sd.names import original_names
from fidelora.weights.strict import changeable


@runtime_checkable
class AcceptsWeight(Protocol):
    """A module that keeps its weight in a form of its own; its `weight` is a shape without numbers."""

    def release(self) -> None:
        """Forget the weight, and give its memory to those that are written next; it cannot compute until it takes another."""

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        """Use the weight that `write` gives in the dtype that it is asked for; it may be mapped from a file, and is not changed."""


@runtime_checkable
class ProvidesWeight(Protocol):
    """A module whose `weight` is a shape without numbers, and that can give these."""

    def plain(self) -> Tensor:
        """The weight that it uses, which is not changed."""


@dataclass(frozen=True, eq=False)
class Target:
    """One linear or convolutional module.

    Attributes:
        weight, bias: its parameters as they were before offloading put placeholders in their place: where the numbers are, but
            for the weight of a module that `AcceptsWeight`.
        pristine: the weight as the base model's file has it, mapped from there and in the file's dtype; None for a module that
            only shows names and shapes.
    """

    name: str
    module: Module
    weight: Tensor
    bias: Tensor | None
    pristine: Tensor | None = None

    def numbers(self) -> Tensor:
        """The weight as it is used now, with what is merged into it."""
        return self.module.plain() if isinstance(self.module, ProvidesWeight) else self.weight


@dataclass(frozen=True, eq=False)
class BoundAdapter:
    """An adapter of which every module has found its place in one base model.

    Attributes:
        deltas: by the name of the target.
        alpha: what it was given; see `Adapter.alpha`.
    """

    sha256: str
    deltas: Mapping[str, Delta]
    alpha: float | None = None

    @property
    def identity(self) -> str:
        """What tells it from others: the bytes of its file, and the alpha that it was given, if it was."""
        return self.sha256 if self.alpha is None else f"{self.sha256}, alpha {self.alpha!r}"

    @cached_property
    def components(self) -> frozenset[str]:
        """The parts of the base model that it changes."""
        return frozenset(name.partition(".")[0] for name in self.deltas)

    @cached_property
    def is_dora(self) -> bool:
        """Whether it is a DoRA, which the trainer never merges."""
        return any(isinstance(delta, DoraDelta) for delta in self.deltas.values())


class Targets:
    """All targets of one base model, found by the names that adapter files use.

    Adapter files flatten a module's path with underscores (`lora_unet_down_blocks_0_attentions_0_proj_in`) or keep its dots
    (PEFT: `unet.down_blocks.0.attentions.0.proj_in`); both are looked up in the flattened form. For families whose adapters are
    often named as the original code named the modules (`lora_unet_input_blocks_4_1_proj_in`), those names are known, too.

    Args:
        components: the parts of the base model by name.
        pristine: for each of them its weights by name, as the file has them; needed to merge.
    """

    def __init__(
        self,
        spec: Family,
        components: Mapping[str, nn.Module],
        pristine: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._spec = spec
        self.by_name: dict[str, Target] = {}
        self._names_by_flat: dict[str, str] = {}
        for component in spec.components:
            if not component.adapter_prefixes:
                continue
            modules = dict(changeable(components[component.name]))
            original = original_names(modules) if component.original_names else {}
            for path, module in modules.items():
                name = f"{component.name}.{path}"
                for spelling in filter(None, (path, original.get(path))):
                    flat = self._flatten(component.name, spelling, component.optional_prefix)
                    assert flat not in self._names_by_flat, (
                        f"{name} and {self._names_by_flat[flat]} have one flattened name"
                    )
                    self._names_by_flat[flat] = name
                kept = pristine[component.name][f"{path}.weight"] if pristine else None
                self.by_name[name] = Target(name, module, module.weight, module.bias, kept)

    def bind(self, adapter: Adapter) -> BoundAdapter:
        """Find the target of every module of `adapter`.

        Raises:
            AdapterMismatchError: a module matches none, or one of another shape; nothing is bound then.
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
                misshapen.append(f"{module} is made for {has} where the base model has {needs}")
            elif target.name in deltas:
                unmatched.append(f"{module} (its target has another module of the file already)")
            else:
                deltas[target.name] = delta
        if unmatched or misshapen:
            raise AdapterMismatchError(self._explain(adapter, unmatched, misshapen))
        return BoundAdapter(adapter.sha256, deltas, adapter.alpha)

    def find(self, module: str) -> Target | None:
        """The target that an adapter file means by `module`, or None."""
        for component in self._spec.components:
            for prefix in component.adapter_prefixes:
                if module.startswith(prefix):
                    flat = self._flatten(
                        component.name, module.removeprefix(prefix), component.optional_prefix
                    )
                    if flat in self._names_by_flat:
                        return self.by_name[self._names_by_flat[flat]]
        return None

    @staticmethod
    def _flatten(component: str, path: str, optional_prefix: str) -> str:
        flat = path.replace(".", "_")
        if optional_prefix:
            flat = flat.removeprefix(optional_prefix.replace(".", "_"))
        return f"{component}:{flat}"

    def _explain(self, adapter: Adapter, unmatched: Sequence[str], misshapen: Sequence[str]) -> str:
        parts = [f"{adapter.name} does not fit this {self._spec.title} base model"]
        made_for = adapter.metadata.get("ss_base_model_version", "")
        if made_for and made_for not in self._spec.adapter_base_versions:
            parts[0] += f" (its file says that it was trained on {made_for})"
        total = len(adapter.deltas)
        if unmatched:
            parts.append(
                f"{len(unmatched)} of {total} modules match nothing there: {some(unmatched)}"
            )
        if misshapen:
            parts.append(
                f"{len(misshapen)} of {total} modules have other shapes: {some(misshapen)}"
            )
        return "; ".join(parts) + ". Use it with the base model that it was trained on."
