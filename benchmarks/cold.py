"""Time from process start to the first finished step of an image with an adapter.

    python -m benchmarks.cold peer|exact|fast|second FOLDER ADAPTER SIZE

runs one such process, which prints a line when the step is finished; the caller measures the time.
Files are in the page cache. `second` makes an exact image with a resident engine that an earlier
command has already used.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from benchmarks.processes import ROOT, plain_environment, rounds, warm

PROMPT, STEPS, GUIDANCE = "a photo of a cat", 25, 6.0
_SETTLE_S = 5.0
"""Seconds between two processes, in which the resident engine finishes a step of the first."""


def measure(settings: Any) -> Any:
    """Return the `Findings` of this part.

    Imports are local because the measured processes import this module, too.
    """
    import torch
    from benchmarks import full_size
    from benchmarks.report import Findings, Settings

    assert isinstance(settings, Settings)
    size = 128 if settings.quick else 256
    base = full_size.base(settings.folder)
    files = [
        *base.rglob("*.safetensors"),
        full_size.adapter(settings.folder),
        *Path(torch.__file__).parent.glob("lib/*.so*"),
    ]
    arguments = [str(base), str(full_size.adapter(settings.folder)), str(size)]
    seconds: dict[str, list[float]] = {way: [] for way in ("peer", "exact", "fast")}
    for _ in rounds(0.0 if settings.quick else 90.0, least=1, most=5):
        for way, runs in seconds.items():
            warm(files)
            runs.append(_start(way, *arguments))
    seconds["second"] = []
    with _resident_engine() as environment:
        _start("second", *arguments, **environment)  # loads the base model
        for _ in range(1 if settings.quick else 5):
            time.sleep(_SETTLE_S)
            seconds["second"].append(_start("second", *arguments, **environment))
    found = Findings(raw=dict(seconds))
    for way in ("exact", "fast"):
        found.add_times(
            f"cold start to the end of the first step at {size}, with an adapter: {way}",
            seconds["peer"],
            seconds[way],
        )
    found.add_times(
        f"the same, with a resident engine, second command of a session at {size}: exact",
        seconds["peer"],
        seconds["second"],
    )
    found.notes.append(
        "Cold start: a new process with all imports, files in the page cache. Fidelora's engine is "
        "set up as the command line sets it up."
    )
    return found


@contextmanager
def _resident_engine() -> Iterator[dict[str, str]]:
    """Run `fidelora serve --local`; yield the variables with which commands find it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"XDG_RUNTIME_DIR": folder}
        process = subprocess.Popen(
            [sys.executable, "-m", "fidelora", "serve", "--local", "--device", "cpu"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=plain_environment() | environment,
        )
        try:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline(), "the resident engine did not start"
            yield environment
        finally:
            process.terminate()
            process.communicate()


def _start(*arguments: str, **environment: str) -> float:
    """Return the seconds until a new process reports its first step."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.cold", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=plain_environment() | environment,
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    done = any(line == "step\n" for line in lines)
    seconds = time.perf_counter() - start
    process.communicate()
    assert done, f"python -m benchmarks.cold {' '.join(arguments)} failed"
    return seconds


def _report_and_exit(*_arguments: Any) -> NoReturn:
    print("step", flush=True)
    os._exit(0)


def _peer(folder: str, adapter: str, size: int) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.load_lora_weights(adapter)
    shape = {
        "width": size,
        "height": size,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
    }
    pipe(
        PROMPT,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=_report_and_exit,
        **shape,
    )


def _ours(
    fidelity: Literal["exact", "fast"], folder: str, adapter: str, size: int, *, resident: bool
) -> None:
    import fidelora.cli  # noqa: F401  # all commands, as `fidelora generate` imports them
    from fidelora import AdapterRef, Recipe
    from fidelora.accel.threads import limit_spinning
    from fidelora.cli.console import make_engine
    from fidelora.cli.engines import image_maker

    limit_spinning()  # like all commands; the resident engine has to have the same environment
    recipe = Recipe(
        prompt=PROMPT,
        base_model=folder,
        adapters=(AdapterRef.from_file(adapter),),
        width=size,
        height=size,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        sampler="ddpm",
        fidelity=fidelity,
    )
    engine = image_maker("cpu") if resident else make_engine("cpu", first=recipe)
    engine.generate(recipe, _report_and_exit)


def main() -> None:
    way, folder, adapter, size = sys.argv[1:]
    if way == "peer":
        _peer(folder, adapter, int(size))
    elif way in ("exact", "fast", "second"):
        fidelity: Any = "exact" if way == "second" else way
        _ours(fidelity, folder, adapter, int(size), resident=way == "second")


if __name__ == "__main__":
    main()
