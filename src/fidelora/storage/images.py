"""Storage for the images of jobs: a folder, or a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fidelora.atomic import output_error, temporary_name, write_atomically
from fidelora.storage.bucket import Bucket

_PROBE_BYTES = 2**20  # about the size of an image; a full disk may still have room for less
_PREFIX = "outputs"


class ImageStore(Protocol):
    """Storage for files of images. A location is the absolute path or the s3:// URL of a file.

    All methods except `location` raise `StorageError` if the object store cannot be used. In a
    folder, `write`, `remove` and `check` raise it, and `read` returns None.
    """

    def write(self, name: str, content: bytes) -> str:
        """Store a file, which replaces one with the same name, and return its location."""

    def location(self, name: str) -> str:
        """Return the location of a file with this name, which need not exist."""

    def read(self, location: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""

    def remove(self, locations: Sequence[str]) -> None:
        """Remove files; those that do not exist are ignored."""

    def check(self) -> None:
        """Write a test file of about the size of an image, and remove it."""


class FolderImages:
    """Image files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, content: bytes) -> str:
        """Store a file; see `ImageStore`."""
        path = self._folder / name
        write_atomically(path, content)
        return str(path)

    def location(self, name: str) -> str:
        """Return the path of a file."""
        return str(self._folder / name)

    def read(self, location: str) -> bytes | None:
        """Return the content of a file; None also if it cannot be read."""
        try:
            return Path(location).read_bytes()
        except OSError:
            return None

    def remove(self, locations: Sequence[str]) -> None:
        """Remove all files that can be removed; those that do not exist are ignored.

        Raises:
            StorageError: a file cannot be removed.
        """
        errors: list[tuple[str, OSError]] = []
        for location in locations:
            try:
                Path(location).unlink(missing_ok=True)
            except OSError as error:
                errors.append((location, error))
        if errors:
            first, reason = errors[0]
            raise output_error(f"{first} could not be removed", reason) from reason

    def check(self) -> None:
        """Write and remove a test file."""
        probe = self._folder / temporary_name()
        try:
            write_atomically(probe, bytes(_PROBE_BYTES))
        finally:
            with suppress(OSError):
                probe.unlink()


class BucketImages:
    """Image files in a bucket, under `outputs/`.

    Files of jobs that ended before the bucket was set up are in a folder, and are read and removed
    there.
    """

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self._bucket = bucket
        self._folder = FolderImages(folder)
        self._root = f"{bucket.url}/"

    def write(self, name: str, content: bytes) -> str:
        """Store a file; see `ImageStore`."""
        self._bucket.put(f"{_PREFIX}/{name}", content)
        return self.location(name)

    def location(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self._root}{_PREFIX}/{name}"

    def read(self, location: str) -> bytes | None:
        """Return the content of a file; None also for a file in another bucket."""
        key = self._key(location)
        if key is not None:
            return self._bucket.get(key)
        return None if location.startswith("s3://") else self._folder.read(location)

    def remove(self, locations: Sequence[str]) -> None:
        """Remove files; those that do not exist, or are in another bucket, are ignored."""
        keys = [key for location in locations if (key := self._key(location)) is not None]
        self._bucket.delete(keys)
        self._folder.remove([one for one in locations if not one.startswith("s3://")])

    def check(self) -> None:
        """Write and remove a test file."""
        name = f"{_PREFIX}/{temporary_name()}"
        self._bucket.put(name, bytes(_PROBE_BYTES))
        self._bucket.delete([name])

    def _key(self, location: str) -> str | None:
        if location.startswith(f"{self._root}{_PREFIX}/"):
            return location.removeprefix(self._root)
        return None


def image_store(folder: Path, object_store: str = "") -> ImageStore:
    """Return the store of images.

    Args:
        folder: folder for images; with an object store, only for those of earlier jobs.
        object_store: `s3://BUCKET` or `s3://BUCKET/PREFIX`; empty for the folder.

    Raises:
        SettingsError: the URL is not valid, or obstore is not installed.
    """
    if object_store:
        return BucketImages(Bucket(object_store), folder)
    return FolderImages(folder)
