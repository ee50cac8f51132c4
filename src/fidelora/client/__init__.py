"""The client of the HTTP API: `Client` and, with the same methods as coroutines, `AsyncClient`. Needs no torch.

`calls.py` says what is sent and how answers are read, `sync.py` and `aio.py` only send and wait.
"""

from __future__ import annotations

try:
    from fidelora.client.aio import AsyncClient
    from fidelora.client.sync import Client
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The client needs {error.name}; install it with: pip install 'fidelora[client]'",
        name=error.name,
    ) from error

__all__ = ["AsyncClient", "Client"]
