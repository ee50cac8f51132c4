"""`fidelora demo`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.cli.console import Debug, Device, fail
from fidelora.files import make_folder
from fidelora.recipe import AdapterRef

if TYPE_CHECKING:
    from PIL.Image import Image

    from fidelora.engine.engine import Engine
    from fidelora.preview.compare import Comparison
    from fidelora.preview.replay import PlannedSample

DATA = Path(__file__).parent.parent / "demo_data"
_JOB = DATA / "lora_linear_f32"
_BASE = DATA / "tiny-sd15"


def demo(
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("fidelora-demo"),
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Make the last previews of a real training job again, and say for each whether it equals the trainer's own.

    The job comes with Fidelora. AI Toolkit trained it on a base model so small that its pictures are noise; what counts is that
    the same numbers come out. At the end one preview is made with a wrong multiplier, to show that a difference is seen.
    """
    from fidelora.engine.engine import Engine
    from fidelora.preview.job_folder import read_job
    from fidelora.preview.replay import plan_samples
    from fidelora.preview.sheet import stack

    make_folder(out)
    job = read_job(_JOB)
    samples = plan_samples(job, job.steps, base_model=str(_BASE))
    engine = Engine(device=device)
    typer.echo(f"Job {job.name}: {len(samples)} previews of step {job.steps}, sampler {job.sampler}, {job.dtype}.")

    rows: list[Image] = []
    alike = True
    for sample in samples:
        recipe = sample.recipe
        title = f"preview {sample.index}: {recipe.width}x{recipe.height}, {recipe.steps} steps, seed {recipe.seed}"
        comparison = _show(engine, sample, title, rows)
        alike = alike and comparison.within_rounding

    first = samples[0]
    adapter = first.recipe.adapters[0]
    wrong = AdapterRef(adapter.sha256, 0.5, adapter.name, adapter.path)
    control = replace(first, recipe=replace(first.recipe, adapters=(wrong,)))
    seen = not _show(engine, control, "control: preview 0 with multiplier 0.5 in place of 1", rows).within_rounding

    sheet = out / "demo.png"
    stack(rows).save(sheet)
    typer.echo(f"Side by side: {sheet}")
    if not alike:
        fail("A preview came out different: other versions of torch or diffusers, or a device whose arithmetic differs.", 1)
    if not seen:
        fail("The control came out equal, so this comparison proves nothing.", 1)
    typer.echo("All previews were made again, and the wrong multiplier was seen.")


def _show(engine: Engine, sample: PlannedSample, title: str, rows: list[Image]) -> Comparison:
    import numpy as np
    from PIL import Image

    from fidelora.preview.compare import compare_with_preview
    from fidelora.preview.sheet import side_by_side

    assert sample.preview is not None, "the demo's job comes with its previews"
    image = engine.generate(sample.recipe)
    comparison = compare_with_preview(image.pixels, sample.preview)
    typer.echo(f"  {title}: {comparison.in_words}")
    with Image.open(sample.preview) as preview:
        rows.append(side_by_side(np.asarray(preview.convert("RGB")), image.pixels, f"{title}: {comparison.in_words}"))
    return comparison
