"""Resolve adapters of requests (names in the adapter folder, URLs, hub files) to cached files."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from fidelora.errors import (
    AdapterChangedError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterPlaceError,
    AdapterUrlRefusedError,
)
from fidelora.loras.cache import AdapterCache
from fidelora.loras.download import HUB, DownloadRules, download
from fidelora.loras.folder import adapter_path, adapter_with_hash
from fidelora.recipe import AdapterRef

_HUB_FILE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@]+)(@(?P<revision>[\w./-]+))?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DOWNLOADS_AT_ONCE = 4


class AdapterResolver:
    """Find the adapters of requests and put them into the cache.

    Args:
        root: adapter folder; names in requests are relative to it.
        cache: cache of adapter files by hash.
        rules: limits of downloads.
        hub_token: token for the hub, used if the request has none.
    """

    def __init__(
        self, root: Path, cache: AdapterCache, rules: DownloadRules, hub_token: str | None = None
    ) -> None:
        self._root = root
        self._cache = cache
        self._rules = rules
        self._hub_token = hub_token
        self._downloads = asyncio.Semaphore(_DOWNLOADS_AT_ONCE)

    async def resolve(
        self, place: str, *, sha256: str | None = None, hub_token: str | None = None
    ) -> AdapterRef:
        """Return the adapter at `place`, after putting its file into the cache.

        Args:
            place: path relative to the root, `https://...`, or `hf:owner/name/file.safetensors`,
                optionally with `@revision`.
            sha256: expected hash; nothing is downloaded if the cache has a file with this hash.
            hub_token: token for the hub; by default that of the resolver.

        Raises:
            AdapterNotFoundError, AdapterPlaceError: there is no such file.
            AdapterUrlRefusedError: downloads from this place are not allowed.
            AdapterDownloadError: the download failed.
            AdapterChangedError: the file's hash is not `sha256`.
            WeightsFileError, AdapterFormatError: according to its header, it is not an adapter.
        """
        remote = place.startswith("hf:") or _URL.match(place)
        if remote and sha256 and (ref := await asyncio.to_thread(self._cache.find, sha256)):
            return await asyncio.to_thread(self._cache.ref, ref.sha256, _name(place))
        if place.startswith("hf:"):
            ref = await self._from_hub(place, hub_token or self._hub_token)
        elif remote:
            ref = await self._from_url(place, hub_token or self._hub_token)
        else:
            ref = await asyncio.to_thread(self._from_root, place)
        if sha256 and ref.sha256 != sha256:
            raise AdapterChangedError(
                f"{_name(place)} has the sha256 {ref.sha256}, not {sha256} as in the request; "
                "change the hash in the request, or restore the file."
            )
        return ref

    def by_hash(self, sha256: str, name: str) -> AdapterRef | None:
        """Return the adapter with this hash, after putting its file into the cache.

        Args:
            name: former name of the file; files of this name are checked first.

        Returns:
            None if neither the cache nor the adapter folder has such a file.

        Raises:
            OutputError: the file could not be put into the cache.
        """
        if (ref := self._cache.find(sha256)) is not None:
            return ref
        place = adapter_with_hash(self._root, sha256, name, self._cache.sha256_of)
        return None if place is None else self._from_root(place)

    def _from_root(self, name: str) -> AdapterRef:
        return self._cache.keep(adapter_path(self._root, name), name)

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

    async def _from_hub(self, place: str, token: str | None) -> AdapterRef:
        match = _HUB_FILE.fullmatch(place)
        if match is None or ".." in match["file"].split("/"):
            raise AdapterPlaceError(
                f"{place!r} is not a file on the hub; use hf:owner/name/file.safetensors."
            )
        if not match["file"].lower().endswith(".safetensors"):
            raise AdapterPlaceError(
                f"{place!r} is not a .safetensors file; use the full name of the file."
            )
        if HUB not in self._rules.hosts:
            raise AdapterUrlRefusedError(
                "This server does not download LoRAs from the hub; "
                f"its operator can allow it by adding {HUB} to FIDELORA_LORA_HOSTS."
            )
        async with self._downloads:
            try:
                # The request fails at this deadline, but its thread may continue until the hub
                # client's own timeouts.
                async with asyncio.timeout(self._rules.timeout_s):
                    fetched = await asyncio.to_thread(
                        _hub_file,
                        match["repo"],
                        match["file"],
                        match["revision"],
                        token,
                        self._rules.max_bytes,
                    )
            except TimeoutError:
                raise AdapterDownloadError(
                    f"{place} was not downloaded within {self._rules.timeout_s:g} seconds; "
                    "try again, or put the file into the adapter folder."
                ) from None
        return await asyncio.to_thread(self._cache.keep, fetched, _name(place))


def _name(place: str) -> str:
    """Return the adapter's name for messages and records.

    The query of a URL is removed, because it may contain a secret.
    """
    return (
        place.split("?")[0].split("#")[0].rsplit("/", 1)[-1]
        if _URL.match(place) or place.startswith("hf:")
        else place
    )


def _hub_file(
    repo: str, file: str, revision: str | None, token: str | None, max_bytes: int
) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"hf:{repo}/{file}"
    try:
        size = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), token=token).size
        if size is not None and size > max_bytes:
            raise AdapterDownloadError(
                f"{what} is too large ({size:,} bytes); the limit is {max_bytes:,} bytes."
            )
        return Path(hf_hub_download(repo, file, revision=revision, token=token))
    except OfflineModeIsEnabled:
        return _hub_file_on_disk(repo, file, revision)
    except GatedRepoError as error:
        raise AdapterDownloadError(
            f"{what} is gated; accept its terms on the hub, and send hf_token."
        ) from error
    except LocalEntryNotFoundError as error:
        raise AdapterDownloadError(
            f"The hub could not be reached for {what}; try again later."
        ) from error
    except (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        EntryNotFoundError,
        HFValidationError,
    ) as error:
        raise AdapterNotFoundError(
            f"There is no {what} on the hub, or it is private; check the name, or send hf_token."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise AdapterDownloadError(
            f"The hub did not deliver {what}: {str(error).splitlines()[0]:.200}."
        ) from error


def _hub_file_on_disk(repo: str, file: str, revision: str | None) -> Path:
    """Return the file of an earlier download; used if HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise AdapterNotFoundError(
            f"hf:{repo}/{file} is not in the local cache, and HF_HUB_OFFLINE is set; unset "
            "HF_HUB_OFFLINE to download the file."
        ) from error
