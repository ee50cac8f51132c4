"""Initial embedding of a training run, which the trainer does not save.

The samples of step 0 use it. It consists of vectors that the base model has for `init_words`, so it
can be computed from the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from fidelora.engine.engine import Engine
from fidelora.safetensors_header import read_file_header
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import TrainingRun


def with_initial_embedding(
    run: TrainingRun,
    engine: Engine,
    folder: Path,
    *,
    base_model: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Return the run with a file of its initial embedding, as the embedding of step 0.

    A run without an embedding, or without samples, is returned unchanged.

    Args:
        folder: existing folder for the file.
        base_model: replaces the base model in the configuration.
        changes: recipe fields that replace the run's.

    Raises:
        FideloraError: the base model cannot be used.
    """
    planned = plan_samples(run, 0, base_model=base_model)
    if run.embedding is None or not planned:
        return run
    recipe = replace(planned[0].recipe, **(changes or {}))
    vectors = engine.initial_embedding(recipe, run.embedding.init_words, run.embedding.tokens)
    path = folder / f"{run.embedding.word}_{0:09d}.safetensors"
    # The noise of samples depends on the trainer's version in the metadata.
    saved = next(iter(run.embedding.files.values()), None)
    metadata = dict(read_file_header(saved).metadata) if saved else {}
    safetensors.torch.save_file(vectors, path, {**metadata, "step": "0"})
    files = {**run.embedding.files, 0: path}
    return replace(run, embedding=replace(run.embedding, files=files))
