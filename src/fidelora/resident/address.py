"""Address of a resident engine. Does not import torch.

The name of the socket is a hash of everything that an image could depend on outside its recipe:
versions, program code, environment variables and processor cores. A command therefore finds only an
engine whose images have the same bits as its own would have.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fidelora
from fidelora.accel.threads import quota
from fidelora.errors import SettingsError

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")
_PREFIXES = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_",
    "CUDA", "CUBLAS_", "CUDNN_", "NVIDIA_", "MPS_", "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_",
    "XDG_CACHE_HOME", "HOME", "LD_", "PYTHON", "MALLOC_",
)  # fmt: skip
"""Beginnings of the names of variables that libraries read. Their values are only hashed."""
_MAX_PATH_BYTES = 103  # limit of a socket's path on macOS; Linux allows four more


def socket_path(device: str, offload: str) -> Path:
    """Return the path of the socket for engines with this device and offload mode.

    Raises:
        SettingsError: the system has no Unix sockets, the folder cannot be created, other users can
            write to it, or its path is too long for a socket.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise SettingsError(
            "A resident engine needs Unix sockets, which this system does not have."
        )
    folder = _private_folder()
    path = folder / f"engine-{_fingerprint(device, offload)}.sock"
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise SettingsError(
            f"The folder {folder} has too long a name for a socket; set XDG_RUNTIME_DIR to a "
            "shorter one."
        )
    return path


def _private_folder() -> Path:
    """Create the folder of the sockets, and check that only this user can use it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    user = os.getuid()
    folder = (
        Path(runtime) / "fidelora" if runtime else Path(tempfile.gettempdir()) / f"fidelora-{user}"
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise SettingsError(
            f"The folder {folder} cannot be used: {error.strerror or error}. Set XDG_RUNTIME_DIR "
            "to a folder of your own."
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o077:
        raise SettingsError(
            f"{folder} is not a folder that only this user can use; remove it, or set "
            "XDG_RUNTIME_DIR to a folder of your own."
        )
    return folder


def _fingerprint(device: str, offload: str) -> str:
    facts = {
        "device": device,
        "offload": offload,
        "python": [sys.executable, sys.version],
        "versions": [_version(name) for name in _PACKAGES],
        "code": [fidelora.__version__, *_code()],
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)
        },
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "quota": quota(),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _code() -> tuple[str, int, int]:
    """Return the folder of this package, its number of modules and their newest change (ns)."""
    folder = Path(fidelora.__file__).parent
    changes = [
        entry.stat().st_mtime_ns
        for path, _, _ in os.walk(folder)
        if not path.endswith("__pycache__")
        for entry in os.scandir(path)
        if entry.name.endswith(".py")
    ]
    return str(folder), len(changes), max(changes)
