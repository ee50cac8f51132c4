"""Deltas from the tensors of a module, with checks of their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fidelora.adapters.deltas import (
    Delta,
    DoraDelta,
    LohaDelta,
    LokrDelta,
    LoraDelta,
    scale_of,
)
from fidelora.adapters.formats import kind_of
from fidelora.adapters.lycoris_deltas import (
    DecomposedDelta,
    FullDelta,
    GloraDelta,
    Ia3Delta,
    OftDelta,
    is_butterfly,
)
from fidelora.adapters.peft_metadata import PeftMetadata
from fidelora.adapters.products import tucker
from fidelora.errors import AdapterFormatError


@dataclass(frozen=True)
class Scaling:
    """Rules for alpha in one file.

    Attributes:
        metadata: scales in the metadata, for modules that do not store an alpha.
        zero_is_rank: True if an alpha of 0 stands for the rank, as it does in AI Toolkit, kohya
            and LyCORIS during training. In AUTOMATIC1111, ComfyUI and diffusers such a module has
            no effect.
    """

    metadata: PeftMetadata
    zero_is_rank: bool

    def scale(self, alpha: float | None, rank: int, module: str) -> float:
        """Return the scale of a module.

        If neither the module nor the metadata has an alpha, the rank is used, so the scale is 1.
        """
        divisor: float = rank
        if alpha is None:
            alpha, divisor = self.metadata.alpha_of(module), self.metadata.divisor(module, rank)
        if alpha == 0 and not self.zero_is_rank:
            return 0.0
        return alpha / divisor if alpha else 1.0


@dataclass(frozen=True)
class Module:
    """Tensors of one module of an adapter file.

    Attributes:
        tensors: float32, by part.
        name: name of the module as spelled in the file.
        file: name of the file.
    """

    tensors: Mapping[str, Tensor]
    name: str
    file: str
    scaling: Scaling

    def delta(self) -> Delta | None:
        """Return the change of the module's weight; None if only its bias changes.

        Raises:
            AdapterFormatError: the shapes are not valid for the kind of the module.
        """
        match kind_of(self.tensors):
            case "full" | "norm":
                whole = self.tensors.get("diff", self.tensors.get("w_norm"))
                return None if whole is None else FullDelta(1.0, whole)
            case "oft":
                return self._oft()
            case "ia3":
                return self._ia3()
            case "loha":
                delta: Delta = self._loha()
            case "lokr":
                delta = self._lokr()
            case "glora":
                delta = self._glora()
            case _:
                delta = self._lora()
        if "dora_scale" in self.tensors:
            return self._decomposed(delta)
        return delta

    def bias(self) -> FullDelta | None:
        """Return the change of the module's bias; None if it does not change.

        Raises:
            AdapterFormatError: two parts change the bias, or one of them is not a vector.
        """
        found = [part for part in ("diff_b", "b_norm", "up_bias") if part in self.tensors]
        if not found:
            return None
        difference = self.tensors[found[0]]
        if len(found) > 1:
            raise AdapterFormatError(
                f"{self.name} in {self.file} has two biases ({' and '.join(found)}); export the "
                "file again."
            )
        if difference.dim() != 1:
            raise self._invalid("a bias", *found)
        if found == ["up_bias"]:  # PEFT adds the bias of `lora_B` times the scale
            scale = self._scale(self.tensors["down"].shape[0])
            return FullDelta(scale, difference)
        return FullDelta(1.0, difference)

    def _scale(self, rank: int) -> float:
        alpha = float(self.tensors["alpha"]) if "alpha" in self.tensors else None
        return self._scaled(self.scaling.scale(alpha, rank, self.name))

    def _scaled(self, scale: float) -> float:
        """Return `scale` times the factor that LyCORIS stores with `use_scalar`, if there is one.

        Current releases of LyCORIS multiply the weights by it when they save a file.
        """
        return scale * float(self.tensors["scalar"]) if "scalar" in self.tensors else scale

    def _lora(self) -> Delta:
        down, up = self.tensors["down"], self.tensors["up"]
        if not (
            down.dim() in (2, 4)
            and up.dim() in (2, 4)
            and up.shape[2:].numel() == 1
            and ("mid" in self.tensors or up.shape[1] == down.shape[0])
        ):
            raise self._invalid("a LoRA", "down", "up")
        rank = down.shape[0]
        if "mid" in self.tensors:
            down = self._expanded(self.tensors["mid"], up, down)
        if up.dim() != down.dim():
            up = up.flatten(1) if down.dim() == 2 else up[:, :, None, None]
        if "magnitude" in self.tensors:
            if down.dim() != 2 or self.tensors["magnitude"].shape != (up.shape[0],):
                raise AdapterFormatError(
                    f"The shapes of {self.name} in {self.file} are not valid for a DoRA of AI "
                    "Toolkit, which is supported for linear modules only, with one magnitude per "
                    "output."
                )
            # AI Toolkit does not store the alpha of a DoRA: `Adapter.with_alpha` sets it from the
            # recipe.
            scale = scale_of(float(self.tensors["alpha"]), rank) if "alpha" in self.tensors else 1.0
            return DoraDelta(scale, down, up, self.tensors["magnitude"])
        lora = LoraDelta(self._scale(rank), down, up)
        if "peft_magnitude" in self.tensors:
            magnitude = self.tensors["peft_magnitude"].flatten()
            if len(magnitude) != len(up):
                raise self._invalid("a DoRA", "up", "peft_magnitude")
            return DecomposedDelta(1.0, lora, magnitude, 0, "peft")
        if "dora_scale" not in self.tensors and self.scaling.metadata.uses_dora(self.name):
            raise AdapterFormatError(
                f"{self.file} is a DoRA according to its PEFT metadata (use_dora), but "
                f"{self.name} has no lora_magnitude_vector; export it again."
            )
        return lora

    def _expanded(self, mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Return the factor [rank, in, kh, kw] that replaces `mid` and `down`.

        `up @ mid @ down` is the Tucker decomposition of a LoCon. As in ComfyUI, the second and
        third factor are multiplied first (`comfy/weight_adapter/lora.py`).
        """
        if (
            mid.dim() != 4
            or mid.shape[:2] != (up.shape[1], down.shape[0])
            or down.shape[2:].numel() != 1
        ):
            raise self._invalid("a LoRA with the Tucker decomposition", "down", "mid", "up")
        return torch.einsum("ijkl,jr->irkl", mid, down.flatten(1)).contiguous()

    def _decomposed(self, inner: Delta) -> Delta:
        """Return a DoRA of LyCORIS, whose `dora_scale` is [out, 1, ...] or [1, in, ...]."""
        magnitude = self.tensors["dora_scale"]
        shape = magnitude.shape
        if len(shape) < 2 or sorted(shape)[-2] != 1 or max(shape) not in shape[:2]:
            raise self._invalid("a DoRA", "dora_scale")
        return DecomposedDelta(
            1.0, inner, magnitude.flatten(), 0 if shape[1] == 1 else 1, "lycoris"
        )

    def _factors(self, stem: str) -> tuple[Tensor, ...]:
        if stem in self.tensors:
            return (self.tensors[stem],)
        first, second = self.tensors[f"{stem}_a"], self.tensors[f"{stem}_b"]
        core = self.tensors.get(stem.replace("_w", "_t"))
        if core is not None:
            if (
                first.dim() != 2
                or second.dim() != 2
                or core.dim() != 4
                or core.shape[:2] != (first.shape[0], second.shape[0])
            ):
                raise self._not_multipliable()
            return core, first, second
        if stem.startswith("hada") and min(first.dim(), second.dim()) > 2:
            # OneTrainer stores the factors of convolutions as convolutions.
            first, second = first.flatten(1), second.flatten(1)
        if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[0]:
            raise self._not_multipliable()
        return first, second

    def _loha(self) -> Delta:
        w1, w2 = self._factors("hada_w1"), self._factors("hada_w2")
        return LohaDelta(self._scale(w1[-1].shape[0]), w1, w2)

    def _lokr(self) -> Delta:
        w1, w2 = self._factors("lokr_w1"), self._factors("lokr_w2")
        if w1[0].dim() != 2 or w2[0].dim() not in (2, 4):
            raise AdapterFormatError(
                f"The shapes of {self.name} in {self.file} are not valid for a LoKr. Export the "
                "file again."
            )
        if len(w1) == len(w2) == 1:
            # Both factors are whole: the trainer's scale is 1, and the stored alpha is unused.
            return LokrDelta(self._scaled(1.0), w1, w2)
        scale = self._scale((w2 if len(w2) > 1 else w1)[-1].shape[0])
        return LokrDelta(scale, w1, (tucker(*w2),) if len(w2) == 3 else w2)

    def _glora(self) -> Delta:
        """Return a GLoRA; LyCORIS before 2.0 stored the factors of each product in reverse order.

        If the module is square, the shapes fit both orders. The smaller dimension is then the
        rank; if the dimensions are equal, the old order is assumed. Source:
        `comfy/weight_adapter/glora.py` of ComfyUI.
        """
        factors = [self.tensors[part] for part in ("a1", "a2", "b1", "b2")]
        if any(factor.dim() not in (2, 4) for factor in factors):
            raise self._invalid("a GLoRA", "a1", "a2", "b1", "b2")
        a1, a2, b1, b2 = (factor.flatten(1) for factor in factors)
        is_old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
        is_new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
        if is_old and (not is_new or a2.shape[0] >= a2.shape[1]):
            a1, a2, b1, b2 = a2, a1, b2, b1
        elif not is_new:
            raise self._invalid("a GLoRA", "a1", "a2", "b1", "b2")
        if a1.shape[0] != a2.shape[1]:
            raise self._invalid("a GLoRA", "a1", "a2", "b1", "b2")
        return GloraDelta(self._scale(a2.shape[0]), a1, a2, b1, b2)

    def _ia3(self) -> Delta:
        factors, on_input = self.tensors["ia3"], self.tensors["on_input"]
        if on_input.numel() != 1 or max(factors.shape, default=0) != factors.numel():
            raise self._invalid("an (IA)^3", "ia3", "on_input")
        return Ia3Delta(1.0, factors.flatten(), 1 if on_input.item() else 0)

    def _oft(self) -> Delta:
        blocks, rescale = self.tensors["oft_blocks"], self.tensors.get("rescale")
        if (
            blocks.dim() not in (3, 4)
            or blocks.shape[-1] != blocks.shape[-2]
            or (blocks.dim() == 4 and not is_butterfly(blocks.shape))
        ):
            raise self._invalid("an OFT", "oft_blocks")
        if rescale is not None and rescale.numel() != max(rescale.shape, default=0):
            raise self._invalid("an OFT", "oft_blocks", "rescale")
        constraint = float(self.tensors["alpha"]) if "alpha" in self.tensors else 0.0
        # LyCORIS does not limit the norm if the constraint is 0; kohya limits it to 0.
        is_limited = constraint > 0 or ("alpha" in self.tensors and self.name.startswith("oft_"))
        return OftDelta(
            1.0,
            blocks,
            None if rescale is None else rescale.flatten(),
            constraint if is_limited else None,
        )

    def _invalid(self, kind: str, *parts: str) -> AdapterFormatError:
        shapes = ", ".join(f"{part} {list(self.tensors[part].shape)}" for part in parts)
        return AdapterFormatError(
            f"The shapes of {self.name} in {self.file} are not valid for {kind}: {shapes}. Export "
            "the file again."
        )

    def _not_multipliable(self) -> AdapterFormatError:
        return AdapterFormatError(
            f"The factors of {self.name} in {self.file} cannot be multiplied; export it again."
        )
