"""Prompts, LoRAs and seeds of `fidelora generate`, combined into one recipe per image."""

from __future__ import annotations

import glob
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fidelora.adapters.tensor_names import noise_of_adapter
from fidelora.errors import AdapterNotFoundError, RecipeError
from fidelora.families import get_family
from fidelora.loras.trigger import Trigger, has_placeholder, trigger_of
from fidelora.recipe import AdapterRef, Noise, Recipe

MAX_IMAGES = 1000
STDIN = "-"

_SIZE = re.compile(r"\s*(\d{1,5})\s*(?:[xX×*]\s*(\d{1,5})\s*)?")
_LORA = re.compile(r"(?P<name>.+):(?P<multiplier>[+-]?(\d+(\.\d*)?|\.\d+))")
_LORA_SUFFIX = ".safetensors"

AdapterSet = tuple[AdapterRef, ...]
"""Adapters that are applied together, in order."""


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """Return the prompts of `PROMPT` or `--prompts`; `-` reads stdin.

    Files and stdin contain one prompt per line; blank lines are skipped.

    Raises:
        RecipeError: no prompt or two sources of prompts were given, or the text cannot be read.
    """
    if prompt is not None and file is not None:
        raise RecipeError(
            "PROMPT and --prompts are both set; leave out one of them.", field="prompt"
        )
    source = STDIN if prompt == STDIN else file
    if source is None:
        if prompt is None:
            raise RecipeError(
                "No prompt was given; give PROMPT, - to read prompts from stdin, or --prompts "
                "FILE.",
                field="prompt",
            )
        return [prompt]
    where = "stdin" if source == STDIN else source
    try:
        content = (
            sys.stdin.buffer.read() if source == STDIN else Path(source).expanduser().read_bytes()
        )
    except OSError as error:
        raise RecipeError(
            f"The prompts in {where} cannot be read: {error.strerror or error}.", field="prompt"
        ) from error
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The prompts in {where} are not UTF-8 text; convert the file.", field="prompt"
        ) from error
    if prompts := [line.strip() for line in lines if line.strip()]:
        return prompts
    raise RecipeError(f"{where} contains no prompt; write one prompt on each line.", field="prompt")


def size_notes(asked: Mapping[str, int], recipe: Recipe) -> list[str]:
    """Return a note if the recipe's size was rounded down from the one that the user set.

    Args:
        asked: result of `read_size`.
    """
    width, height = (asked.get("width", recipe.width), asked.get("height", recipe.height))
    if (width, height) == (recipe.width, recipe.height):
        return []
    family = get_family(recipe.model)
    return [
        f"note: The size {width} x {height} was rounded down to {recipe.width} x {recipe.height}; "
        f"sides of {family.title} images are multiples of {family.resolution_divisor}."
    ]


def read_size(size: str | None, width: int | None, height: int | None) -> dict[str, int]:
    """Return the recipe fields that `--size`, `--width` and `--height` set.

    Raises:
        RecipeError: `--size` is not WIDTHxHEIGHT or one number, or another option was set, too.
    """
    if size is None:
        given = {"width": width, "height": height}
        return {name: value for name, value in given.items() if value is not None}
    if width is not None or height is not None:
        raise RecipeError(
            "--size is set together with --width or --height; leave out one of them.", field="size"
        )
    match = _SIZE.fullmatch(size)
    if match is None:
        raise RecipeError(
            f"--size is {size!r:.60}; set WIDTHxHEIGHT in pixels, such as 768x512, or one number "
            "for a square.",
            field="size",
        )
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def adapter_sets(texts: Sequence[str]) -> list[AdapterSet]:
    """Return the sets of adapters that `--lora` options select; each makes its own images.

    An option with a folder or a pattern stands for several files, which are used one after the
    other. With several such options, every combination is a set.

    Raises:
        AdapterNotFoundError, WeightsFileError: a file does not exist or cannot be used.
        RecipeError: an option is empty, a multiplier is out of range, or there are too many sets.
    """
    choices = [list(_files(text)) for text in texts]
    count = 1
    for options in choices:
        count *= len(options)
    check_count(count)
    refs = {pair: AdapterRef.from_file(*pair) for pair in dict.fromkeys(itertools.chain(*choices))}
    return [tuple(refs[pair] for pair in pairs) for pairs in itertools.product(*choices)]


def check_count(count: int) -> None:
    """Check the number of images of one command.

    Raises:
        RecipeError: there are more than `MAX_IMAGES`.
    """
    if count > MAX_IMAGES:
        raise RecipeError(
            f"The command would make {count:,} images; the maximum is {MAX_IMAGES:,}. Use fewer "
            "prompts or LoRAs, or a smaller -n.",
            field="number",
        )


def _files(text: str) -> Iterator[tuple[str, float]]:
    """Yield the files and the multiplier of `FILE`, `FILE:MULT`, a folder or a pattern.

    An existing file or folder with the whole name takes precedence.
    """
    if not text:
        raise RecipeError("--lora is empty; set the name of a file.", field="adapters")
    match = _LORA.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        name, multiplier = text, 1.0
    else:
        name, multiplier = match["name"], float(match["multiplier"])
    path = Path(name).expanduser()
    if path.is_dir():
        found = [str(one) for one in path.iterdir() if _is_lora(one)]
        missing = f"The folder {path} has no {_LORA_SUFFIX} file; check --lora."
    elif glob.has_magic(name) and not path.exists():
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - keeps relative paths
        found = [one for one in matches if _is_lora(Path(one))]
        missing = f"No {_LORA_SUFFIX} file matches {name}; check --lora."
    else:
        yield name, multiplier
        return
    if not found:
        raise AdapterNotFoundError(missing)
    yield from ((one, multiplier) for one in sorted(found, key=_natural_order))


def _is_lora(path: Path) -> bool:
    return path.suffix.lower() == _LORA_SUFFIX and path.is_file()


def _natural_order(path: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which 9 comes before 10."""
    parts = re.split(r"(\d+)", path.removesuffix(_LORA_SUFFIX))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def plan_recipes(
    prompts: Sequence[str],
    sets: Sequence[AdapterSet],
    trigger: str | None,
    seeds: int,
    noise_of: Callable[[AdapterSet], Noise],
    settings: Mapping[str, Any],
) -> list[list[Recipe]]:
    """Return the recipes of all images, in one list for each set of adapters.

    Within a set, the images of a prompt follow each other. All prompts and sets have the same
    seeds.

    Args:
        seeds: number of consecutive seeds.
        noise_of: returns the recipe field `noise` of a set.
        settings: the other recipe fields, the same for all images.

    Raises:
        RecipeError: a value is out of range or not supported.
    """
    check_count(len(prompts) * len(sets) * seeds)
    planned = []
    for adapters in sets:
        triggered = trigger_of(adapters, trigger)
        first = [
            Recipe(
                prompt=triggered.fill(prompt),
                adapters=adapters,
                noise=noise_of(adapters),
                **settings,
            )
            for prompt in prompts
        ]
        planned.append(
            [replace(one, seed=one.seed + index) for one in first for index in range(seeds)]
        )
    return planned


def resolve_noise(noise: str, adapters: AdapterSet, model: str) -> Noise:
    """Return the noise mode; `auto` depends on the trainer version in the first adapter's file."""
    if noise != "auto":
        return noise  # type: ignore[return-value]  # checked by the recipe
    if "noise" not in get_family(model).uses:
        return "modern"
    return noise_of_adapter(adapters[0]) if adapters else "modern"


def with_dtypes(
    planned: Sequence[Sequence[Recipe]],
    auto_dtype: str,
    dtype: str,
    vae_dtype: str | None,
    text_encoder_dtype: str | None,
) -> list[Recipe]:
    """Return all recipes in one list, with their dtypes.

    Args:
        auto_dtype: dtype that `auto` stands for on the engine's device.
        dtype: dtype of all parts of the model, or `auto`.
        vae_dtype, text_encoder_dtype: dtypes of these parts; None for the same as `dtype`.
    """
    main = auto_dtype if dtype == "auto" else dtype
    dtypes: dict[str, Any] = {
        "dtype": main,
        "vae_dtype": vae_dtype or main,
        "text_encoder_dtype": text_encoder_dtype or main,
    }
    return [replace(recipe, **dtypes) for recipes in planned for recipe in recipes]


def trigger_remarks(
    prompts: Sequence[str], sets: Sequence[AdapterSet], trigger: str | None
) -> tuple[list[str], list[str]]:
    """Return notes and warnings about the replacement of `[trigger]`."""
    placeholders = any(map(has_placeholder, prompts))
    if trigger and not placeholders:
        return [], ["--trigger has no effect because the prompt does not contain [trigger]."]
    used: dict[str, Trigger] = {}
    for adapters in sets:
        one = trigger_of(adapters, trigger)
        used.setdefault(one.text, one)
    notes = [note for one in used.values() if one.text and (note := one.note(prompts))]
    if placeholders and trigger is None and "" in used:
        return notes, [
            "[trigger] stays in the prompt as it is, because no trigger word is set or stored in "
            "the LoRA; set --trigger."
        ]
    return notes, []
