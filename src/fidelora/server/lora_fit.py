"""Base models of the server that an adapter file fits."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fidelora.engine.header_family import HeaderFit, fit_header
from fidelora.errors import AdapterError, WeightsFileError
from fidelora.safetensors_header import read_file_header


def fit_of_file(file: Path, models: list[str]) -> HeaderFit:
    """Return which of the server's models an adapter file fits; see `fit_header`.

    A file that is not an adapter fits none and has no problem here: `describe_adapter` reports it.

    Args:
        models: `ServerContext.configured_models`.
    """
    try:
        return _fit(file, file.stat().st_mtime_ns, tuple(models))
    except (AdapterError, WeightsFileError, OSError):
        return HeaderFit((), "")


@lru_cache(maxsize=10_000)  # keyed by modification time, too, so that a changed file is read again
def _fit(file: Path, _modified_ns: int, models: tuple[str, ...]) -> HeaderFit:
    return fit_header(read_file_header(file), file.name, models)
