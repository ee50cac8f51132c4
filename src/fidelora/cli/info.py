"""`fidelora info`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fidelora
from fidelora.cli.options import Debug, Device
from fidelora.errors import FideloraError
from fidelora.families import all_families

if TYPE_CHECKING:
    from fidelora.settings import Settings

_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers",
    "huggingface-hub", "numpy", "pillow", "typer", "fastapi", "pydantic", "sqlalchemy", "gradio",
)  # fmt: skip
_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_LOGS", "XDG_CACHE_HOME", "XDG_DATA_HOME",
)  # fmt: skip
"""Environment variables of libraries that affect results, speed or folders; without secrets."""


def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object, for bug reports.")
    ] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Print versions, device, settings, and the folders of base models, LoRAs and images.

    The output contains paths of this machine, but no tokens or passwords.
    """
    document = _document(device)
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    for section, content in document.items():
        typer.echo(_label(section))
        if isinstance(content, str):
            typer.echo(f"  {content}")
            continue
        width = max(map(len, content), default=0)
        for name, value in content.items():
            typer.echo(f"  {_label(name):<{width}}  {_shown(value)}")
        if not content:
            typer.echo("  none")


def _document(device: str) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    settings = _read_settings()
    return {
        "versions": _versions(),
        "system": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "device": _device(device),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "settings": settings if isinstance(settings, str) else _settings(settings),
        "base_models": _base_models(None if isinstance(settings, str) else settings),
        "folders": _folders(None if isinstance(settings, str) else settings),
    }


def _versions() -> dict[str, str | None]:
    """Return the versions of Fidelora and other packages; None for one that is not installed."""
    found: dict[str, str | None] = {"fidelora": fidelora.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _device(name: str) -> dict[str, Any] | str:
    """Return the facts about a device that an image depends on; the error if it is unavailable."""
    import torch

    from fidelora.accel.device import auto_dtype, instruction_set, processor_name, resolve_device

    try:
        device = resolve_device(name)
    except FideloraError as error:
        return str(error)
    found: dict[str, Any] = {
        "device": str(device),
        "auto_dtype": auto_dtype(device),
        "processor": processor_name(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["name"] = properties.name
        found["memory_bytes"] = properties.total_memory
    return found


def _read_settings() -> Settings | str:
    """Return the server's settings, or a sentence that says why they cannot be read."""
    try:
        from fidelora.settings import read_settings
    except ModuleNotFoundError as error:
        return f"The server is not installed ({error.name} is missing)."
    try:
        return read_settings()
    except FideloraError as error:
        return str(error)


def _settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that differ from their defaults, by variable; secrets are not shown."""
    from pydantic import SecretStr

    found: dict[str, Any] = {}
    for name, setting in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value == setting.get_default(call_default_factory=True, validated_data={}):
            continue
        shown = "set" if isinstance(value, SecretStr) else value
        if isinstance(shown, frozenset):
            shown = ",".join(sorted(shown))
        plain = shown if isinstance(shown, bool | int | float) else str(shown)
        alias = setting.validation_alias
        found[str(getattr(alias, "choices", [alias])[0])] = plain
    return found


def _base_models(settings: Settings | None) -> dict[str, dict[str, Any]]:
    """Return the base model of each family and whether it is on this machine."""
    from fidelora.weights.locate import is_downloaded

    configured = settings.base_models if settings is not None else {}
    cache_dir = settings.model_cache_dir if settings is not None else None
    found = {}
    for family in all_families().values():
        name = configured.get(family.id, family.base_model)
        found[family.id] = {
            "base": name,
            "on_this_machine": is_downloaded(name, family.parts, cache_dir=cache_dir),
        }
    return found


def _folders(settings: Settings | None) -> dict[str, dict[str, Any]]:
    """Return the folders that Fidelora reads or writes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from fidelora.weights.content import default_path

    folders = {"current_folder": Path.cwd(), "hub_cache": Path(HF_HUB_CACHE)}
    hashes = default_path()
    if hashes is not None:
        folders["hash_cache"] = hashes.parent
    if settings is not None:
        folders |= {"data": settings.data_dir.expanduser().absolute(), "loras": settings.loras}
        folders |= {"images": settings.outputs, "lora_cache": settings.adapters}
        if settings.model_cache_dir is not None:
            folders["base_model_cache"] = settings.model_cache_dir
        if settings.jobs is not None:
            folders["training_runs"] = settings.jobs
    return {name: _folder(path) for name, path in folders.items()}


def _folder(path: Path) -> dict[str, Any]:
    """Return facts about a folder; if it is missing, those of its closest parent that exists."""
    try:
        existing = next(one for one in (path, *path.absolute().parents) if one.exists())
    except PermissionError:  # below a folder that this user has no access to
        return {"path": str(path), "exists": None, "writable": False}
    found = {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": os.access(existing, os.W_OK | os.X_OK) and existing.is_dir(),
        "free_bytes": shutil.disk_usage(existing).free,
    }
    if path.is_dir() and (loras := sum(1 for _ in path.glob("*.safetensors"))):
        found["safetensors_files"] = loras
    return found


def _label(name: str) -> str:
    """Return a key of the JSON object as words; names of environment variables stay as they are."""
    return name.replace("_", " ") if name.islower() else name


def _shown(value: object) -> str:
    """Return a value as text on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        first, *others = value.items()
        rest = ", ".join(f"{_label(name)}: {_shown(one)}" for name, one in others)
        return f"{first[1]}  ({rest})"
    return str(value)
