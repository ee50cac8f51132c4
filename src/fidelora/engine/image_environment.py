"""Environment of an image: facts outside its recipe that can change its last bits."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

import torch

import fidelora
from fidelora.accel.device import instruction_set, processor_name
from fidelora.engine.model import LoadedModel


def image_environment(model: LoadedModel) -> dict[str, str]:
    """Return the facts outside the recipe that can change the last bits of an image."""
    name = processor_name()
    if model.device.type == "cuda":
        name = torch.cuda.get_device_name(model.device)
    environment = {
        **_versions(),
        "device": f"{model.device} ({name})",
        "cpu_capability": instruction_set(),
        "threads": str(torch.get_num_threads()),
    }
    if model.fast_path is not None:
        dtype = str(model.compute_dtype).removeprefix("torch.")
        environment["fast"] = f"{model.fast_path.value}, {dtype}"
    return environment


@cache
def _versions() -> dict[str, str]:
    """Return the versions of the libraries that affect images, cached because it takes 1 ms."""
    others = {name: version(name) for name in ("diffusers", "transformers")}
    return {"fidelora": fidelora.__version__, "torch": torch.__version__, **others}
