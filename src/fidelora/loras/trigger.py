"""The text that replaces `[trigger]` in prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fidelora.adapters.tensor_names import trigger_text
from fidelora.loras.describe import describe_header
from fidelora.recipe import AdapterRef, replace_trigger
from fidelora.safetensors_header import Header, read_file_header

_PLACEHOLDERS = ("[trigger]", "[name]")


@dataclass(frozen=True)
class Trigger:
    """The text that replaces `[trigger]`, and the adapter that it was read from.

    Attributes:
        text: the text; empty if the placeholders stay in the prompt.
        adapter: name of the adapter whose metadata contains the text; empty if the text was given
            by the caller or consists of the tokens of an embedding.
        is_missing: True if neither the caller nor an adapter has a text.
    """

    text: str
    adapter: str = ""
    is_missing: bool = False

    def fill(self, prompt: str) -> str:
        """Return the prompt with the placeholders replaced."""
        return replace_trigger(prompt, self.text)

    def note(self, prompts: Iterable[str]) -> str:
        """Return a sentence if a prompt needs a text that the caller did not give, or ""."""
        if not any(map(has_placeholder, prompts)):
            return ""
        if self.is_missing:
            return (
                "[trigger] stays in the prompt as it is, because no trigger word was given and no "
                "LoRA has one in its metadata."
            )
        if not self.adapter:
            return ""
        return (
            f"[trigger] is {self.text!r}, the trigger word in the metadata of the LoRA "
            f"{self.adapter}."
        )


def has_placeholder(prompt: str) -> bool:
    """True if a trigger word changes the prompt."""
    return any(placeholder in prompt for placeholder in _PLACEHOLDERS)


def trigger_of(adapters: Sequence[AdapterRef], given: str | None) -> Trigger:
    """Return the trigger of images with these adapters.

    The order of preference is: `given`; all tokens of the first embedding; the trigger word in the
    metadata of the first adapter that has one.

    Args:
        given: the caller's trigger word; None uses the embedding or the metadata. With an empty
            text, the metadata is ignored, so that the placeholders of a finished prompt stay as
            they are unless the adapters include an embedding.

    Raises:
        WeightsFileError: an adapter's file is not a valid .safetensors file.
    """
    text = trigger_text(adapters, given or "")
    if text or given is not None:
        return Trigger(text)
    for ref in adapters:
        header = _header_of(ref)
        found = describe_header(header, ref.name).trigger if header is not None else ""
        if found:
            return Trigger(found, ref.name)
    return Trigger("", is_missing=True)


def _header_of(ref: AdapterRef) -> Header | None:
    if ref.file is not None and ref.file.sha256 == ref.sha256:
        return ref.file.header
    return read_file_header(ref.path) if ref.path is not None else None
