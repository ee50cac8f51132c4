"""API keys: made here, shown once, and kept as hashes."""

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
    """The keys of one server, in one file. A key that is added or removed counts at once, without a restart.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._names: dict[str, str] = {}

    def names(self) -> list[str]:
        """Whom keys were made for."""
        return sorted(self._read().values())

    def add(self, name: str) -> str:
        """Make a key for `name`; this is the only time that it can be seen.

        Raises:
            SettingsError: there is one for this name already, or the name is empty or not printable.
        """
        if not name or not name.isprintable() or len(name) > 100:
            raise SettingsError("The name of an API key has 1 to 100 printable characters.")
        names = self._read()
        if name in names.values():
            raise SettingsError(
                f"There is an API key for {name} already; remove it first, or choose another name."
            )
        key = _PREFIX + secrets.token_urlsafe(32)
        self._write(names | {hash_of(key): name})
        return key

    def remove(self, name: str) -> None:
        """Let the key of `name` open nothing any more.

        Raises:
            SettingsError: there is none.
        """
        names = self._read()
        if name not in names.values():
            raise SettingsError(
                f"There is no API key for {name}; `fidelora keys list` shows those there are."
            )
        self._write({key: other for key, other in names.items() if other != name})

    def owner(self, key: str) -> str | None:
        """Whom this key was made for; None if it is none of ours."""
        return self.owner_of(hash_of(key))

    def owner_of(self, sha256: str) -> str | None:
        """Whom the key with this hash was made for; None if there is none."""
        return self._read().get(sha256)

    def _read(self) -> dict[str, str]:
        """Hash -> name; read again only after the file changed."""
        with self._lock:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                self._seen, self._names = None, {}
                return {}
            if self._seen != (status.st_mtime_ns, status.st_ino):
                try:
                    content = json.loads(self._path.read_text())
                    self._names = {entry["sha256"]: entry["name"] for entry in content["keys"]}
                except (ValueError, KeyError, TypeError) as error:
                    raise SettingsError(
                        f"{self._path} is damaged: restore it, or remove it and make new keys."
                    ) from error
                self._seen = (status.st_mtime_ns, status.st_ino)
            return dict(self._names)

    def _write(self, names: dict[str, str]) -> None:
        make_folder(self._path.parent)
        keys = [{"name": name, "sha256": sha256} for sha256, name in names.items()]
        content = {"changed_at": datetime.now(UTC).isoformat(), "keys": keys}
        write_atomically(self._path, json.dumps(content, indent=2).encode())
        self._path.chmod(0o600)


def hash_of(key: str) -> str:
    """What is kept of a key. Plain sha256 is enough: a key has 256 random bits, so there is nothing to guess."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
