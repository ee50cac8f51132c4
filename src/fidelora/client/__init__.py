"""Clients of the HTTP API: the blocking `Client` and `AsyncClient` for asyncio.

`calls.py` builds requests and parses responses, `flows.py` combines them into operations, and
`sync.py` and `aio.py` perform the I/O. Does not import torch.
"""

from __future__ import annotations

try:
    from fidelora.client.aio import AsyncClient
    from fidelora.client.sync import Client
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The client needs {error.name}. Install it in the folder of Fidelora's repository with: "
        "pip install '.[client]'",
        name=error.name,
    ) from error

__all__ = ["AsyncClient", "Client"]
