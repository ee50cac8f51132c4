"""Resolve adapters of requests (names in the adapter folder, URLs, hub files) to cached files."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from fidelora.errors import (
    AdapterChangedError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterUrlRefusedError,
)
from fidelora.loras.cache import AdapterCache
from fidelora.loras.download import HUB, DownloadRules, download
from fidelora.loras.folder import adapter_path, adapter_with_hash, request_name
from fidelora.loras.hub import HubFile
from fidelora.loras.shared import SharedLoras
from fidelora.loras.uploads import is_foreign_upload
from fidelora.recipe import AdapterRef

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DOWNLOADS_AT_ONCE = 4  # downloads of one resolver at the same time


class AdapterResolver:
    """Finds the adapters of requests and puts them into the cache.

    Args:
        root: adapter folder; names in requests are relative to it.
        cache: cache of adapter files by hash.
        rules: limits of downloads.
        hub_token: token for the hub, used if the request has none.
        shared: the adapter folder of all servers; None for one server, or for a shared folder.
    """

    def __init__(
        self,
        root: Path,
        cache: AdapterCache,
        rules: DownloadRules,
        hub_token: str | None = None,
        shared: SharedLoras | None = None,
    ) -> None:
        self._root = root
        self._cache = cache
        self._rules = rules
        self._hub_token = hub_token
        self._shared = shared
        self._downloads = asyncio.Semaphore(_DOWNLOADS_AT_ONCE)

    async def resolve(
        self,
        source: str,
        *,
        owner: str | None,
        sha256: str | None = None,
        hub_token: str | None = None,
    ) -> AdapterRef:
        """Return the adapter from `source`, after putting its file into the cache.

        Args:
            source: path relative to the root (of an unambiguous file, also its name without
                folders), `https://...`, or `hf:owner/name/file.safetensors`,
                optionally with `@revision`.
            owner: id of the API key for which the adapter is resolved; uploads of other keys are
                not found. None to find the uploads of all keys.
            sha256: expected hash; nothing is downloaded if the cache has a file with this hash.
            hub_token: token for the hub; by default that of the resolver.

        Raises:
            AdapterNotFoundError: the file does not exist.
            AdapterNameError: the source has an invalid form, or its path is not allowed.
            AdapterUrlRefusedError: downloads from this host are not allowed.
            AdapterDownloadError: the download failed.
            AdapterChangedError: the file's hash is not `sha256`.
            WeightsFileError, AdapterFormatError: according to its header, it is not an adapter.
            OutputError: the file could not be put into the cache.
            StorageError: the object store cannot be used.
        """
        remote = source.startswith("hf:") or _URL.match(source)
        if remote and sha256:
            cached = await asyncio.to_thread(self._find, sha256, owner)
            if cached is not None:
                return await asyncio.to_thread(self._cache.ref, sha256, _name(source))
        if source.startswith("hf:"):
            ref = await self._from_hub(source, hub_token or self._hub_token)
        elif remote:
            ref = await self._from_url(source, hub_token or self._hub_token)
        else:
            ref = await asyncio.to_thread(self._from_root, source, owner)
        if sha256 and ref.sha256 != sha256:
            raise AdapterChangedError(
                f"{_name(source)} has the sha256 {ref.sha256}, not {sha256} as in the request; "
                "change the hash in the request, or restore the file."
            )
        return ref

    def by_hash(self, sha256: str, name: str, *, owner: str | None) -> AdapterRef | None:
        """Return the adapter with this hash, after putting its file into the cache.

        Args:
            name: former name of the file; files of this name are checked first.
            owner: as in `resolve`.

        Returns:
            None if neither the cache nor the adapter folder has such a file.

        Raises:
            OutputError: the file could not be put into the cache.
        """
        if (ref := self._find(sha256, owner)) is not None:
            return ref
        source = adapter_with_hash(self._root, sha256, name, self._cache.sha256_of, owner=owner)
        return None if source is None else self._from_root(source, owner)

    def _find(self, sha256: str, owner: str | None) -> AdapterRef | None:
        """Return the cached adapter with this hash, unless it is an upload of another key.

        Images contain the hashes of their adapters, so a hash alone must not give access to an
        upload. A key with its own file of the same contents finds it in the adapter folder.
        """
        ref = self._cache.find(sha256)
        if ref is None or owner is None or ref.path is None:
            return ref
        is_foreign = is_foreign_upload(self._root, ref.path, owner, self._cache.sha256_of)
        return None if is_foreign else ref

    def _from_root(self, name: str, owner: str | None) -> AdapterRef:
        try:
            name = request_name(self._root, name, owner=owner)
        except AdapterNotFoundError:
            if self._shared is None:
                raise
            self._shared.refresh()  # it may just have been uploaded to another server
            name = request_name(self._root, name, owner=owner)
        return self._cache.add(adapter_path(self._root, name, owner=owner), name)

    async def _from_url(self, url: str, token: str | None) -> AdapterRef:
        async with self._downloads:
            before = await asyncio.to_thread(self._cache.remembered_url, url)
            with self._cache.temporary() as temporary:
                got = await download(
                    url, temporary, self._rules, token=token, etag=before[0] if before else None
                )
                if got is None:
                    assert before is not None, "a server returns 304 only to a request with an ETag"
                    return await asyncio.to_thread(self._cache.ref, before[1], _name(url))
                ref = await asyncio.to_thread(self._cache.adopt, temporary, got.sha256, _name(url))
            if got.etag:
                await asyncio.to_thread(self._cache.remember_url, url, got.etag, got.sha256)
            return ref

    async def _from_hub(self, source: str, token: str | None) -> AdapterRef:
        file = HubFile.parse(source)
        if self._rules.hosts is not None and HUB not in self._rules.hosts:
            raise AdapterUrlRefusedError(
                "This server does not download LoRAs from the hub; "
                f"its operator can allow it by adding {HUB} to FIDELORA_LORA_HOSTS."
            )
        async with self._downloads:
            try:
                # The request fails at this deadline, but its thread may continue until the hub
                # client's own timeouts.
                async with asyncio.timeout(self._rules.timeout_s):
                    fetched = await asyncio.to_thread(file.fetch, token, self._rules.max_bytes)
            except TimeoutError:
                raise AdapterDownloadError(
                    f"{source} was not downloaded within {self._rules.timeout_s:g} seconds; "
                    "try again, or put the file into the adapter folder."
                ) from None
        return await asyncio.to_thread(self._cache.add, fetched, _name(source))


def _name(source: str) -> str:
    """Return the adapter's name for messages and records.

    The query of a URL is removed, because it may contain a secret.
    """
    return (
        source.split("?")[0].split("#")[0].rsplit("/", 1)[-1]
        if _URL.match(source) or source.startswith("hf:")
        else source
    )
