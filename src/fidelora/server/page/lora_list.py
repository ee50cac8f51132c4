"""The LoRAs that the page offers, as their files describe themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fidelora.errors import AdapterError
from fidelora.loras.describe import AdapterSummary, describe_adapter
from fidelora.loras.folder import adapter_names, adapter_path, adapter_with_hash
from fidelora.recipe import AdapterRef
from fidelora.server.context import ServerContext

Choice = tuple[str, str]
"""What is shown, and the name that requests have for it."""


@dataclass(frozen=True)
class LoraList:
    """The folder of LoRAs, read anew at each question."""

    context: ServerContext

    def choices(self) -> list[Choice]:
        """Every LoRA that can be used, with trigger word, rank and step."""
        found = []
        for name in adapter_names(self.context.settings.loras):
            summary = self.summary(name)
            if summary is not None and not summary.problems:
                found.append((_label(name, summary), name))
        return found

    def summary(self, name: str) -> AdapterSummary | None:
        """What the file says of itself; None if it is not there."""
        try:
            path = adapter_path(self.context.settings.loras, name)
            return _described(path, path.stat().st_mtime_ns)
        except (AdapterError, OSError):
            return None

    def trigger(self, names: list[str]) -> str:
        """The trigger word of the first that has one."""
        summaries = map(self.summary, names)
        return next((summary.trigger for summary in summaries if summary and summary.trigger), "")

    def keep(self, name: str) -> AdapterRef:
        """The file by its content, which is in the cache then, as for a request.

        Raises:
            AdapterError, WeightsFileError: it is not there, or cannot be read.
            OutputError: the cache cannot be written to.
        """
        return self.context.cache.keep(adapter_path(self.context.settings.loras, name), name)

    def name_of(self, adapter: AdapterRef) -> str | None:
        """What requests call the file with these bytes; None if it is not here. Files of the same name are looked at first."""
        return adapter_with_hash(
            self.context.settings.loras, adapter.sha256, adapter.name, self.context.cache.sha256_of
        )


@lru_cache(maxsize=10_000)
def _described(path: Path, _changed: int) -> AdapterSummary:
    return describe_adapter(path)


def _label(name: str, summary: AdapterSummary) -> str:
    said = [name]
    if summary.trigger:
        said.append(f"trigger {summary.trigger}")
    if summary.ranks:
        said.append(f"rank {'/'.join(map(str, summary.ranks))}")
    if summary.step is not None:
        said.append(f"step {summary.step}")
    return " · ".join(said)
