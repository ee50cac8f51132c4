"""`fidelora explain --write`: files with the settings of another program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fidelora.atomic import write_atomically
from fidelora.cli.console import fail, make_output_folder
from fidelora.cli.verify_options import NOTHING_TO_CHECK

if TYPE_CHECKING:
    from fidelora.engine.engine import Engine
    from fidelora.training.plan import PlannedSample
    from fidelora.training.run_folder import TrainingRun

ShowProgress = Callable[[str, int, int], None]


def samples_of(
    run: TrainingRun, step: int | None, index: int | None, base_model: str | None
) -> list[PlannedSample]:
    """Return the samples of a step whose files exist; exit if there are none.

    Args:
        step: None for the last sampled step that has a checkpoint or is 0.
        index: None for all samples.
    """
    from fidelora.training.plan import plan_samples

    if step is None:
        steps = [one for one in run.sampled_steps if one == 0 or one in run.checkpoints]
        step = max(steps, default=None)
    plans = [] if step is None else plan_samples(run, step, base_model=base_model)
    found = [
        plan for plan in plans if plan.trainer_image is not None and index in (None, plan.index)
    ]
    if not found:
        fail(
            f"The training run {run.name} has no such sample to compare with; set --step and "
            "--index to a sample whose file and checkpoint exist.",
            NOTHING_TO_CHECK,
        )
    return found


def write_settings(
    plans: Sequence[PlannedSample],
    program: str,
    folder: Path,
    engine: Engine,
    show: ShowProgress | None,
) -> list[dict[str, Any]]:
    """Write the program's nearest settings for each sample.

    Args:
        program: `a1111`, `comfyui` or `diffusers`.
        show: called before each image with the kind of work, the number of finished samples, and
            the number of all samples.

    Returns:
        an entry for each file, as `--json` prints it.
    """
    from fidelora.explain.nearest import nearest_picture
    from fidelora.explain.simulation import Simulator
    from fidelora.explain.write import SUFFIXES, written

    target = next(one for one in SUFFIXES if one.lower() == program)
    make_output_folder(folder)
    unique = {(plan.round, plan.index): plan for plan in plans}
    entries = []
    for done, plan in enumerate(unique.values()):

        def report(done: int = done) -> None:
            if show is not None:
                show(f"measuring {target}", done, len(unique))

        nearest = nearest_picture(plan, target, Simulator(engine, plan.recipe, report))
        path = folder / f"{program}_{plan.round}_{plan.index}{SUFFIXES[target]}"
        write_atomically(path, written(nearest).encode())
        entries.append(
            {
                "file": str(path),
                "program": target,
                "step": plan.step,
                "index": plan.index,
                "sampling": nearest.there.sampling,
                "distance": nearest.there.distance,
                "notes": list(nearest.notes),
            }
        )
    return entries


def lines_on(files: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the entries of `write_settings` as lines of text."""
    for entry in files:
        yield (
            f"{entry['file']}: {entry['sampling']}. The mean difference of the simulated picture "
            f"from the sample is {entry['distance']:.2f} levels."
        )
    for note in dict.fromkeys(note for entry in files for note in entry["notes"]):
        yield f"  Note: {note}"
