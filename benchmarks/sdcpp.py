"""stable-diffusion.cpp as a measured process, through `stable-diffusion-cpp-python`.

    python -m benchmarks.sdcpp FOLDER

The package may be installed in a different environment from the other processes. It reads a folder
in the diffusers layout with the names of `full_size.with_older_names`. Its convolutions are always
float16.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.processes import ROOT, answer_requests

GUIDANCE = 6.0


def is_installed(python: str) -> bool:
    """True if this interpreter can import stable-diffusion.cpp."""
    command = [python, "-c", "import stable_diffusion_cpp"]
    return subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 0


def main() -> None:
    from stable_diffusion_cpp import StableDiffusion  # type: ignore[import-not-found]  # optional

    model = StableDiffusion(
        model_path=sys.argv[1], wtype="f32", n_threads=os.cpu_count(), verbose=False
    )

    def image(prompt: str, size: int, steps: int, seed: int) -> dict[str, float]:
        """Return the seconds of each part of one image; `step` is the mean of its steps."""
        marks: list[float] = []

        def note(step: int, _steps: int, _seconds: float) -> None:
            # Called before the first step, after each step, and again by the later stages.
            if step >= len(marks):
                marks.append(time.perf_counter())

        start = time.perf_counter()
        (picture,) = model.generate_image(
            prompt=prompt,
            width=size,
            height=size,
            cfg_scale=GUIDANCE,
            sample_method="euler_a",
            sample_steps=steps,
            seed=seed,
            progress_callback=note,
        )
        decoded = time.perf_counter()
        picture.save(io.BytesIO(), "PNG")
        end = time.perf_counter()
        parts: dict[str, Any] = {
            "text": marks[0] - start,
            "step": (marks[steps] - marks[0]) / steps,
        }
        return parts | {
            "decode": decoded - marks[steps],
            "encode": end - decoded,
            "total": end - start,
        }

    answer_requests({"image": image})


if __name__ == "__main__":
    main()
