"""Examine an adapter file, including its weights: kind, matching base models, problems."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fidelora.adapter_file import AdapterFile
from fidelora.adapters.formats import SCALED_KINDS, kind_of
from fidelora.adapters.peft_metadata import PeftMetadata
from fidelora.adapters.read import Adapter, adapter_of, stored_tensors, zero_alpha_note
from fidelora.adapters.tensor_names import is_from_trainer, modules_of
from fidelora.engine.adapter_family import FamilyFit, best_family, fit_of_base
from fidelora.engine.fit_problems import Problem, base_problems, fit_problems
from fidelora.errors import AdapterError, WeightsFileError
from fidelora.families import get_family
from fidelora.loras.describe import AdapterSummary, describe_adapter, describe_header
from fidelora.recipe import file_sha256
from fidelora.safetensors_header import Header
from fidelora.texts import listed
from fidelora.weights.files import BaseFiles

_NO_ALPHA = 1e10
"""Alpha that the trainer stores for LoKr modules with whole factors; infinite in float16."""


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
                found = base_problems(adapter, fit, base_model)
            else:
                found = fit_problems(adapter, summary, fit)
            problems = (*problems, *_zero_alpha_problems(adapter, alphas), *found)
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
