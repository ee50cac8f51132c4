"""`fidelora demo`."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.cli.console import fail, make_engine, make_output_folder, progress_display
from fidelora.cli.options import Debug, Device
from fidelora.recipe import AdapterRef, Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from fidelora.engine.engine import Engine
    from fidelora.training.plan import PlannedSample

_DATA = Path(__file__).parent.parent / "demo_data"
_ADAPTER = _DATA / "sks.safetensors"
_RUN = _DATA / "zrk_fp32"
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
    """Demonstrate Fidelora without a network.

    It takes half a minute on two processor cores with AVX-512, and longer on older processors.

    Generates pictures with the miniature, the small base model that is part of Fidelora, alone and
    with a LoRA at several multipliers. The LoRA teaches the model the word "sks".

    Then verifies a real training run of AI Toolkit: its samples are replayed and compared with the
    trainer's. One sample is also replayed with a wrong multiplier, to show that a difference is
    detected.

    If the server is installed, generates the pictures of the LoRA again through the HTTP API and
    checks that every pixel is the same.
    """
    make_output_folder(out)
    with _start_server(device) as url:
        engine = make_engine(device)
        recipes, images = _make_lora_sheet(engine, out)
        _verify_run(engine, out)
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


def _verify_run(engine: Engine, out: Path) -> None:
    from fidelora.training.evidence import Verdict
    from fidelora.training.run_folder import read_run
    from fidelora.training.sheet import side_by_side, stack_vertically
    from fidelora.training.verify import check_sample, verify, worst_verdict

    run = read_run(_RUN)
    with progress_display() as show:
        samples = verify(run, engine, [run.steps], base_model=_BASE, on_progress=show)
        control = check_sample(_halved(samples[0].plan), engine)
    typer.echo(
        f"Training run {run.name}: {len(samples)} samples of step {run.steps}, "
        f"sampler {run.sampler}, {run.dtype}."
    )
    rows: list[Image] = []
    titles = [f"{one.plan.recipe.prompt}, seed {one.plan.recipe.seed}" for one in samples]
    titles.append("control: the first sample with multiplier 0.5 instead of 1")
    for title, sample in zip(titles, [*samples, control], strict=True):
        typer.echo(f"  {title}: {sample.summary}")
        rows.append(side_by_side(sample.trainer, sample.replayed, f"{title}: {sample.summary}"))
    for reason in dict.fromkeys(sample.reason for sample in samples if sample.reason):
        typer.echo(f"  {reason}")
    sheet = out / "samples.png"
    stack_vertically(rows).save(sheet)
    typer.echo(f"  Side by side: {sheet}")
    if worst_verdict(samples) not in (Verdict.IDENTICAL, Verdict.ROUNDING):
        fail(
            "A replayed sample differs from the trainer's. Possible causes: the versions of torch "
            "and diffusers, or the arithmetic of the device.",
            1,
        )
    nearest = min(math.inf if one.psnr is None else one.psnr for one in samples)
    if control.verdict is not Verdict.MISMATCH or (control.psnr or 0) >= nearest:
        fail(
            "The control sample is as near to the trainer's as the others despite its wrong "
            "multiplier, so the comparison cannot detect differences.",
            1,
        )
    typer.echo("  All samples were replayed, and the wrong multiplier was detected.")


def _halved(sample: PlannedSample) -> PlannedSample:
    """Return a sample with half the multiplier."""
    adapters = tuple(replace(one, multiplier=one.multiplier / 2) for one in sample.recipe.adapters)
    return replace(sample, recipe=replace(sample.recipe, adapters=adapters))


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
