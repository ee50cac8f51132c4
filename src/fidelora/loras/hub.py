"""LoRA files on the Hugging Face hub, downloaded to its cache folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fidelora.atomic import is_full, output_error
from fidelora.errors import AdapterDownloadError, AdapterNameError, AdapterNotFoundError

USE_TOKEN = "use a token of your account (HF_TOKEN, or hf_token in a request)"
_SOURCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@]+)(@(?P<revision>[\w./-]+))?")


_MAX_PART_BYTES = 200  # file systems allow 255, and the hub client adds a suffix
_MAX_PATH_BYTES = 1000  # file systems allow 4096, with the cache folder


@dataclass(frozen=True)
class HubFile:
    """A .safetensors file in a repository, at a revision (None: the default branch)."""

    repo: str
    file: str
    revision: str | None

    @classmethod
    def parse(cls, source: str) -> HubFile:
        """Parse `hf:owner/name/file.safetensors`, optionally with `@revision`.

        Raises:
            AdapterNameError: the text has another form, or names another kind of file.
        """
        match = _SOURCE.fullmatch(source)
        if match is None or not all(map(_is_path, match.groupdict().values())):
            raise AdapterNameError(
                f"{source!r:.200} is not a file on the hub; use hf:owner/name/file.safetensors."
            )
        if not match["file"].lower().endswith(".safetensors"):
            raise AdapterNameError(
                f"{source!r:.200} is not a .safetensors file; use the full name of the file."
            )
        return cls(match["repo"], match["file"], match["revision"])

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}"

    def fetch(self, token: str | None, max_bytes: int) -> Path:
        """Return the path of the file in the hub's cache, after downloading it if necessary.

        The environment variables `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` apply.

        Args:
            token: access token; None uses the user's own, if there is one.
            max_bytes: maximum size of the file.

        Raises:
            AdapterNotFoundError: the file does not exist, or is not in the cache while
                `HF_HUB_OFFLINE` is set.
            AdapterDownloadError: the file is too large or gated, or the hub cannot be reached.
            StorageFullError: the disk is full.
        """
        import httpx2  # the hub client's own HTTP library
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

        try:
            size = get_hf_file_metadata(
                hf_hub_url(self.repo, self.file, revision=self.revision), token=token
            ).size
            if size is not None and size > max_bytes:
                raise AdapterDownloadError(
                    f"{self} is too large ({size:,} bytes); the limit is {max_bytes:,} bytes."
                )
            return Path(hf_hub_download(self.repo, self.file, revision=self.revision, token=token))
        except OfflineModeIsEnabled:
            if (path := self._on_disk()) is not None:
                return path
            raise AdapterNotFoundError(
                f"{self} is not in the local cache, and HF_HUB_OFFLINE is set; unset "
                "HF_HUB_OFFLINE to download the file."
            ) from None
        except GatedRepoError as error:
            raise AdapterDownloadError(
                f"{self} is gated; accept its terms on the hub, and {USE_TOKEN}."
            ) from error
        except (httpx2.TransportError, LocalEntryNotFoundError) as error:
            if (path := self._on_disk()) is not None:
                return path
            raise AdapterDownloadError(
                f"{self} is not in the local cache, and the hub cannot be reached; try again later."
            ) from error
        except (
            RepositoryNotFoundError,
            RevisionNotFoundError,
            EntryNotFoundError,
            HFValidationError,
        ) as error:
            raise AdapterNotFoundError(
                f"{self} does not exist on the hub or is private; check the name, or {USE_TOKEN}."
            ) from error
        except (HfHubHTTPError, OSError) as error:
            if is_full(error):
                raise output_error(f"{self} could not be downloaded", error) from error
            raise AdapterDownloadError(
                f"The hub did not deliver {self}: {str(error).splitlines()[0]:.200}."
            ) from error

    def _on_disk(self) -> Path | None:
        """Return the file of an earlier download, or None if it was not downloaded."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(self.repo, self.file, revision=self.revision, local_files_only=True)
            )
        except (LocalEntryNotFoundError, OSError):
            return None


def _is_path(text: str | None) -> bool:
    """True if each part of a path can be the name of a file in the hub's cache."""
    parts = (text or "x").split("/")
    sizes = [len(part.encode("utf-8", "replace")) for part in parts]
    return (
        ".." not in parts
        and "\0" not in (text or "")
        and max(sizes) <= _MAX_PART_BYTES
        and sum(sizes) <= _MAX_PATH_BYTES
    )
