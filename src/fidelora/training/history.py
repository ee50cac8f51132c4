"""Earlier rounds of samples of a training run, which change its base model.

For each round of samples, the trainer merges the adapter into the base model and subtracts it
afterwards. Both results are rounded to the dtype of the base model, so the weights drift
(`MergedAdapters.apply`). A sample depends on all rounds since the trainer's process started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fidelora.recipe import AdapterRef
from fidelora.training.run_folder import TrainingRun


@dataclass(frozen=True)
class History:
    """The rounds of samples before a step.

    Attributes:
        rounds: steps of the rounds whose adapters are known, in order.
        missing: steps of rounds whose checkpoints no longer exist, because the trainer deletes old
            checkpoints.
        resumed_after: step of the last round before the run was resumed, which reloads the base
            model without drift; None if the run was not resumed.
    """

    rounds: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    resumed_after: int | None = None

    @property
    def summary(self) -> str:
        """The history as one sentence; empty without earlier rounds."""
        since = (
            f"The run was resumed after step {self.resumed_after}; its folder does not show that. "
            if self.resumed_after is not None
            else ""
        )
        replayed = (
            f"Earlier rounds of samples were replayed (steps {', '.join(map(str, self.rounds))}). "
            if self.rounds
            else ""
        )
        lost = (
            "Some earlier rounds cannot be replayed, because their checkpoints are missing "
            f"(steps {', '.join(map(str, self.missing))}). "
            if self.missing
            else ""
        )
        return (since + replayed + lost).strip()


NO_HISTORY = History()


def full_history(run: TrainingRun, step: int) -> History:
    """Return the history of a step of a run that was not resumed."""
    return _history(run, _rounds_before(run, step))


def resumed_histories(run: TrainingRun, step: int) -> Iterator[History]:
    """Yield the histories of a step of a resumed run, those with the fewest rounds first."""
    rounds = _rounds_before(run, step)
    for first in reversed(range(1, len(rounds) + 1)):
        yield replace(_history(run, rounds[first:]), resumed_after=rounds[first - 1])


def refs_of(run: TrainingRun, history: History, multiplier: float) -> tuple[AdapterRef, ...]:
    """Return the adapters of the history's rounds.

    Args:
        multiplier: multiplier of all samples of the run.

    Raises:
        WeightsFileError: a file is invalid or cannot be read.
    """
    return tuple(
        replace(_ref(path, *_stamp(path)), multiplier=multiplier, stage=stage)
        for step in history.rounds
        for path, stage in run.files(step)
    )


def _history(run: TrainingRun, rounds: tuple[int, ...]) -> History:
    return History(
        tuple(step for step in rounds if step in run.checkpoints),
        tuple(step for step in rounds if step not in run.checkpoints),
    )


def _rounds_before(run: TrainingRun, step: int) -> tuple[int, ...]:
    """Return the steps of earlier rounds, without step 0: its adapter changes no weight.

    The rounds are those that have images and those that `sample_every` implies, because images may
    have been removed.
    """
    every = range(run.sample_every, step, run.sample_every) if run.sample_every else ()
    sampled = (other for other in run.sampled_steps if 0 < other < step)
    return tuple(sorted({*every, *sampled}))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _ref(path: Path, _size: int, _modified_ns: int) -> AdapterRef:
    """Return a reference to the file, hashed once; the content is not kept in memory."""
    ref = AdapterRef.from_file(path)
    if ref.file is not None:
        ref.file.drop_content()
    return ref
