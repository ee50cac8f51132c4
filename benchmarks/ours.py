"""Fidelora as a measured process (see `processes.py`), set up as the command line sets it up.

    python -m benchmarks.ours exact|fast FOLDER

FOLDER is the base model. The engine makes images; `operation` and `switches` only switch adapters.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.operators import step_seconds
from benchmarks.processes import answer_requests, disk_reads, memory

from fidelora import AdapterRef, Engine, GeneratedImage, Recipe
from fidelora.adapters.bound import BoundAdapter
from fidelora.adapters.read import read_adapter
from fidelora.cli.console import make_engine
from fidelora.engine.model import LoadedModel, ModelKey, load_model
from fidelora.jobs.job import new_job
from fidelora.jobs.memory import MemoryStore
from fidelora.storage.images import FolderImages
from fidelora.training.compare import compare, similarity
from fidelora.workers.attempt import AttemptReport
from fidelora.workers.worker import Worker

GUIDANCE = 6.0
MINIATURE = "fidelora:miniature"


class Ours:
    """One engine with one fidelity; the methods are the requests that it can answer."""

    def __init__(self, fidelity: str, folder: str) -> None:
        self._settings: dict[str, Any] = {
            "base_model": folder,
            "guidance_scale": GUIDANCE,
            "sampler": "ddpm",
            "fidelity": fidelity,
        }
        self._engine: Engine = make_engine("cpu")
        self._adapters: dict[str, AdapterRef] = {}

    def image(
        self, prompt: str, size: int, steps: int, seed: int, adapter: str
    ) -> dict[str, float]:
        """Return the seconds of each part of one image; `step` is the mean of its steps."""
        return self._time(
            [self._recipe(prompt, size, steps, seed, adapter)],
            lambda made: [self._engine.generate(made[0])],
        )

    def batch(
        self, prompts: list[str], size: int, steps: int, seed: int, adapter: str
    ) -> dict[str, float]:
        """Return the seconds per image of one batch, by part."""
        recipes = [
            self._recipe(prompt, size, steps, seed + index, adapter)
            for index, prompt in enumerate(prompts)
        ]
        return self._time(recipes, self._engine.generate_batch)

    def operators(self, path: str, size: int) -> dict[str, float]:
        """Return the seconds of a step for each kind of operator."""
        return step_seconds(lambda steps: self.image("a thing", size, steps, 0, path))

    def max_batch(self, size: int) -> int:
        """Return the largest batch of the engine for images of this size."""
        return self._engine.max_batch(Recipe(prompt="", width=size, height=size, **self._settings))

    def memory(self) -> dict[str, int]:
        """See `processes.memory`."""
        return memory()

    def compare(
        self, sampler: str, adapter: str | None, prompts: list[str], size: int, steps: int
    ) -> list[dict[str, Any]]:
        """Compare `fast` and `exact` images of the miniature.

        Return the PSNR in dB (None if all are equal) and the largest difference.
        """
        found = []
        for seed, prompt in enumerate(prompts):
            adapters = (self._ref(adapter),) if adapter else ()
            shape: dict[str, Any] = {
                "width": size,
                "height": size,
                "steps": steps,
                "sampler": sampler,
                "guidance_scale": GUIDANCE,
            }
            exact, fast = (
                self._engine.generate(
                    Recipe(
                        prompt=prompt,
                        base_model=MINIATURE,
                        seed=seed,
                        adapters=adapters,
                        fidelity=fidelity,
                        **shape,
                    )
                ).pixels
                for fidelity in ("exact", "fast")
            )
            found.append(
                {"psnr": similarity(fast, exact)[0], "levels": compare(fast, exact).max_difference}
            )
        return found

    def queue(self, adapters: list[str], size: int, steps: int) -> None:
        """Queue one job with one image for each of these adapters, for `next_jobs`."""
        self._queue = Queue(
            self._engine,
            [
                self._recipe(f"a thing, number {n}", size, steps, n, a)
                for n, a in enumerate(adapters)
            ],
        )

    def next_jobs(self) -> list[dict[str, float]]:
        """Run the worker's next batch.

        Return an equal share of its seconds for each job, and the seconds spent on adapters.
        """
        return self._queue.next_jobs()

    def batches(self, adapters: list[str], size: int, steps: int) -> list[dict[str, Any]]:
        """Return the adapter and the size of each batch, in the order that the worker chooses."""
        engine = BlankEngine()
        queue = Queue(
            engine, [self._recipe("a thing", size, steps, n, a) for n, a in enumerate(adapters)]
        )
        while queue.next_jobs():
            pass
        return engine.made

    def _time(
        self, recipes: list[Recipe], make: Callable[[list[Recipe]], list[GeneratedImage]]
    ) -> dict[str, float]:
        reads, start = disk_reads(), time.perf_counter()
        images = make(recipes)
        made = time.perf_counter()
        for image in images:
            image.encode("png")
        end = time.perf_counter()
        parts = images[0].seconds
        whole = {
            "text": parts["text"],
            "step": parts["denoise"] / recipes[0].steps,
            "decode": parts["decode"],
            "encode": end - made,
            "total": end - start,
        }
        return {part: seconds / len(recipes) for part, seconds in whole.items()} | {
            "disk": disk_reads() - reads
        }

    def _recipe(self, prompt: str, size: int, steps: int, seed: int, adapter: str) -> Recipe:
        shape: dict[str, Any] = {"width": size, "height": size, "steps": steps, "seed": seed}
        return Recipe(prompt=prompt, adapters=(self._ref(adapter),), **shape, **self._settings)

    def _ref(self, adapter: str) -> AdapterRef:
        if adapter not in self._adapters:
            self._adapters[adapter] = AdapterRef.from_file(adapter)
        return self._adapters[adapter]


class Queue:
    """A store with jobs of one image each, and a worker."""

    def __init__(self, engine: Engine, recipes: list[Recipe]) -> None:
        self._store, self._outputs = MemoryStore(), tempfile.TemporaryDirectory()
        for recipe in recipes:
            self._store.add(new_job((recipe,), datetime.now(UTC)))
        self._ended: list[AttemptReport] = []
        self._worker = Worker(
            "benchmark",
            self._store,
            engine,
            FolderImages(Path(self._outputs.name)),
            on_end=self._ended.append,
        )
        self._adapters: frozenset[str] = frozenset()

    def next_jobs(self) -> list[dict[str, float]]:
        """See `Ours.next_jobs`; empty when the queue is empty."""
        self._ended.clear()
        start = time.perf_counter()
        self._worker.run_next()
        seconds = time.perf_counter() - start
        found = []
        for report in self._ended:
            assert report.status == "succeeded", report
            adapters = self._store.get(report.job_id).adapters
            spent = sum(report.timings.get(part, 0.0) for part in ("load", "read", "adapters"))
            # The switch belongs to the whole batch; each job has an equal share of it.
            whole = spent * len(self._ended)
            found.append(
                {
                    "seconds": seconds / len(self._ended),
                    "adapters": whole,
                    "changed": adapters != self._adapters,
                }
            )
            self._adapters = adapters
        return found


class BlankEngine(Engine):
    """Engine stub that returns blank images and records which were requested."""

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.made: list[dict[str, Any]] = []

    def merged(self) -> frozenset[str]:
        return frozenset(one["adapter"] for one in self.made[-1:])

    def load(self, recipe: Recipe) -> dict[str, float]:
        for ref in recipe.adapters:
            self.adapters.get(ref)
        return {}

    def generate(self, recipe: Recipe, *_arguments: Any, **_options: Any) -> GeneratedImage:
        return self.generate_batch([recipe])[0]

    def generate_batch(
        self, recipes: Sequence[Recipe], *_arguments: Any, **_options: Any
    ) -> list[GeneratedImage]:
        self.load(recipes[0])
        self.made.append({"adapter": recipes[0].adapters[0].sha256, "images": len(recipes)})
        return [
            GeneratedImage(np.zeros((8, 8, 3), np.uint8), recipe, {"fidelora": ""})
            for recipe in recipes
        ]


class Switching:
    """A base model, and two adapters that each change nearly every weight of its UNet."""

    def __init__(self, fidelity: str, folder: str) -> None:
        recipe = Recipe(
            prompt="",
            base_model=folder,
            fidelity=fidelity,  # type: ignore[arg-type]  # checked by the recipe
        )
        key = ModelKey.of(recipe)
        self._base: LoadedModel = load_model(key, key.find_files(), torch.device("cpu"))
        self._base.merged.apply([])
        self._copies: dict[str, torch.Tensor] = {}
        self._bound: dict[str, BoundAdapter] = {}

    def touch(self, path: str) -> None:
        """Read the base model's file, so that it is in the page cache."""
        for name in self._bind(path).deltas:
            pristine = self._base.targets.by_name[name].pristine
            assert pristine is not None
            pristine.sum()

    def operation(self, what: str, paths: list[str]) -> dict[str, float]:
        """Return the seconds of one operation on the weights.

        Each requires the previous one in `switch.OPERATIONS`.
        """
        first, second = map(self._bind, paths)
        start = time.perf_counter()
        match what:
            case "copy":
                self._copy(first)
            case "merge":
                self._base.merged.apply([(first, 1.0)])
            case "scale":
                self._base.merged.apply([(first, 0.7)])
            case "switch":
                self._base.merged.apply([(second, 0.7)])
            case "restore":
                self._base.merged.apply([])
        return {"seconds": time.perf_counter() - start}

    def switches(
        self, count: int, budget_s: float, large: list[str], tiny: list[str]
    ) -> dict[str, float]:
        """Switch the adapter `count` times, or until `budget_s` is used up.

        Every hundredth switch is to one of the large adapters.

        Returns:
            number of switches, seconds, and growth of the process in bytes after the first ten.
        """
        start, own = time.perf_counter(), 0
        for number in range(count):
            if time.perf_counter() - start > budget_s:
                count = number
                break
            paths = large if number % 100 == 9 else tiny
            self._base.merged.apply(
                [(self._bind(paths[number % len(paths)]), 0.5 + number % 3 / 4)]
            )
            if number == 9:
                own = memory()["own"]
        return {
            "count": count,
            "seconds": time.perf_counter() - start,
            "growth": memory()["own"] - own,
        }

    def weights(self, path: str) -> dict[str, int]:
        """Return the numbers of weights and elements that an adapter changes.

        `bytes` is the size of all weights of the base model.
        """
        touched = [self._base.targets.by_name[name].weight for name in self._bind(path).deltas]
        return {
            "weights": len(touched),
            "elements": sum(weight.numel() for weight in touched),
            "bytes": self._base.size_bytes,
        }

    def _copy(self, adapter: BoundAdapter) -> None:
        for name in adapter.deltas:
            pristine = self._base.targets.by_name[name].pristine
            assert pristine is not None
            self._copies.setdefault(name, torch.empty(pristine.shape)).copy_(pristine)

    def _bind(self, path: str) -> BoundAdapter:
        if path not in self._bound:
            self._bound[path] = self._base.targets.bind(read_adapter(Path(path)))
        return self._bound[path]


def main() -> None:
    fidelity, folder = sys.argv[1:]
    ours = Ours(fidelity, folder)
    switching: Switching | None = None

    def switching_handler(method: str) -> Callable[..., Any]:
        """Return a handler that calls a method of `Switching`, which the first call creates."""

        def answer(**arguments: Any) -> Any:
            nonlocal switching
            switching = switching or Switching(fidelity, folder)
            return getattr(switching, method)(**arguments)

        return answer

    images = {
        name: getattr(ours, name)
        for name in (
            "image",
            "batch",
            "operators",
            "max_batch",
            "memory",
            "compare",
            "queue",
            "next_jobs",
            "batches",
        )
    }
    answer_requests(
        images
        | {name: switching_handler(name) for name in ("touch", "operation", "switches", "weights")}
    )


if __name__ == "__main__":
    main()
