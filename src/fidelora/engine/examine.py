"""Examine an adapter file, including its weights: kind, matching base models, problems."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from torch import Tensor

from fidelora.adapter_file import AdapterFile
from fidelora.adapters.read import Adapter, adapter_of, stored_tensors
from fidelora.adapters.targets import Targets
from fidelora.adapters.tensor_names import modules_of, peft_alpha
from fidelora.embedding_file import EMBEDDING_KEYS
from fidelora.errors import (
    AdapterError,
    AdapterMismatchError,
    WeightsFileError,
    some,
)
from fidelora.families import Family, all_families, get_family
from fidelora.loras.describe import AdapterSummary, describe_adapter, describe_header
from fidelora.recipe import file_sha256
from fidelora.safetensors_header import Header
from fidelora.weights.files import read_config
from fidelora.weights.strict import empty_part

ProblemCode = Literal[
    "unusable", "not_finite", "other_architecture", "other_base", "nothing_learned",
    "partly_learned", "infinite_alpha", "missing_alpha",
]  # fmt: skip

_FAMILIES = {
    "SDXL": ("lora_te1_", "lora_te2_", "input_blocks_", "output_blocks_"),
    "FLUX": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "Stable Diffusion 3": ("joint_blocks", "transformer_blocks_0_ff_context"),
    "Wan": ("self_attn_q", "self_attn.q"),
}
"""Parts of module names by model family, used only to suggest the model of an unusable file."""


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


@dataclass(frozen=True)
class Examination:
    """Result of examining an adapter.

    Attributes:
        summary: contents of the header.
        alphas: distinct alphas of the modules, ascending; may contain infinity.
        model: id of the family with the largest number of the adapter's modules, compared by name;
            empty if no family has any of them.
        matched: number of modules that exist in this family; for an embedding, number of tensors.
        same_shapes: number of these modules that also fit the shapes of the family's default base.
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


def examine_adapter(path: Path) -> Examination:
    """Read the whole file at `path`, and return its contents and problems.

    Raises:
        AdapterNotFoundError: the file does not exist.
        WeightsFileError: the file cannot be read at all.
    """
    try:
        file = AdapterFile.open(path, keep="within_budget")
    except WeightsFileError:  # a damaged file still has a hash if it can be read
        return _unusable(file_sha256(path), describe_adapter(path))
    header, summary = file.header, describe_header(file.header, path.name)
    if summary.problems:
        return _unusable(file.sha256, summary)
    modules = modules_of(header, path.name)
    tensors = stored_tensors(file)
    alphas = {
        module: float(tensors[parts["alpha"]])
        for module, parts in modules.items()
        if "alpha" in parts
    }
    problems = (*_numbers(modules, tensors), *_alphas(modules, alphas, header, path.name))
    model = ""
    matched = same_shapes = 0
    if not any(problem.unusable for problem in problems):
        try:
            adapter = adapter_of(file, tensors)
        except (AdapterError, WeightsFileError) as error:  # factors whose shapes do not match
            problems = (*problems, Problem("unusable", str(error), True))
        else:
            model, matched, same_shapes = _family(adapter)
            problems = (*problems, *_fit(adapter, summary, model, matched, same_shapes))
    different_alphas = tuple(sorted(set(alphas.values())))
    return Examination(
        file.sha256, summary, different_alphas, model, matched, same_shapes, problems
    )


def _unusable(sha256: str, summary: AdapterSummary) -> Examination:
    problems = tuple(Problem("unusable", problem, True) for problem in summary.problems)
    return Examination(sha256, summary, (), "", 0, 0, problems)


def _numbers(
    modules: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """Yield problems of the values: NaN, and factors of zeros, which give a module no effect."""
    factors = {
        module: [key for part, key in parts.items() if part != "alpha"]
        for module, parts in modules.items()
    } | {key: [key] for key in tensors.keys() & EMBEDDING_KEYS if not modules}
    broken = [key for keys in factors.values() for key in keys if not tensors[key].isfinite().all()]
    if broken:
        yield Problem(
            "not_finite",
            f"{len(broken)} tensors have NaN or infinite values ({some(broken)}): training "
            "diverged or the file is damaged. Use an earlier checkpoint.",
            True,
        )
    idle = [
        module for module, keys in factors.items() if not all(tensors[key].any() for key in keys)
    ]
    if len(idle) == len(factors) and modules:
        message = (
            "Nothing was learned: every module has a factor of zeros, so images are the same as "
            "without the adapter."
        )
        yield Problem("nothing_learned", message, False)
    elif idle and modules:
        yield Problem(
            "partly_learned",
            f"{len(idle)} of {len(modules)} modules have no effect ({some(idle)}).",
            False,
        )


def _alphas(
    modules: Mapping[str, Mapping[str, str]], alphas: Mapping[str, float], header: Header, name: str
) -> Iterator[Problem]:
    whole = {module for module, parts in modules.items() if {"lokr_w1", "lokr_w2"} <= parts.keys()}
    if harmful := [
        module
        for module, alpha in alphas.items()
        if module not in whole and not math.isfinite(alpha)
    ]:
        yield Problem(
            "infinite_alpha",
            f"The alpha of {len(harmful)} modules is not a finite number ({some(harmful)}).",
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
        for_all = peft_alpha(header.metadata, name)
    except (AdapterError, WeightsFileError) as error:
        yield Problem("unusable", str(error), True)
        return
    missing = [module for module in modules if module not in alphas and module not in whole]
    if missing and for_all is None:
        message = (
            f"{len(missing)} of {len(modules)} modules have no alpha ({some(missing)}); their rank "
            "is used instead."
        )
        if all("magnitude" in modules[module] for module in missing):
            message = (
                "A DoRA file has no alpha: the alpha is in the configuration of the training run. "
                "Without that configuration, the rank is used."
            )
        yield Problem("missing_alpha", message, False)


def say_where_it_belongs(
    adapter: Adapter, spec: Family, error: AdapterMismatchError
) -> AdapterMismatchError:
    """Return an error that names the adapter's family if its modules identify it, else `error`."""
    if adapter.metadata.get("ss_base_model_version"):
        return error  # metadata is more reliable; see `refuse_other_family`
    model, matched, _ = _family(adapter)
    return (
        _belongs_to(adapter, get_family(model), spec)
        if model and matched == _size(adapter) and model != spec.id
        else error
    )


def refuse_other_family(adapter: Adapter, spec: Family) -> None:
    """Raise if the adapter's metadata names another supported family, even if its modules fit.

    Raises:
        AdapterMismatchError: the metadata names another family.
    """
    made_for = adapter.metadata.get("ss_base_model_version", "")
    other = next(
        (one for one in all_families().values() if made_for in one.adapter_base_versions), spec
    )
    if other != spec:
        raise _belongs_to(adapter, other, spec)


def _belongs_to(adapter: Adapter, other: Family, spec: Family) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"{adapter.name} is an adapter for {other.title}, but the base model is of family "
        f"{spec.title}. Use the adapter with model {other.id}."
    )


def _family(adapter: Adapter) -> tuple[str, int, int]:
    """Return `model`, `matched` and `same_shapes` of `Examination`."""
    best = ("", 0, 0)
    for model in all_families():
        targets = default_targets(model)
        if adapter.is_embedding:
            matches, fits = targets.match_embedding(adapter)
            size = _size(adapter)
            best = max(best, (model, matches * size, fits * size), key=lambda one: one[1:])
            continue
        found = [
            (delta, target)
            for module, delta in adapter.deltas.items()
            if (target := targets.find(module))
        ]
        same = sum(
            delta.shape_for(target.weight.shape) == tuple(target.weight.shape)
            for delta, target in found
        )
        best = max(best, (model, len(found), same), key=lambda one: one[1:])
    return best


def _size(adapter: Adapter) -> int:
    """Return the number of modules of an adapter, or of tensors of an embedding."""
    return len(adapter.embedding if adapter.is_embedding else adapter.deltas)


@cache
def default_targets(model: str) -> Targets:
    """Return the targets of a family's default base."""
    family = get_family(model)
    modules = {
        part.name: empty_part(part, read_config(family.layout / part.name / "config.json"))
        for part in family.parts
        if part.adapter_prefixes
    }
    return Targets(family, modules)


def _fit(
    adapter: Adapter, summary: AdapterSummary, model: str, matched: int, same_shapes: int
) -> Iterator[Problem]:
    """Yield a problem if the adapter fits no supported family, or not its default base."""
    total = _size(adapter)
    if adapter.is_embedding:
        yield from _fit_embedding(adapter, model, matched, same_shapes)
        return
    if matched < total:
        probably = next(
            (
                family
                for family, marks in _FAMILIES.items()
                if any(m in name for m in marks for name in adapter.deltas)
            ),
            "",
        )
        if summary.base and not (model and summary.base in get_family(model).adapter_base_versions):
            made_for = f"; its metadata says that it was trained on {summary.base}"
        else:
            made_for = f"; its module names are those of {probably}" if probably else ""
        where = f"in {get_family(model).title}" if model else "in any supported model family"
        yield Problem(
            "other_architecture",
            f"{total - matched} of {total} modules are not {where}{made_for}.",
            True,
        )
        return
    spec = get_family(model)
    if 0 < same_shapes < matched:
        message = (
            f"{matched - same_shapes} of {matched} modules have other shapes than in "
            f"{spec.title}. The adapter was trained on a variant (for example, "
            "Stable Diffusion 2 has wider prompt embeddings) and fits only that variant."
        )
        yield Problem("other_base", message, True)
    elif summary.base and summary.base not in spec.adapter_base_versions:
        yield Problem(
            "other_base",
            f"Its metadata says that it was trained on {summary.base}, which is not {spec.title}.",
            False,
        )


def _fit_embedding(
    adapter: Adapter, model: str, matched: int, same_shapes: int
) -> Iterator[Problem]:
    widths = " and ".join(str(vectors.shape[1]) for vectors in adapter.embedding.values())
    if not matched:
        yield Problem(
            "other_architecture",
            f"It is an embedding for other text encoders ({', '.join(adapter.embedding)}) than "
            "those of the supported model families.",
            True,
        )
    elif not same_shapes:
        yield Problem(
            "other_base",
            f"Its vectors have {widths} numbers each, unlike those of {get_family(model).title}. "
            "The embedding fits only the base model that it was trained on.",
            False,
        )
