"""`fidelora demo`."""

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
_RUN = _DATA / "lora_linear_f32"
_RUN_BASE = _DATA / "tiny-sd15"
_BASE = "fidelora:miniature"
_SIDE = 128  # pixels; the miniature was trained at this size
_TRIGGER = "sks"
_PROMPTS = (
    f"a large yellow {_TRIGGER} on a blue background",
    f"a red {_TRIGGER} on a white background, outlined",
    f"pixel art of a green {_TRIGGER} on a black background",
    "a purple heart on a cyan background",
)
_MULTIPLIERS = (0.0, 0.5, 1.0)
_SERVER_PACKAGES = ("fastapi", "uvicorn", "sqlalchemy", "httpx2")


def demo(
    out: Annotated[
        Path, typer.Option("-o", "--output", "--out", metavar="DIR", help="Output folder.")
    ] = Path("fidelora-demo"),
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Demonstrate Fidelora in a minute or two, without a network.

    Generates pictures with the miniature, the small base model that is part of Fidelora, alone and
    with a LoRA at several multipliers. The LoRA teaches the model the word "sks".

    Then replays the last samples of a real training run and compares them with the trainer's. One
    sample is also replayed with a wrong multiplier, to show that a difference is detected. The base
    model of that run is tiny and its samples look like noise, but the comparison is exact.

    If the server is installed, generates the pictures of the LoRA again through the HTTP API and
    checks that every pixel is the same.
    """
    make_folder(out)
    with _start_server(device) as url:
        engine = make_engine(device)
        recipes, images = _make_lora_sheet(engine, out)
        _replay_samples(engine, out)
        _compare_with_server(url, recipes, images, out)


def _make_lora_sheet(engine: Engine, out: Path) -> tuple[list[Recipe], list[NDArray[np.uint8]]]:
    """Write the LoRA's sheet; return the recipes and the pixels of its last column."""
    from fidelora.loras.describe import describe_adapter
    from fidelora.training.grid import Column, Row, contact_sheet

    adapter = AdapterRef.from_file(_ADAPTER)
    step = describe_adapter(_ADAPTER).step
    assert step, "the training script stores the step"
    columns = [Column(0, None), *(Column(step, multiplier) for multiplier in _MULTIPLIERS)]
    recipes: list[Recipe] = []
    images: dict[tuple[int, int], NDArray[np.uint8]] = {}
    for across, column in enumerate(columns):
        multiplier = column.multiplier
        adapters = () if multiplier is None else (replace(adapter, multiplier=multiplier),)
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
    contact_sheet(f"{_BASE} without and with a LoRA for {_TRIGGER!r}", rows, columns, images).save(
        sheet
    )
    shutil.copyfile(_ADAPTER, out / _ADAPTER.name)
    typer.echo(f"Pictures of the miniature without and with its LoRA: {sheet}")
    typer.echo(f"  LoRA: {out / _ADAPTER.name}")
    if any((images[down, 0] != images[down, 1]).any() for down in range(len(rows))):
        fail("A LoRA with multiplier 0 changed a picture; please report this bug.", 1)
    return recipes, [images[down, len(columns) - 1] for down in range(len(rows))]


def _replay_samples(engine: Engine, out: Path) -> None:
    from fidelora.training.plan import plan_samples
    from fidelora.training.run_folder import read_run
    from fidelora.training.sheet import stack_vertically

    run = read_run(_RUN)
    samples = plan_samples(run, run.steps, base_model=str(_RUN_BASE))
    typer.echo(
        f"Training run {run.name}: {len(samples)} samples of step {run.steps}, "
        f"sampler {run.sampler}, {run.dtype}."
    )

    rows: list[Image] = []
    all_match = True
    for sample in samples:
        recipe = sample.recipe
        title = (
            f"sample {sample.index}: {recipe.width}x{recipe.height}, {recipe.steps} steps, "
            f"seed {recipe.seed}"
        )
        comparison = _replay_and_compare(engine, sample, title, rows)
        all_match = all_match and comparison.within_rounding

    first = samples[0]
    adapter = first.recipe.adapters[0]
    halved = AdapterRef(adapter.sha256, 0.5, adapter.name, adapter.path)
    control = replace(first, recipe=replace(first.recipe, adapters=(halved,)))
    detected = not _replay_and_compare(
        engine, control, "control: sample 0 with multiplier 0.5 instead of 1", rows
    ).within_rounding

    sheet = out / "samples.png"
    stack_vertically(rows).save(sheet)
    typer.echo(f"  Side by side: {sheet}")
    if not all_match:
        fail(
            "A replayed sample differs from the trainer's. Possible causes: the versions of torch "
            "and diffusers, or the arithmetic of the device.",
            1,
        )
    if not detected:
        fail(
            "The control sample matches the trainer's despite its wrong multiplier, so the "
            "comparison cannot detect differences.",
            1,
        )
    typer.echo("  All samples were replayed, and the wrong multiplier was detected.")


def _replay_and_compare(
    engine: Engine, sample: PlannedSample, title: str, rows: list[Image]
) -> Comparison:
    import numpy as np
    from PIL import Image

    from fidelora.training.compare import compare_with_sample
    from fidelora.training.sheet import side_by_side

    assert sample.trainer_image is not None, "the demo data contains the samples"
    image = engine.generate(sample.recipe)
    comparison = compare_with_sample(image.pixels, sample.trainer_image)
    typer.echo(f"  {title}: {comparison.summary}")
    with Image.open(sample.trainer_image) as trainer:
        rows.append(
            side_by_side(
                np.asarray(trainer.convert("RGB")), image.pixels, f"{title}: {comparison.summary}"
            )
        )
    return comparison


def _missing_packages() -> list[str]:
    """Return the packages of the server that are not installed."""
    return [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]


def _start_server(device: str) -> AbstractContextManager[Callable[[], str] | None]:
    """Start the server if it is installed; it loads while pictures are generated."""
    if _missing_packages():
        return nullcontext()
    from fidelora.cli.demo_server import running_server

    return running_server(_BASE, Recipe(prompt="").dtype, device)


def _compare_with_server(
    url: Callable[[], str] | None,
    recipes: Sequence[Recipe],
    images: Sequence[NDArray[np.uint8]],
    out: Path,
) -> None:
    if url is None:
        missing = ", ".join(_missing_packages())
        typer.echo(
            f"The server is not installed ({missing} missing). "
            "Install it in the folder of Fidelora's repository with: pip install '.[server,client]'"
        )
        return
    from fidelora.cli.demo_server import through_server

    served = through_server(url(), recipes, _ADAPTER, out / "served")
    if not all((local == remote).all() for local, remote in zip(images, served, strict=True)):
        fail("The server returned a different picture; please report this bug.", 1)
    typer.echo(
        f"Pictures from the HTTP API of `fidelora serve --base-model {_BASE}`: "
        f"{len(served)} images, all pixels equal."
    )
    typer.echo(f"  {out / 'served'}")
