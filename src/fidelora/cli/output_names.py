"""Names of the image files of `fidelora generate`."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fidelora.errors import RecipeError
from fidelora.recipe import Recipe

FIELDS = (
    "index", "prompt_index", "prompt", "seed", "lora", "multiplier", "steps", "guidance",
    "sampler", "model", "width", "height", "date", "time",
)  # fmt: skip
"""Fields of name templates, such as `{lora}_{seed}.png`."""

_MAX_TEXT_BYTES = 80
"""Limit of a prompt or LoRA name in a file name, in UTF-8; file systems allow 255 for the whole."""


@dataclass(frozen=True)
class OutputNames:
    """Names of image files.

    Attributes:
        template: path without the suffix, with fields in braces.
        suffix: suffix of all files.
        replaces: True if existing files are replaced. Otherwise, a number is added to the name.
    """

    template: str
    suffix: str
    replaces: bool = False

    def paths(self, images: Sequence[tuple[Recipe, int]], now: datetime) -> list[Path]:
        """Return a different path for each image.

        Args:
            images: recipe and number of the prompt, from 1, of each image.
            now: local time, for the fields `date` and `time`.

        Raises:
            RecipeError: a field of the template has an invalid format.
        """
        paths: list[Path] = []
        taken: set[Path] = set()
        for index, (recipe, prompt_index) in enumerate(images, start=1):
            path = self._path(_values(recipe, index, prompt_index, now), "")
            if self.replaces and len(images) > 1:
                path = self._path(_values(recipe, index, prompt_index, now), f"_{index}")
            count = 1
            while path in taken or (not self.replaces and path.exists()):
                count += 1
                path = self._path(_values(recipe, index, prompt_index, now), f"_{count}")
            taken.add(path)
            paths.append(path)
        return paths

    def _path(self, values: Mapping[str, str | int | float], end: str) -> Path:
        try:
            return Path(f"{self.template.format_map(values)}{end}{self.suffix}")
        except ValueError as error:
            raise RecipeError(f"--output has an invalid format: {error}.", field="out") from error


def parse_output(
    out: str, image_format: str | None, *, prompts: int, adapter_sets: int, frames: int = 1
) -> OutputNames:
    """Parse `--output` and `--format`.

    Args:
        prompts: number of prompts; if there are several, names in a folder contain the index of
            the prompt.
        adapter_sets: number of sets of adapters; if there are several, names in a folder contain
            the names of the adapters.
        frames: frames of each file; videos are webp or mp4 files.

    Raises:
        RecipeError: the format is not supported or does not match the name, or the template has an
            unknown field.
        ImageFormatError: the suffix or format is not supported, or not for a video.
    """
    from fidelora.images.formats import check_format, format_of, is_image_format, suffix_of

    if image_format is not None and not is_image_format(image_format):
        raise RecipeError(
            f"--format is {image_format!r}; it must be png, jpeg, webp or mp4.", field="format"
        )
    default = "webp" if frames > 1 else "png"
    check_format(image_format or default, frames)
    default_suffix = suffix_of(image_format or default)  # type: ignore[arg-type]
    path = Path(out).expanduser()
    is_template = not path.is_dir() and _has_fields(out)
    text = str(path) if is_template else str(path).replace("{", "{{").replace("}", "}}")
    # The format of a field may contain a dot, which does not begin a suffix.
    plain = Path(re.sub(r"\{[^{}]*\}", "_", str(path)) if is_template else path)
    in_folder = out.endswith(("/", os.sep)) or path.is_dir()
    if in_folder or not (plain.suffix or (is_template and "{" in Path(text).name)):
        parts = ["fidelora"]
        parts += ["{lora}"] if adapter_sets > 1 else []
        parts += [f"{{prompt_index:0{len(str(prompts))}}}"] if prompts > 1 else []
        folder = text.rstrip("/")  # empty for the root
        return OutputNames(f"{folder}/{'_'.join([*parts, '{seed}'])}", default_suffix)
    if not plain.suffix:
        return OutputNames(text, default_suffix)
    format_of_name = format_of(plain)
    if image_format not in (None, format_of_name):
        raise RecipeError(
            f"--format {image_format} does not match --output {path.name}; set only one of them.",
            field="format",
        )
    check_format(format_of_name, frames)
    return OutputNames(text.removesuffix(plain.suffix), plain.suffix, replaces=not is_template)


def is_folder(path: Path) -> bool:
    """True if an output path is a folder: it exists, or has no suffix."""
    return path.is_dir() or not path.suffix


def unused_path(path: Path) -> Path:
    """Return a path, with a number added to its name if a file of this name exists."""
    found, count = path, 1
    while found.exists():
        count += 1
        found = path.with_stem(f"{path.stem}_{count}")
    return found


def _has_fields(out: str) -> bool:
    """True if `out` is a template.

    Raises:
        RecipeError: a field is unknown.
    """
    hint = f"the fields are {', '.join(FIELDS)}, and {{{{ stands for a brace."
    try:
        parts = [part for part in string.Formatter().parse(out) if part[1] is not None]
    except ValueError as error:
        raise RecipeError(
            f"--output {out!r:.200} is not a name template: {error}; {hint}", field="out"
        ) from error
    if nested := next((part[2] for part in parts if part[2] and "{" in part[2]), None):
        raise RecipeError(f"--output has fields inside the format {nested!r}; {hint}", field="out")
    names = [str(name) for _, name, _, _ in parts]
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        raise RecipeError(
            f"--output has the unknown field {{{unknown[0]}}}; {hint}",
            field="out",
        )
    return bool(names) or "{{" in out or "}}" in out


def _values(
    recipe: Recipe, index: int, prompt_index: int, now: datetime
) -> dict[str, str | int | float]:
    """Return the values of all fields for one image."""
    adapters = recipe.adapters
    return {
        "index": index,
        "prompt_index": prompt_index,
        "prompt": _as_name(recipe.prompt) or "prompt",
        "seed": recipe.seed,
        "lora": _as_name("+".join(ref.name or ref.sha256[:8] for ref in adapters)) or "base",
        "multiplier": "+".join(f"{ref.multiplier:g}" for ref in adapters) or "0",
        "steps": recipe.steps,
        "guidance": recipe.guidance_scale,
        "sampler": recipe.sampler,
        "model": recipe.model,
        "width": recipe.width,
        "height": recipe.height,
        "date": f"{now:%Y-%m-%d}",
        "time": f"{now:%H%M%S}",
    }


def _as_name(text: str) -> str:
    """Return a shortened text that is valid in file names on every system; may be empty."""
    name = re.sub(r"[^\w.+-]+", "_", text)
    short = name.encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")
    return short.strip("._-")
