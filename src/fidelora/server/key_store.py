"""API keys of a server: stored in a file in the data folder, or in the PostgreSQL database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from fidelora.errors import SettingsError
from fidelora.jobs.api_keys import ApiKeys, FileKeys
from fidelora.jobs.client_state import ClientState, local_state
from fidelora.jobs.client_tables import DatabaseKeys, database_state
from fidelora.jobs.transactions import Database
from fidelora.server.middleware import is_loopback
from fidelora.settings import Settings

log = structlog.get_logger(__name__)


def keys_file(settings: Settings) -> Path:
    """Return the path of the file with the hashes of the API keys."""
    return settings.data_dir.expanduser().absolute() / "api_keys.json"


def client_state(settings: Settings, database: Database) -> ClientState:
    """Return the state of the server's clients: in the database if servers can share it."""
    if settings.can_share_database:
        return database_state(database)
    return local_state(keys_file(settings))


@contextmanager
def opened_keys(settings: Settings) -> Iterator[ApiKeys]:
    """Open the API keys without the rest of a server.

    Raises:
        JobStoreError: the database cannot be opened.
    """
    if not settings.can_share_database:
        yield FileKeys(keys_file(settings))
        return
    database = Database(settings.database)
    try:
        yield DatabaseKeys(database)
    finally:
        database.close()


def check_keys(settings: Settings) -> None:
    """Check that the server has the API keys that it needs; warn about keys in an unused file.

    Raises:
        SettingsError: other machines can reach the server, which has no keys; or all keys are in
            the file of an older version, which servers on PostgreSQL do not read.
    """
    with opened_keys(settings) as keys:
        names = keys.names()
        file = keys_file(settings)
        in_file = FileKeys(file).all() if settings.can_share_database else []
        unused = [key.name for key in in_file if keys.with_hash(key.sha256) is None]
    if unused and not names:
        raise SettingsError(
            "Servers on PostgreSQL use only the API keys in the database, and it contains none. "
            f"{file}, the key file of an older version, contains {len(unused)}. Import them with "
            f"`fidelora keys import {file}`, or remove the file."
        )
    if unused:
        log.warning(
            "this file has API keys that are not in the database, so they are not valid; import "
            "them with `fidelora keys import`, or remove the file",
            file=str(file),
            names=unused,
        )
    if not names and not is_loopback(settings.host):
        raise SettingsError(
            f"Other machines can reach the address {settings.host}, so the server needs an API "
            "key; create one with `fidelora keys add NAME`, or listen on 127.0.0.1 "
            "(`--host 127.0.0.1` or FIDELORA_HOST=127.0.0.1)."
        )
