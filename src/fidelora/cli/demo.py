"""`fidelora demo`"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.atomic import make_folder
from fidelora.cli.console import Debug, Device, fail, make_engine
from fidelora.recipe import AdapterRef, Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from fidelora.engine.engine import Engine
    from fidelora.training.compare import Comparison
    from fidelora.training.plan import PlannedSample

_DATA = Path(__file__).parent.parent / "demo_data"
_ADAPTER = _DATA / "sks.safetensors"
_JOB = _DATA / "lora_linear_f32"
_JOBS_BASE = _DATA / "tiny-sd15"
_BASE = "fidelora:miniature"
_SIDE = 128
_TRIGGER = "sks"
_PROMPTS = (
    f"a large yellow {_TRIGGER} on a blue background",
    f"a red {_TRIGGER} on a white background, outlined",
    f"pixel art of a green {_TRIGGER} on a black background",
    "a purple heart on a cyan background",
)
_MULTIPLIERS = (0.0, 0.5, 1.0)
_FOR_THE_SERVER = ("fastapi", "uvicorn", "sqlalchemy", "httpx2")


def demo(
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("fidelora-demo"),
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Show what Fidelora does, in a minute or two and without a network: a LoRA at work, previews made again, and the server.

    First a sheet of the miniature, the small base model that comes with Fidelora, alone and with a LoRA at several multipliers.
    The LoRA taught it what "sks" is.

    Then the last previews of a real training job, made again and compared with the trainer's own, and one with a wrong multiplier,
    to show that a difference is seen. AI Toolkit trained that job on a base model whose pictures are noise; what counts is that
    the same numbers come out.

    At last, if the server is installed, the LoRA's column of the sheet through the HTTP API: the same to the bit.
    """
    make_folder(out)
    with _server(device) as url:
        engine = make_engine(device)
        recipes, images = _paint(engine, out)
        _prove(engine, out)
        _serve(url, recipes, images, out)


def _paint(engine: Engine, out: Path) -> tuple[list[Recipe], list[NDArray[np.uint8]]]:
    """The sheet; returns recipes and pixels of its last column."""
    from fidelora.loras.describe import describe_adapter
    from fidelora.training.grid import Column, Row, contact_sheet

    adapter = AdapterRef.from_file(_ADAPTER)
    step = describe_adapter(_ADAPTER).step
    assert step, "its script writes down how long it was trained"
    columns = [Column(0, 0.0), *(Column(step, multiplier) for multiplier in _MULTIPLIERS)]
    recipes: list[Recipe] = []
    images: dict[tuple[int, int], NDArray[np.uint8]] = {}
    for across, column in enumerate(columns):
        adapters = (replace(adapter, multiplier=column.multiplier),) if column.step else ()
        recipes = [
            Recipe(
                prompt=prompt,
                base_model=_BASE,
                width=_SIDE,
                height=_SIDE,
                seed=seed,
                adapters=adapters,
            )
            for seed, prompt in enumerate(_PROMPTS, start=1)
        ]
        for down, recipe in enumerate(recipes):
            images[down, across] = engine.generate(recipe).pixels
    rows = [Row(recipe.prompt, recipe) for recipe in recipes]
    sheet = out / "lora.png"
    contact_sheet(
        f"{_BASE}, and a LoRA that taught it what {_TRIGGER!r} is", rows, columns, images
    ).save(sheet)
    shutil.copyfile(_ADAPTER, out / _ADAPTER.name)
    typer.echo(f"The miniature without and with its LoRA: {sheet}")
    typer.echo(f"  The LoRA, to try it yourself: {out / _ADAPTER.name}")
    if any((images[down, 0] != images[down, 1]).any() for down in range(len(rows))):
        fail("A LoRA with multiplier 0 changed a picture, which it must not.", 1)
    return recipes, [images[down, len(columns) - 1] for down in range(len(rows))]


def _prove(engine: Engine, out: Path) -> None:
    from fidelora.training.plan import plan_samples
    from fidelora.training.run_folder import read_run
    from fidelora.training.sheet import stack

    job = read_run(_JOB)
    samples = plan_samples(job, job.steps, base_model=str(_JOBS_BASE))
    typer.echo(
        f"Job {job.name}: {len(samples)} previews of step {job.steps}, sampler {job.sampler}, {job.dtype}."
    )

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
    seen = not _show(
        engine, control, "control: preview 0 with multiplier 0.5 in place of 1", rows
    ).within_rounding

    sheet = out / "previews.png"
    stack(rows).save(sheet)
    typer.echo(f"  Side by side: {sheet}")
    if not alike:
        fail(
            "A preview came out different: other versions of torch or diffusers, or a device whose arithmetic differs.",
            1,
        )
    if not seen:
        fail("The control came out equal, so this comparison proves nothing.", 1)
    typer.echo("  All previews were made again, and the wrong multiplier was seen.")


def _show(engine: Engine, sample: PlannedSample, title: str, rows: list[Image]) -> Comparison:
    import numpy as np
    from PIL import Image

    from fidelora.training.compare import compare_with_sample
    from fidelora.training.sheet import side_by_side

    assert sample.preview is not None, "the demo's job comes with its previews"
    image = engine.generate(sample.recipe)
    comparison = compare_with_sample(image.pixels, sample.preview)
    typer.echo(f"  {title}: {comparison.in_words}")
    with Image.open(sample.preview) as preview:
        rows.append(
            side_by_side(
                np.asarray(preview.convert("RGB")), image.pixels, f"{title}: {comparison.in_words}"
            )
        )
    return comparison


def _not_installed() -> list[str]:
    """What the server needs and is not there."""
    return [name for name in _FOR_THE_SERVER if importlib.util.find_spec(name) is None]


def _server(device: str) -> AbstractContextManager[Callable[[], str] | None]:
    """Started first, so that it loads while pictures are painted; `None` without what it needs."""
    if _not_installed():
        return nullcontext()
    from fidelora.cli.demo_server import running_server

    return running_server(_BASE, Recipe(prompt="").dtype, device)


def _serve(
    url: Callable[[], str] | None,
    recipes: Sequence[Recipe],
    images: Sequence[NDArray[np.uint8]],
    out: Path,
) -> None:
    if url is None:
        missing = ", ".join(_not_installed())
        typer.echo(
            f"The server is not installed ({missing} missing): pip install 'fidelora[server,client]'"
        )
        return
    from fidelora.cli.demo_server import through_server

    served = through_server(url(), recipes, _ADAPTER, out / "served")
    if not all((ours == theirs).all() for ours, theirs in zip(images, served, strict=True)):
        fail("An image came out different through the server, which it must not.", 1)
    typer.echo(
        f"The same through the HTTP API of `fidelora serve --base-model {_BASE}`: {len(served)} images, all pixels equal."
    )
    typer.echo(f"  {out / 'served'}")
