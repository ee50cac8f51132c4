"""Adapters of a recipe, bound to a loaded base model and applied to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

from fidelora.adapters.bound import BoundAdapter
from fidelora.adapters.library import AdapterLibrary
from fidelora.adapters.live import live_adapters
from fidelora.adapters.read import Adapter, zero_alpha_note
from fidelora.engine.adapter_family import check_family, explain_mismatch
from fidelora.engine.model import LoadedModel
from fidelora.errors import AdapterFormatError, AdapterMismatchError
from fidelora.families.protocols import Embedding, ExtendableText
from fidelora.recipe import AdapterRef, Recipe

Pairs = list[tuple[BoundAdapter, float]]
"""Adapters bound to a base model, with their multipliers."""


@dataclass(frozen=True)
class Bound:
    """The adapters of a recipe, bound to a base model.

    Attributes:
        training: the recipe's `training_adapters`.
        warnings: sentences for the user about these adapters.
    """

    adapters: Pairs
    history: Pairs
    training: Pairs
    warnings: tuple[str, ...] = ()


def bind(model: LoadedModel, recipe: Recipe, library: AdapterLibrary) -> Bound:
    """Check all adapters of the recipe against the base model before any weight changes.

    Raises:
        AdapterError, WeightsFileError: an adapter cannot be used, or does not fit.
    """
    adapters, warnings = _bind_all(model, library, recipe.adapters)
    history, _ = _bind_all(model, library, recipe.history)
    training, _ = _bind_all(model, library, recipe.training_adapters)
    return Bound(adapters, history, training, tuple(warnings))


def _bind_all(
    model: LoadedModel, library: AdapterLibrary, refs: Sequence[AdapterRef]
) -> tuple[Pairs, list[str]]:
    """Return the bound adapters, and warnings."""
    bound: Pairs = []
    warnings = []
    for ref in refs:
        adapter = library.get(ref)
        if ref.alpha is not None:
            adapter = adapter.with_alpha(ref.alpha)
        if note := check_family(adapter, model.family):
            warnings.append(f"{adapter.name}: {note}")
        if note := zero_alpha_note(adapter):
            warnings.append(f"{adapter.name}: {note}")
        if ref.stage is not None and ref.named_stage not in (None, ref.stage):
            warnings.append(
                f"{ref.name} is used for {ref.stage} noise, but its name contains "
                f"{ref.named_stage}_noise. The two files of a training run may be swapped."
            )
        _check_word(adapter, ref)
        if adapter.embedding and adapter.modules and not any(other.word for other in refs):
            warnings.append(
                f"{adapter.name} also contains an embedding, but not its word, so the "
                "embedding is not used; add the embedding's own file."
            )
        try:
            one = (
                model.targets.bind(adapter, ref.stage)
                if ref.word is None
                else model.targets.bind_embedding(adapter, ref.word)
            )
            bound.append((one, ref.multiplier))
        except AdapterMismatchError as error:
            raise explain_mismatch(adapter, model.family, error) from error
    return bound, warnings


@contextmanager
def with_adapters(model: LoadedModel, recipe: Recipe, bound: Bound) -> Iterator[None]:
    """Apply the adapters and the history of a recipe; live adapters are removed at the end."""
    # The trainer always runs a DoRA unmerged; a merged one would differ in the last bits.
    live = [
        (one, multiplier)
        for one, multiplier in bound.adapters
        if recipe.adapter_mode == "live" or (one.is_dora and recipe.fidelity == "exact")
    ]
    vectors = model.targets.vectors
    merged = [
        (one.only(vectors), multiplier) if (one, multiplier) in live else (one, multiplier)
        for one, multiplier in bound.adapters
        if (one, multiplier) not in live or not one.deltas.keys().isdisjoint(vectors)
    ]
    # The trainer rounds the factors of a training adapter to the dtype of the base model, and
    # merges them. The live adapter that cancels the merged one is computed in this dtype, too.
    training = [(one.rounded(model.compute_dtype), m) for one, m in bound.training]
    widened = [(one.widened(), m) for one, m in training]
    if model.family.rounds_training_changes:
        widened = [(one.with_rounded_changes(model.compute_dtype), m) for one, m in widened]
    model.merged.apply(
        merged,
        [pair for pair in bound.history if not pair[0].is_dora],
        widened,
    )
    opposite = [(one, -multiplier) for one, multiplier in training]
    with live_adapters(model.targets, [*opposite, *live], model.device):
        yield


def with_embeddings(model: LoadedModel, bound: Bound) -> AbstractContextManager[None]:
    """Return a context in which the base model's text encoders have the recipe's embeddings."""
    embeddings = [
        Embedding(one.word, one.vectors) for one, _ in bound.adapters if one.word is not None
    ]
    if not embeddings:
        return nullcontext()
    # The recipe refuses embeddings if the family does not support them.
    return cast(ExtendableText, model.text).extended(embeddings)


def _check_word(adapter: Adapter, ref: AdapterRef) -> None:
    """Check that the reference has a word if, and only if, the adapter is an embedding.

    Raises:
        AdapterFormatError: the word is missing, or the adapter is not an embedding.
    """
    if adapter.is_embedding and ref.word is None:
        raise AdapterFormatError(
            f"{adapter.name} is an embedding, but the recipe does not contain its word; create "
            "the reference with AdapterRef.from_file(path)."
        )
    if ref.word is not None and not adapter.is_embedding:
        raise AdapterFormatError(
            f"{adapter.name} is not an embedding, but the recipe has the word {ref.word!r} for it; "
            "leave the word out."
        )
