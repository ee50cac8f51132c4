"""Examine an adapter file, including its weights: kind, matching base models, problems."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from fidelora.adapter_file import AdapterFile
from fidelora.adapters.formats import SCALED_KINDS, kind_of
from fidelora.adapters.module_names import is_original_name
from fidelora.adapters.peft_metadata import PeftMetadata
from fidelora.adapters.read import Adapter, adapter_of, stored_tensors, zero_alpha_note
from fidelora.adapters.targets import repeated_modules, text_encoder_advice
from fidelora.adapters.tensor_names import is_from_trainer, modules_of
from fidelora.engine.adapter_family import (
    FamilyFit,
    best_family,
    fit_of_base,
    is_named,
    made_for_other,
    metadata_note,
    size_of,
    unsupported_family,
)
from fidelora.errors import AdapterError, WeightsFileError
from fidelora.families import get_family
from fidelora.loras.describe import AdapterSummary, describe_adapter, describe_header
from fidelora.recipe import file_sha256, short_name
from fidelora.safetensors_header import Header
from fidelora.texts import listed, plain_message
from fidelora.weights.files import BaseFiles

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
"""By name of the model: the title of its family (empty if it is not supported), and substrings of
its module names. Used only to suggest the model of an unusable file."""

_ORIGINAL_NAMES = (
    "those of the original code, which Stable Diffusion 1.5, SDXL, the SDXL refiner and distilled "
    "models such as SSD-1B share"
)

_NO_ALPHA = 1e10
"""Alpha that the trainer stores for LoKr modules with whole factors; infinite in float16."""


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


@dataclass(frozen=True)
class Examination:
    """Result of examining an adapter.

    Attributes:
        summary: contents of the header.
        alphas: distinct alphas of the modules, ascending; may contain infinity and NaN.
        model: id of the family with the largest number of the adapter's modules (`best_family`),
            or of the given base model; empty if no family has any of them.
        matched: number of modules that exist in this family, or in the given base model; for an
            embedding, number of tensors.
        same_shapes: number of these modules that also fit the shapes of the family's default base,
            or of the given base model.
    """

    sha256: str
    summary: AdapterSummary
    alphas: tuple[float, ...]
    model: str
    matched: int
    same_shapes: int
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """True if the adapter can be used with a base model of its family."""
        return not any(problem.unusable for problem in self.problems)


def examine_adapter(path: Path, base_model: str = "", model: str = "") -> Examination:
    """Read the whole file at `path`, and return its contents and problems.

    Args:
        base_model: base model with which the adapter is compared; empty for the default ones of all
            families. See `BaseFiles.find`.
        model: family of `base_model`; empty for that of the adapter, or else "sd15".

    Raises:
        AdapterNotFoundError: the file does not exist.
        WeightsFileError: the file cannot be read at all.
        BaseModelError: `base_model` was not found, or is not of this family.
        UnknownModelError: there is no such family.
    """
    try:
        file = AdapterFile.open(path, keep="within_budget")
    except WeightsFileError:  # a damaged file still has a hash if it can be read
        return _unusable(file_sha256(path), describe_adapter(path))
    header, summary = file.header, describe_header(file.header, path.name)
    if summary.problems:
        return _unusable(file.sha256, summary)
    modules = modules_of(header, path.name)
    # Few operations support float8.
    tensors = {key: tensor.float() for key, tensor in stored_tensors(file).items()}
    alphas = {
        module: float(tensors[parts["alpha"]])
        for module, parts in modules.items()
        if "alpha" in parts
    }
    problems = (
        *_value_problems(modules, tensors),
        *_alpha_problems(modules, alphas, header, path.name),
    )
    fit = FamilyFit("")
    if not any(problem.unusable for problem in problems):
        try:
            adapter = adapter_of(file, tensors)
        except (AdapterError, WeightsFileError) as error:  # factors whose shapes do not match
            problems = (*problems, Problem("unusable", str(error), True))
        else:
            fit = best_family(adapter)
            if base_model:
                family = get_family(model or fit.model or "sd15")
                fit = fit_of_base(adapter, BaseFiles.find(family, base_model))
                fit_problems = _base_problems(adapter, fit, base_model)
            else:
                fit_problems = _fit_problems(adapter, summary, fit)
            problems = (*problems, *_zero_alpha_problems(adapter, alphas), *fit_problems)
    return Examination(
        file.sha256,
        summary,
        _distinct(tuple(alphas.values())),
        fit.model,
        fit.matched,
        fit.same_shapes,
        problems,
    )


def _unusable(sha256: str, summary: AdapterSummary) -> Examination:
    problems = tuple(Problem("unusable", problem, True) for problem in summary.problems)
    return Examination(sha256, summary, (), "", 0, 0, problems)


def _value_problems(
    modules: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """Yield problems of the values: NaN, and factors of zeros, which give a module no effect."""
    keys = [
        key for parts in modules.values() for part, key in parts.items() if part != "alpha"
    ] or list(tensors)
    broken = [key for key in keys if not tensors[key].isfinite().all()]
    if broken:
        yield Problem(
            "not_finite",
            f"{len(broken)} tensors have NaN or infinite values ({listed(broken)}): training "
            "diverged or the file is damaged. Use an earlier checkpoint.",
            True,
        )
    idle = [
        module
        for module, parts in modules.items()
        if _is_idle(parts, {part for part, key in parts.items() if not tensors[key].any()})
    ]
    if idle and len(idle) == len(modules):
        message = (
            "Nothing was learned: every module has a factor of zeros, so images are the same as "
            "without the adapter."
        )
        yield Problem("nothing_learned", message, False)
    elif idle:
        yield Problem(
            "partly_learned",
            f"{len(idle)} of {len(modules)} modules have no effect ({listed(idle)}).",
            False,
        )


def _is_idle(parts: Collection[str], zeros: Set[str]) -> bool:
    """Return True if a module with these parts has no effect because `zeros` contain only zeros."""
    vectors = {"diff_b", "up_bias"} & set(parts)
    if not vectors <= zeros:
        return False
    match kind_of(parts):
        case "full" | "norm":
            return set(parts) - {"alpha"} <= zeros
        case "glora":
            is_zero = bool({"a1", "a2"} & zeros) and bool({"b1", "b2"} & zeros)
            return is_zero or "scalar" in zeros
        case "oft":
            return "oft_blocks" in zeros and "rescale" not in parts
        case "ia3":
            return "ia3" in zeros
        case _:  # a magnitude of LyCORIS or PEFT has an effect without the other factors
            is_decomposed = "dora_scale" in parts or "peft_magnitude" in parts
            return not is_decomposed and bool(zeros - {"alpha"} - vectors)


def _alpha_problems(
    modules: Mapping[str, Mapping[str, str]], alphas: Mapping[str, float], header: Header, name: str
) -> Iterator[Problem]:
    """Yield problems of alphas: not finite, or missing where the metadata has none either."""
    whole = {module for module, parts in modules.items() if {"lokr_w1", "lokr_w2"} <= parts.keys()}
    if harmful := [
        module
        for module, alpha in alphas.items()
        if module not in whole and not math.isfinite(alpha)
    ]:
        yield Problem(
            "infinite_alpha",
            f"The alpha of {len(harmful)} modules is not a finite number ({listed(harmful)}).",
            True,
        )
    if harmless := [
        module for module, alpha in alphas.items() if module in whole and not alpha < _NO_ALPHA
    ]:
        yield Problem(
            "infinite_alpha",
            f"The alpha of {len(harmless)} LoKr modules with whole factors is "
            f"{alphas[harmless[0]]:g}, as written by the trainer. It has no meaning and is ignored "
            "here; programs that use it produce noise.",
            False,
        )
    try:
        metadata = PeftMetadata(header.metadata, name)
        missing = [
            module
            for module, parts in modules.items()
            if kind_of(parts) in SCALED_KINDS
            and module not in alphas
            and module not in whole
            and metadata.alpha_of(module) is None
        ]
    except (AdapterError, WeightsFileError) as error:
        yield Problem("unusable", str(error), True)
        return
    if missing:
        message = (
            f"{len(missing)} of {len(modules)} modules have no alpha ({listed(missing)}); their "
            "rank is used instead."
        )
        # With PEFT's names, the trainer uses the rank whatever the configuration says.
        if all(
            "magnitude" in modules[module] and ".lora_A." not in modules[module]["down"]
            for module in missing
        ):
            message = (
                "A DoRA file has no alpha: the alpha is in the configuration of the training run. "
                "Without that configuration, the rank is used."
            )
        yield Problem("missing_alpha", message, False)


def _zero_alpha_problems(adapter: Adapter, alphas: Mapping[str, float]) -> Iterator[Problem]:
    """Yield a note if modules have an alpha of 0, whose meaning differs between programs."""
    if note := zero_alpha_note(adapter):
        yield Problem("zero_alpha", note[0].upper() + note[1:], False)
    elif is_from_trainer(adapter.metadata) and 0 in alphas.values():
        message = (
            "An alpha of 0 is read as the rank, as AI Toolkit reads it. In AUTOMATIC1111, ComfyUI "
            "and diffusers, these modules have no effect."
        )
        yield Problem("zero_alpha", message, False)


def _distinct(alphas: Sequence[float]) -> tuple[float, ...]:
    """Return the distinct alphas, ascending; NaN at most once and last."""
    numbers = sorted({alpha for alpha in alphas if not math.isnan(alpha)})
    return (*numbers, math.nan) if any(map(math.isnan, alphas)) else tuple(numbers)


def _base_problems(adapter: Adapter, fit: FamilyFit, base_model: str) -> Iterator[Problem]:
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


def _fit_problems(adapter: Adapter, summary: AdapterSummary, fit: FamilyFit) -> Iterator[Problem]:
    """Yield a problem if the adapter fits no supported family, or not its default base."""
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
    """Return a note about an adapter whose modules have no shape of the default base model."""
    return (
        f"None of its modules has the shape that it has in {get_family(fit.model).title}, so it "
        "fits only the base model that it was trained on. Give that one as --base-model to compare "
        "them."
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
