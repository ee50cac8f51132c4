"""The LoRAs and embeddings that the page offers, described by their file headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fidelora.engine.header_family import HeaderFit
from fidelora.errors import AdapterError
from fidelora.loras.describe import AdapterSummary, describe_adapter
from fidelora.loras.folder import adapter_names, adapter_path, adapter_with_hash
from fidelora.recipe import AdapterRef
from fidelora.server.context import ServerContext
from fidelora.server.lora_fit import fit_of_file
from fidelora.server.page.visitor import visitor

EMBEDDING = "embedding"
"""Kind of a file that contains only an embedding (`AdapterSummary.kind`)."""
Choice = tuple[str, str]
"""Label in the drop-down list, and the LoRA's path in requests."""


@dataclass(frozen=True)
class LoraList:
    """The LoRAs of the server's folder that the visitor sees, read on every call."""

    context: ServerContext

    def choices(self) -> list[Choice]:
        """Return every usable LoRA, labelled with its trigger word, rank and step."""
        found = []
        for path in adapter_names(self.context.settings.loras, owner=visitor().visible_owner):
            summary = self.summary(path)
            if summary is not None and not summary.problems:
                fit = self.fit(path)
                found.append((_label(path, summary, fit), path))
        return found

    def fit(self, path: str) -> HeaderFit:
        """Return which of the server's models a file fits; see `fit_of_file`."""
        try:
            return fit_of_file(self._file(path), self.context.configured_models)
        except AdapterError:
            return HeaderFit((), "")

    def summary(self, path: str) -> AdapterSummary | None:
        """Return the summary of a file's header, or None if there is no such file."""
        try:
            file = self._file(path)
            return _described(file, file.stat().st_mtime_ns)
        except (AdapterError, OSError):
            return None

    def is_embedding(self, path: str) -> bool:
        """True if a file is a textual-inversion embedding, which has no multiplier."""
        summary = self.summary(path)
        return summary is not None and summary.kind == EMBEDDING

    def embedding_in(self, prompt: str, chosen: Sequence[str]) -> tuple[str, str] | None:
        """Return the word and path of an embedding that a prompt names but that is not chosen."""
        chosen_words = {
            summary.trigger for path in chosen if (summary := self.summary(path)) is not None
        }
        for _, path in self.choices():
            summary = self.summary(path)
            if summary is None or summary.kind != EMBEDDING or summary.trigger in chosen_words:
                continue
            if re.search(rf"(?<!\w){re.escape(summary.trigger)}(?!\w)", prompt):
                return summary.trigger, path
        return None

    def trigger(self, paths: list[str]) -> str:
        """Return the trigger word of the first LoRA that has one, or an empty string."""
        summaries = map(self.summary, paths)
        return next((summary.trigger for summary in summaries if summary and summary.trigger), "")

    def cached_ref(self, path: str) -> AdapterRef:
        """Copy a LoRA into the adapter cache, as a request does, and return its reference.

        Raises:
            AdapterError, WeightsFileError: the file does not exist or cannot be read.
            OutputError: the cache cannot be written to.
        """
        return self.context.cache.add(self._file(path), path)

    def path_of(self, adapter: AdapterRef) -> str | None:
        """Return the request path of the file with an adapter's SHA-256, or None.

        Files with the adapter's name are hashed first.
        """
        return adapter_with_hash(
            self.context.settings.loras,
            adapter.sha256,
            adapter.name,
            self.context.cache.sha256_of,
            owner=visitor().visible_owner,
        )

    def _file(self, path: str) -> Path:
        return adapter_path(self.context.settings.loras, path, owner=visitor().visible_owner)


@lru_cache(maxsize=10_000)  # keyed by modification time, too, so that a changed file is read again
def _described(file: Path, _modified_ns: int) -> AdapterSummary:
    return describe_adapter(file)


def _label(path: str, summary: AdapterSummary, fit: HeaderFit) -> str:
    parts = [path]
    if summary.tokens:
        tokens = "1 token" if summary.tokens == 1 else f"{summary.tokens} tokens"
        parts.append(f"embedding, {tokens}")
    if summary.trigger:
        parts.append(f"trigger {summary.trigger}")
    if summary.ranks:
        parts.append(f"rank {'/'.join(map(str, summary.ranks))}")
    if summary.step is not None:
        parts.append(f"step {summary.step}")
    if fit.problem:
        parts.append("fits no model of this server")
    return " · ".join(parts)
