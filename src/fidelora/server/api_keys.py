"""API keys: created here, shown once, stored as hashes."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from datetime import UTC, datetime
from pathlib import Path

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import SettingsError

_PREFIX = "fl_"


class ApiKeys:
    """The API keys of one server, stored in one file. Changes take effect without a restart.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._loaded_version: tuple[int, int] | None = None
        self._names: dict[str, str] = {}

    def names(self) -> list[str]:
        """Return the names of the keys, sorted."""
        return sorted(self._read().values())

    def add(self, name: str) -> str:
        """Create a key with this name and return it; it cannot be read again later.

        Raises:
            SettingsError: the name is taken, empty, too long or not printable.
        """
        if not name or not name.isprintable() or len(name) > 100:
            raise SettingsError("The name of an API key must have 1 to 100 printable characters.")
        names = self._read()
        if name in names.values():
            raise SettingsError(
                f"An API key named {name} exists already; remove it first, or choose another name."
            )
        key = _PREFIX + secrets.token_urlsafe(32)
        self._write(names | {hash_of(key): name})
        return key

    def remove(self, name: str) -> None:
        """Revoke the key with this name.

        Raises:
            SettingsError: there is no such key.
        """
        names = self._read()
        if name not in names.values():
            raise SettingsError(
                f"There is no API key named {name}; `fidelora keys list` lists all keys."
            )
        self._write({key: other for key, other in names.items() if other != name})

    def owner(self, key: str) -> str | None:
        """Return the name of this key, or None if the key is unknown."""
        return self.owner_of(hash_of(key))

    def owner_of(self, sha256: str) -> str | None:
        """Return the name of the key with this hash, or None if there is none."""
        return self._read().get(sha256)

    def _read(self) -> dict[str, str]:
        """Return the names of the keys by hash; the file is read again only if it has changed."""
        with self._lock:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                self._loaded_version, self._names = None, {}
                return {}
            if self._loaded_version != (status.st_mtime_ns, status.st_ino):
                try:
                    content = json.loads(self._path.read_text())
                    self._names = {entry["sha256"]: entry["name"] for entry in content["keys"]}
                except (ValueError, KeyError, TypeError) as error:
                    raise SettingsError(
                        f"{self._path} is damaged; restore it, or remove it and create new keys."
                    ) from error
                self._loaded_version = (status.st_mtime_ns, status.st_ino)
            return dict(self._names)

    def _write(self, names: dict[str, str]) -> None:
        make_folder(self._path.parent)
        keys = [{"name": name, "sha256": sha256} for sha256, name in names.items()]
        content = {"changed_at": datetime.now(UTC).isoformat(), "keys": keys}
        write_atomically(self._path, json.dumps(content, indent=2).encode())
        self._path.chmod(0o600)


def hash_of(key: str) -> str:
    """Return the stored hash of a key.

    Plain sha256 is enough: a key has 256 random bits, which cannot be guessed.
    """
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
