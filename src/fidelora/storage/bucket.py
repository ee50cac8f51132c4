"""A bucket of an S3-compatible object store, through obstore.

Endpoint, region and credentials come from the usual environment variables of AWS, such as
`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or from the
machine's role.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fidelora.atomic import output_error
from fidelora.errors import SettingsError, StorageError

if TYPE_CHECKING:
    from obstore.store import S3Store

log = logging.getLogger(__name__)

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([^?#]*?))?/*")
_TIMEOUT_S, _CONNECT_TIMEOUT_S = 30, 3  # seconds for one request, and to connect
_RETRIES, _RETRY_S = 3, 20  # retries of a request, and seconds for all of them
_CHUNK_BYTES = 16 * 2**20
"""Bytes per request of a download, so that each request ends within `_TIMEOUT_S`."""


@dataclass(frozen=True)
class StoredObject:
    """An object of a bucket.

    Attributes:
        key: name in the bucket, without the bucket's prefix.
        size: in bytes.
        modified: time of the last change.
        tag: the ETag, which changes with the content.
    """

    key: str
    size: int
    modified: datetime
    tag: str


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Return the bucket and the prefix of `s3://BUCKET/PREFIX`; the prefix may be empty.

    Raises:
        SettingsError: it is not such a URL.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise SettingsError(
            f"{url!r} is not the URL of a bucket; write s3://BUCKET or s3://BUCKET/PREFIX."
        )
    return match[1], (match[2] or "").strip("/")


class Bucket:
    """Objects under a prefix of a bucket. Thread-safe. Failed requests are repeated.

    All methods raise `StorageError` if the object store cannot be used. The message does not
    contain addresses; the log has the details.

    Args:
        url: `s3://BUCKET` or `s3://BUCKET/PREFIX`.

    Raises:
        SettingsError: the URL is not valid, or obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        bucket, prefix = bucket_and_prefix(url)
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._store = _open_store(bucket, prefix)

    def check(self) -> None:
        """Raise `StorageError` if the objects cannot be listed."""
        next(self.list(""), None)

    def put(self, key: str, content: bytes) -> None:
        """Store an object, which replaces one with the same key."""
        import obstore

        with _storage_errors():
            obstore.put(self._store, key, content)

    def put_file(self, key: str, path: Path, *, replace: bool = True) -> bool:
        """Store the content of a file, in parts if it is large.

        Args:
            replace: if False, an object with the same key is kept.

        Returns:
            False if the object was kept.

        Raises:
            StorageError: the file cannot be read, or the object store cannot be used.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            file = path.open("rb")
        except OSError as error:
            raise output_error(f"{path.name} could not be read", error) from error
        with file, _storage_errors():
            try:
                # Old servers do not support conditional multipart uploads, so the key is looked up
                # first.
                if not replace and self.head(key) is not None:
                    return False
                is_single = path.stat().st_size <= _CHUNK_BYTES
                if is_single and not replace:
                    obstore.put(self._store, key, file.read(), mode="create")
                else:
                    obstore.put(self._store, key, file)
            except AlreadyExistsError:
                return False
        return True

    def get(self, key: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""
        import obstore

        with _storage_errors():
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError as error:
                _require_bucket(error)
                return None

    def download(self, key: str, path: Path) -> str | None:
        """Write the content of an object to a file.

        Returns:
            The sha256 of the content; None if the object does not exist.

        Raises:
            StorageError: also if the file cannot be written, or the object was replaced meanwhile.
        """
        import obstore

        before = self.head(key)
        if before is None:
            return None
        digest = hashlib.sha256()
        try:
            file = path.open("wb")
        except OSError as error:
            raise output_error(f"{path.name} could not be written", error) from error
        with file:
            for start in range(0, before.size, _CHUNK_BYTES):
                end = min(start + _CHUNK_BYTES, before.size)
                with _storage_errors():
                    part = bytes(obstore.get_range(self._store, key, start=start, end=end))
                digest.update(part)
                try:
                    file.write(part)
                except OSError as error:
                    raise output_error(f"{path.name} could not be written", error) from error
        after = self.head(key)
        if after is None or after.tag != before.tag:
            raise StorageError(f"{Path(key).name} was replaced while it was read; try again.")
        return digest.hexdigest()

    def head(self, key: str) -> StoredObject | None:
        """Return an object without its content, or None if it does not exist."""
        import obstore

        with _storage_errors():
            try:
                meta = obstore.head(self._store, key)
            except FileNotFoundError as error:
                _require_bucket(error)
                return None
        return StoredObject(key, meta["size"], meta["last_modified"], meta["e_tag"] or "")

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the objects whose keys are `prefix/...`; an empty prefix yields all."""
        import obstore

        with _storage_errors():
            for page in obstore.list(self._store, prefix or None):
                for meta in page:
                    yield StoredObject(
                        meta["path"], meta["size"], meta["last_modified"], meta["e_tag"] or ""
                    )

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that do not exist are ignored."""
        import obstore

        if keys:
            with _storage_errors():
                obstore.delete(self._store, list(keys))


def _open_store(bucket: str, prefix: str) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise SettingsError(
            "FIDELORA_OBJECT_STORE needs obstore; install it in the folder of Fidelora's "
            "repository with: pip install '.[s3]'"
        ) from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "timeout": f"{_TIMEOUT_S}s",
            "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
        },
        retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)},
    )


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Raise `StorageError` for the errors of obstore."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.BaseError, OSError) as error:
        detail = str(error).split("\n\n")[0]  # the rest is meant for developers of obstore
        log.warning("the object store cannot be used: %s", detail)
        if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
            reason = "access was denied; check the credentials (AWS_ACCESS_KEY_ID and others)"
        elif isinstance(error, FileNotFoundError) or "NoSuchBucket" in detail:
            reason = "the bucket does not exist; check FIDELORA_OBJECT_STORE"
        else:
            reason = "it does not answer; check AWS_ENDPOINT_URL and the network"
        raise StorageError(f"The object store cannot be used: {reason}.") from error


def _require_bucket(error: FileNotFoundError) -> None:
    """Raise the error again if it is the bucket that does not exist, not an object."""
    if "NoSuchBucket" in str(error):
        raise error
