"""The base model of a training run, where it is not the one on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from fidelora.errors import BaseModelNotFoundError
from fidelora.training.run_folder import TrainingRun
from fidelora.weights.locate import is_local

BUNDLED_BASES: Mapping[str, str] = MappingProxyType({"golden/miniature": "fidelora:miniature"})
"""Base models that are part of the package, by their names in configurations of training runs."""


@contextmanager
def advice_on_base(run: TrainingRun, base_model: str | None) -> Iterator[None]:
    """Explain a missing base model that the configuration of a run names.

    Such a name is often the path of the machine where the run was trained.

    Args:
        base_model: base model that the user named instead; None for the one in the configuration.

    Raises:
        BaseModelNotFoundError: the base model in the configuration was not found.
    """
    try:
        yield
    except BaseModelNotFoundError as error:
        if base_model is not None or is_local(run.base_model):
            raise
        advice = (
            f"add `--base-model {BUNDLED_BASES[run.base_model]}`, the same model"
            if run.base_model in BUNDLED_BASES
            else "add `--base-model PATH` with that model: a diffusers folder, a .safetensors "
            "checkpoint or a hub id"
        )
        raise BaseModelNotFoundError(
            f"The training run {run.name} was trained on the base model {run.base_model:.300}, "
            f"which was not found. If it is a path of another machine, {advice}. ({error})"
        ) from error
