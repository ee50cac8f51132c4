"""References to adapters in recipes. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from fidelora.adapter_file import AdapterFile
from fidelora.checks import check_choice, check_range, check_text
from fidelora.embedding_file import embedding_word
from fidelora.errors import RecipeError
from fidelora.families.spec import Stage

MAX_MULTIPLIER = 5.0  # the trainer samples concept sliders at -5 to 5
MAX_ALPHA = 1e6  # far above every rank
SHA256 = re.compile(r"[0-9a-f]{64}")
_STAGE_IN_NAME = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)


def stage_in_name(name: str) -> Stage | None:
    """Return the stage that the trainer puts into file names (`high_noise` or `low_noise`).

    Returns:
        `high` or `low`; None if the name contains neither or both.
    """
    found = {match.lower() for match in _STAGE_IN_NAME.findall(name)}
    if found == {"high"}:
        return "high"
    return "low" if found == {"low"} else None


@dataclass(frozen=True)
class AdapterRef:
    """Reference to an adapter (LoRA, LoKr, ...) in a recipe, with its multiplier.

    Attributes:
        sha256: hash of the file in hex. It identifies the adapter; the path does not.
        multiplier: strength of the adapter, -5..5; 0 disables the adapter.
        alpha: alpha of a DoRA, which its file does not contain; the scale is alpha / rank. None
            sets the scale to 1.
        name: name that is shown to users; not part of the identity.
        path: last known path of the file; not part of the identity and not in the JSON form.
        file: content that `from_file` hashed; not part of the identity and not in the JSON form.
        word: word that stands for an embedding in prompts; None for adapters of other kinds. The
            multiplier of an embedding is always 1.
        stage: `high` or `low`: the adapter changes the denoiser for high or for low noise. None in
            families with one denoiser. In other families, a recipe replaces None by the stage in
            the name (`stage_in_name`).

    Raises:
        RecipeError: an attribute is out of range.
    """

    sha256: str
    multiplier: float = 1.0
    name: str = field(default="", compare=False)
    path: Path | None = field(default=None, compare=False, repr=False)
    alpha: float | None = None
    file: AdapterFile | None = field(default=None, compare=False, repr=False)
    word: str | None = None
    stage: Stage | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not SHA256.fullmatch(self.sha256):
            raise RecipeError(
                "An adapter's sha256 must be 64 hexadecimal digits in lower case.", field="adapters"
            )
        check_text("name", self.name)
        check_range("multiplier", self.multiplier, -MAX_MULTIPLIER, MAX_MULTIPLIER)
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0.0, MAX_ALPHA)
            # Alpha 0 means that alpha equals the rank, as in the trainer.
            object.__setattr__(self, "alpha", float(self.alpha) or None)
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))
        if self.word is not None:
            check_text("word", self.word)
            if not self.word.strip():
                raise RecipeError(
                    "The word of an embedding is empty; set it to the word that stands for the "
                    "embedding in prompts.",
                    field="adapters",
                )
            if self.multiplier != 1:
                raise RecipeError(
                    f"{self.word} is an embedding, which has no strength; set its multiplier to 1 "
                    f"instead of {self.multiplier:g}, or leave the embedding out.",
                    field="adapters",
                )
        if self.stage is not None:
            check_choice("stage", self.stage, get_args(Stage))
        # `+ 0.0` turns -0.0 into 0.0. The two are equal, but their JSON forms differ.
        object.__setattr__(self, "multiplier", float(self.multiplier) + 0.0)

    @property
    def named_stage(self) -> Stage | None:
        """The stage that the name contains; see `stage_in_name`."""
        return stage_in_name(self.name)

    @classmethod
    def from_file(cls, path: str | Path, multiplier: float = 1.0) -> AdapterRef:
        """Return a reference to the current content of the file at `path`.

        The header is checked before the rest is read. The file is opened and hashed once. Its
        content stays in memory for the engine if it fits in the budget (`MAX_KEPT_BYTES`).

        Raises:
            AdapterNotFoundError: the file does not exist.
            WeightsFileError: the file is not a valid .safetensors file, or cannot be read.
            RecipeError: the multiplier is out of range.
        """
        path = Path(path).expanduser()
        file = AdapterFile.open(path, keep="within_budget")
        # The name is written into images and must be valid text. A file name may be invalid.
        name = path.stem.encode("utf-8", "replace").decode()
        word = embedding_word(file.header, path.name)
        return cls(file.sha256, multiplier, name=name, path=file.path, file=file, word=word)
