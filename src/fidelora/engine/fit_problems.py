"""Problems of an adapter that does not fit the supported model families, or a given base model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fidelora.adapters.module_names import is_original_name
from fidelora.adapters.read import Adapter
from fidelora.adapters.targets import repeated_modules, text_encoder_advice
from fidelora.engine.adapter_family import (
    FamilyFit,
    is_named,
    metadata_note,
    size_of,
    unsupported_family,
)
from fidelora.engine.other_families import made_for_other
from fidelora.families import get_family
from fidelora.loras.describe import AdapterSummary
from fidelora.recipe import short_name
from fidelora.texts import listed, plain_message

ProblemCode = Literal[
    "unusable", "not_finite", "other_architecture", "other_base", "nothing_learned",
    "partly_learned", "infinite_alpha", "missing_alpha", "zero_alpha", "repeated_module",
]  # fmt: skip

_FAMILIES = {
    "SDXL": (
        "Stable Diffusion XL",
        ("lora_te2_text", "text_encoder_2.", "add_embedding", "label_emb"),
    ),
    "FLUX": ("FLUX.1", ("double_blocks", "single_blocks", "single_transformer_blocks")),
    "Wan": ("", ("blocks_0_self_attn_q", "blocks.0.self_attn.q")),
}
"""By name of the model: the title of its family (empty if several families have these names), and
substrings of its module names. Used only to suggest the model of an unusable file."""

_ORIGINAL_NAMES = (
    "those of the original code, which Stable Diffusion 1.5, SDXL, the SDXL refiner and distilled "
    "models such as SSD-1B share"
)


@dataclass(frozen=True)
class Problem:
    """A problem or a note about an adapter.

    Attributes:
        unusable: True if the file cannot be used; False for a note.
    """

    code: ProblemCode
    message: str
    unusable: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", plain_message(self.message))


def base_problems(adapter: Adapter, fit: FamilyFit, base_model: str) -> Iterator[Problem]:
    """Yield a problem if the adapter does not fit a given base model."""
    total = size_of(adapter)
    things = "tensors" if adapter.is_embedding else "modules"
    base = short_name(base_model)
    if fit.matched < total:
        names = f" ({listed(fit.unmatched)})" if fit.unmatched else ""
        yield Problem(
            "other_architecture",
            f"{total - fit.matched} of {total} {things} do not exist in {base}{names}.",
            True,
        )
    elif fit.repeated:
        yield Problem("repeated_module", f"It {repeated_modules(fit.repeated, total)}", True)
    elif fit.same_shapes < total:
        yield Problem(
            "other_base",
            f"{total - fit.same_shapes} of {total} {things} have other shapes than in {base}.",
            True,
        )


def fit_problems(adapter: Adapter, summary: AdapterSummary, fit: FamilyFit) -> Iterator[Problem]:
    """Yield a problem if the adapter does not fit the default base of any supported family."""
    total = size_of(adapter)
    if adapter.is_embedding:
        yield from _embedding_fit_problems(adapter, fit)
        return
    if title := unsupported_family(adapter, fit):
        yield Problem("other_architecture", f"It {made_for_other(title)}", True)
        return
    fits_nothing = bool(fit.model) and not fit.same_shapes
    # A smaller base model, such as a distilled one, lacks some modules of the default one, too.
    if fits_nothing and is_named(adapter, fit):
        yield Problem("other_base", _no_shape(fit), False)
        return
    if fit.matched < total:
        where = (
            f"in {get_family(fit.model).title}" if fit.model else "in any supported model family"
        )
        yield Problem(
            "other_architecture",
            f"{total - fit.matched} of {total} modules are not {where} ({listed(fit.unmatched)})"
            f"{_made_for(adapter, summary, fit) or text_encoder_advice(fit.unmatched)}.",
            True,
        )
        return
    if fit.repeated:
        yield Problem("repeated_module", f"It {repeated_modules(fit.repeated, total)}", True)
        return
    spec = get_family(fit.model)
    if 0 < fit.same_shapes < fit.matched:
        message = (
            f"{fit.matched - fit.same_shapes} of {fit.matched} modules have other shapes than in "
            f"{spec.title}. The adapter was trained on a variant (for example, "
            "Stable Diffusion 2 has wider prompt embeddings) and fits only that variant."
        )
        yield Problem("other_base", message, True)
    elif summary.base and summary.base not in spec.adapter_base_versions:
        yield Problem("other_base", metadata_note(summary.base, spec), False)
    elif fits_nothing:
        names = ""
        if all(map(is_original_name, adapter.modules)):
            names = f" Its module names are {_ORIGINAL_NAMES}."
        yield Problem("other_base", _no_shape(fit) + names, False)


def _no_shape(fit: FamilyFit) -> str:
    """Return a note about an adapter whose modules all have other shapes than the default base."""
    return (
        f"The modules with these names have other shapes in {get_family(fit.model).title}, so the "
        "adapter fits only the base model that it was trained on. To compare the adapter with that "
        "model, set --base-model."
    )


def _made_for(adapter: Adapter, summary: AdapterSummary, fit: FamilyFit) -> str:
    """Return a hint at the model of an adapter that does not fit, as the end of a sentence."""
    versions = get_family(fit.model).adapter_base_versions if fit.model else ()
    if summary.base and summary.base not in versions:
        return f"; its metadata says that it was trained on {summary.base}"
    title = get_family(fit.model).title if fit.model else ""
    probably = next(
        (
            name
            for name, (own_title, marks) in _FAMILIES.items()
            if not (title and own_title == title)
            and any(mark in module for mark in marks for module in adapter.modules)
        ),
        "",
    )
    if probably:
        return f"; its module names are those of {probably}"
    if any(map(is_original_name, adapter.modules)):
        return f"; its module names are {_ORIGINAL_NAMES}"
    return ""


def _embedding_fit_problems(adapter: Adapter, fit: FamilyFit) -> Iterator[Problem]:
    widths = " and ".join(str(vectors.shape[1]) for vectors in adapter.embedding.values())
    if not fit.matched:
        yield Problem(
            "other_architecture",
            f"It is an embedding for other text encoders ({', '.join(adapter.embedding)}) than "
            "those of the supported model families.",
            True,
        )
    elif not fit.same_shapes:
        yield Problem(
            "other_base",
            f"Its vectors have the width {widths}, unlike those of "
            f"{get_family(fit.model).title}. The embedding fits only the base model that it was "
            "trained on.",
            False,
        )
