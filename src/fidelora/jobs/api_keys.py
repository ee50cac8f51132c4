"""API keys: created here, shown once, stored as hashes in a file or a database."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import SettingsError

_PREFIX = "fl_"
MAX_NAME = 100
"""Maximum number of characters in the name of a key."""


@dataclass(frozen=True)
class ApiKey:
    """One API key without its secret.

    Attributes:
        sha256: hash of the key.
        is_admin: True if the key has access to the requests and uploads of all keys.
    """

    name: str
    sha256: str
    is_admin: bool = False

    @property
    def id(self) -> str:
        """Id that is stored with the key's requests and uploads: 16 hexadecimal digits.

        It is derived from the hash, so a new key of the same name has another id, and the key
        cannot be computed from it.
        """
        return hashlib.sha256(f"id of {self.sha256}".encode()).hexdigest()[:16]


class ApiKeys(ABC):
    """The API keys of a server. Changes take effect without a restart."""

    def all(self) -> list[ApiKey]:
        """Return the keys, sorted by name."""
        return sorted(self.by_hash().values(), key=lambda key: key.name)

    def names(self) -> list[str]:
        """Return the names of the keys, sorted."""
        return [key.name for key in self.all()]

    def add(self, name: str, *, is_admin: bool = False) -> str:
        """Create a key with this name and return it; it cannot be read again later.

        Args:
            is_admin: True for a key that has access to the requests and uploads of all keys.

        Raises:
            SettingsError: the name is taken, empty, too long or not printable.
        """
        if not name or not name.isprintable() or len(name) > MAX_NAME:
            raise SettingsError("The name of an API key must have 1 to 100 printable characters.")
        key = _PREFIX + secrets.token_urlsafe(32)
        self._insert([ApiKey(name, hash_of(key), is_admin)])
        return key

    def add_existing(self, keys: Collection[ApiKey]) -> list[str]:
        """Add keys of another server, and return the names of those that were not there before.

        Raises:
            SettingsError: another key has one of the names; no key is added.
        """
        known = self.by_hash()
        new = [key for key in keys if key.sha256 not in known]
        self._insert(new)
        return [key.name for key in new]

    @abstractmethod
    def set_admin(self, name: str, is_admin: bool) -> None:
        """Change whether the key with this name is an admin key.

        Raises:
            SettingsError: the key does not exist.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Revoke the key with this name.

        Raises:
            SettingsError: the key does not exist.
        """

    def find(self, key: str) -> ApiKey | None:
        """Return the key with this secret, or None if the secret is unknown."""
        return self.with_hash(hash_of(key))

    def with_hash(self, sha256: str) -> ApiKey | None:
        """Return the key with this hash, or None if it does not exist."""
        return self.by_hash().get(sha256)

    @abstractmethod
    def by_hash(self) -> Mapping[str, ApiKey]:
        """Return the keys by hash. This may wait for a database."""

    @abstractmethod
    def in_memory(self) -> Mapping[str, ApiKey] | None:
        """Return the keys by hash without accessing a database; None if they may have changed."""

    @abstractmethod
    def _insert(self, keys: Collection[ApiKey]) -> None:
        """Add all of these keys.

        Raises:
            SettingsError: a name is taken; no key is added.
        """


class FileKeys(ApiKeys):
    """The API keys of one server, stored in one file.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._loaded_version: tuple[int, int] | None = None
        self._keys: dict[str, ApiKey] = {}

    def set_admin(self, name: str, is_admin: bool) -> None:
        self._require(name)
        self._write(
            [replace(key, is_admin=is_admin) if key.name == name else key for key in self.all()]
        )

    def remove(self, name: str) -> None:
        self._require(name)
        self._write([key for key in self.all() if key.name != name])

    def by_hash(self) -> Mapping[str, ApiKey]:
        """Return the keys by hash; the file is read again only if it has changed."""
        with self._lock:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                self._loaded_version, self._keys = None, {}
                return {}
            if self._loaded_version != (status.st_mtime_ns, status.st_ino):
                try:
                    content = json.loads(self._path.read_text())
                    keys = [
                        # `admin` is absent in files of older versions.
                        ApiKey(entry["name"], entry["sha256"], entry.get("admin") is True)
                        for entry in content["keys"]
                    ]
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise SettingsError(
                        f"{self._path} is damaged; restore it, or remove it and create new keys."
                    ) from error
                self._keys = {key.sha256: key for key in keys}
                self._loaded_version = (status.st_mtime_ns, status.st_ino)
            return self._keys

    def in_memory(self) -> Mapping[str, ApiKey]:
        return self.by_hash()

    def _insert(self, keys: Collection[ApiKey]) -> None:
        before = self.all()
        names = [key.name for key in before]
        for key in keys:
            if key.name in names:
                raise name_taken(key.name)
        self._write([*before, *keys])

    def _require(self, name: str) -> None:
        if name not in self.names():
            raise name_unknown(name)

    def _write(self, keys: list[ApiKey]) -> None:
        make_folder(self._path.parent)
        entries = [{"name": key.name, "sha256": key.sha256, "admin": key.is_admin} for key in keys]
        content = {"changed_at": datetime.now(UTC).isoformat(), "keys": entries}
        write_atomically(self._path, json.dumps(content, indent=2).encode())
        self._path.chmod(0o600)


def name_taken(name: str) -> SettingsError:
    """Return the error for a name that another key has."""
    return SettingsError(
        f"An API key named {name} exists already; remove it first, or choose another name."
    )


def name_unknown(name: str) -> SettingsError:
    """Return the error for a name that no key has."""
    return SettingsError(f"The API key {name} does not exist; `fidelora keys list` lists all keys.")


def hash_of(key: str) -> str:
    """Return the stored hash of a key.

    Plain sha256 is enough: a key has 256 random bits, which cannot be guessed.
    """
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
