"""Clients of the HTTP API: `Client` and, with coroutines for methods, `AsyncClient`. No torch.

`calls.py` builds requests and reads responses, `flows.py` orders them into operations, and
`sync.py` and `aio.py` only send and sleep.
"""

from __future__ import annotations

try:
    from fidelora.client.aio import AsyncClient
    from fidelora.client.sync import Client
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The client needs {error.name}. Install it with: pip install 'fidelora[client]'",
        name=error.name,
    ) from error

__all__ = ["AsyncClient", "Client"]
