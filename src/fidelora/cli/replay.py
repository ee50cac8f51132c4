"""`fidelora replay`"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.atomic import make_folder, write_atomically
from fidelora.cli.console import (
    Debug,
    Device,
    FidelityOption,
    failure_is_no_difference,
    make_engine,
    progress_bar,
    warn,
)
from fidelora.errors import AdapterNotFoundError, AdaptersMissingError, ImageRecordError
from fidelora.recipe import AdapterRef, Recipe, file_sha256

if TYPE_CHECKING:
    from fidelora.engine.engine import Engine
    from fidelora.images.parameters import Parameters
    from fidelora.images.read import Origin
    from fidelora.images.write import GeneratedImage
    from fidelora.training.compare import Comparison

DIFFERENT = 1


@failure_is_no_difference
def replay(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP with its recipe inside.")
    ],
    lora: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A LoRA of the image, under any name.")
    ] = None,
    lora_dir: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Where LoRAs are looked for by their hashes."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The new image (.png, .jpg, .webp); by default IMAGE_again beside it.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Tell whether the pixels are the same; leave with 1 if not."
        ),
    ] = False,
    fidelity: Annotated[
        FidelityOption | None, typer.Option(help="exact or fast, in place of the recipe's.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, diffusers folder or .safetensors checkpoint, in place of the recipe's."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Device = "auto",
    offload: Annotated[str, typer.Option(help="none, model or sequential.")] = "none",
    debug: Debug = False,
) -> None:
    """Make an image again from what its file says, and prove that it is the same.

    Exit codes: 0 made (with --compare: the same pixels), 1 other pixels, 2 wrong use or a file that cannot be used.
    """
    from fidelora.images.read import read_origin

    try:
        content = image.read_bytes()
    except OSError as error:
        raise ImageRecordError(f"{image} cannot be read: {error.strerror or error}.") from error
    origin = read_origin(content, image.name)
    files = _Files(lora or [], lora_dir or [])
    engine: Engine | None = None
    if origin.recipe is not None:
        recipe = replace(origin.recipe, adapters=files.with_bytes(origin.recipe.adapters))
    else:
        assert origin.parameters is not None, "an image that says nothing is an error"
        adapters = files.named(origin.parameters)
        engine = make_engine(device, offload)
        recipe = _as_far_as_it_goes(origin.parameters, adapters, engine)
    recipe, changes = _changed(recipe, fidelity, base_model)
    for name, (was, now) in changes.items():
        warn(f"{name} is {now!r} in place of {was!r}.")
    target = _target(image, out)

    engine = engine or make_engine(device, offload)
    with progress_bar(f"seed {recipe.seed}") as on_step:
        made = engine.generate(recipe, on_step)
    for sentence in made.warnings:
        warn(sentence)
    _write(made, target, origin)
    found = _compare(made, content, origin) if compare else None
    if as_json:
        typer.echo(
            json.dumps(_document(image, target, origin, changes, made, found, compare), indent=2)
        )
    else:
        typer.echo(str(target))
        if compare:
            _say(made, origin, found)
    if compare and (found is None or not found.identical):
        raise typer.Exit(DIFFERENT)


class _Files:
    """The LoRAs that the command line gives, each read once at most."""

    def __init__(self, files: Sequence[Path], folders: Sequence[Path]) -> None:
        self._given = [AdapterRef.from_file(path) for path in files]
        for folder in folders:
            if not folder.is_dir():
                raise AdapterNotFoundError(f"There is no folder {folder}; check --lora-dir.")
        self._folders = [folder.expanduser().resolve() for folder in folders]
        self._hashes: dict[Path, str] = {}

    def with_bytes(self, adapters: Sequence[AdapterRef]) -> tuple[AdapterRef, ...]:
        """The same adapters with the places of their bytes.

        Raises:
            AdaptersMissingError: some are nowhere.
        """
        found = [self._of_hash(ref) for ref in adapters]
        missing = [
            (ref.sha256, ref.name)
            for ref, path in zip(adapters, found, strict=True)
            if path is None
        ]
        if missing:
            raise _missing(missing)
        return tuple(replace(ref, path=path) for ref, path in zip(adapters, found, strict=True))

    def named(self, parameters: Parameters) -> tuple[AdapterRef, ...]:
        """The adapters that another program's text names; says so where the hash in it is another one.

        Raises:
            AdaptersMissingError: some are nowhere.
            AdapterPlaceError: there are several of a name.
        """
        found = [self._of_name(lora.name) for lora in parameters.loras]
        missing = [
            (lora.hash, lora.name)
            for lora, ref in zip(parameters.loras, found, strict=True)
            if ref is None
        ]
        if missing:
            raise _missing(missing)
        refs = tuple(ref for ref in found if ref is not None)
        for lora, ref in zip(parameters.loras, refs, strict=True):
            if lora.hash and not ref.sha256.startswith(lora.hash):
                warn(
                    f"{lora.name} had the hash {lora.hash}, and this file's sha256 is {ref.sha256}: it may be another file."
                )
        return refs

    def _of_hash(self, wanted: AdapterRef) -> Path | None:
        from fidelora.loras.folder import adapter_path, adapter_with_hash

        for ref in self._given:
            if ref.sha256 == wanted.sha256:
                return ref.path
        for folder in self._folders:
            if (
                name := adapter_with_hash(folder, wanted.sha256, wanted.name, self._sha256_of)
            ) is not None:
                return adapter_path(folder, name)
        return None

    def _of_name(self, name: str) -> AdapterRef | None:
        from fidelora.loras.folder import adapter_named_in_prompt, adapter_path

        for ref in self._given:
            if ref.name == name:
                return ref
        for folder in self._folders:
            try:
                return AdapterRef.from_file(
                    adapter_path(folder, adapter_named_in_prompt(folder, name))
                )
            except AdapterNotFoundError:
                continue
        return None

    def _sha256_of(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = file_sha256(path)
        return self._hashes[path]


def _missing(missing: Sequence[tuple[str, str]]) -> AdaptersMissingError:
    error = AdaptersMissingError(missing=missing)
    return AdaptersMissingError(
        f"{error} Give them by --lora FILE or --lora-dir DIR.", missing=missing
    )


def _as_far_as_it_goes(
    parameters: Parameters, adapters: Sequence[AdapterRef], engine: Engine
) -> Recipe:
    from fidelora.adapters.tensor_names import noise_of_file

    warn(
        "The image has no recipe of Fidelora's; AUTOMATIC1111's parameters are read as far as they go, and give another image."
    )
    for one in parameters.ignored:
        warn(f"{one.name} {one.value!r:.100} is not used: {one.reason}")
    dtypes = dict.fromkeys(("dtype", "vae_dtype", "text_encoder_dtype"), engine.auto_dtype)
    noise = noise_of_file(adapters[0].path) if adapters and adapters[0].path else "modern"
    return parameters.recipe(adapters, noise=noise, **dtypes)


def _changed(
    recipe: Recipe, fidelity: FidelityOption | None, base_model: str | None
) -> tuple[Recipe, dict[str, tuple[Any, Any]]]:
    """The recipe as the options want it, and what that changes: by field, what it was and what it is."""
    wanted: dict[str, Any] = {} if base_model is None else {"base_model": base_model}
    if fidelity is not None:
        wanted["fidelity"] = fidelity.value
        if fidelity is FidelityOption.FAST:
            wanted["adapter_mode"] = "merged"  # the one way that fast has
    after = replace(recipe, **wanted)
    changes = {name: (getattr(recipe, name), getattr(after, name)) for name in wanted}
    return after, {name: change for name, change in changes.items() if change[0] != change[1]}


def _target(image: Path, out: Path | None) -> Path:
    """Where the new image goes: what was asked for, or a name beside the old one that is free."""
    from fidelora.images.write import format_of

    if out is not None:
        format_of(out)
        make_folder(out.expanduser().parent)
        return out.expanduser()
    path, count = image.with_stem(f"{image.stem}_again"), 1
    format_of(path)
    while path.exists():
        count += 1
        path = image.with_stem(f"{image.stem}_again_{count}")
    return path


def _write(made: GeneratedImage, target: Path, origin: Origin) -> None:
    from fidelora.images.write import format_of

    image_format = format_of(target)
    write_atomically(
        target, made.encode(image_format, origin.quality if image_format == origin.format else None)
    )


def _compare(made: GeneratedImage, content: bytes, origin: Origin) -> Comparison | None:
    """How our pixels differ from the file's, after the same encoding; None if the file has another size."""
    import numpy as np
    from PIL import Image

    from fidelora.training.compare import compare

    def decoded(file: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        with Image.open(io.BytesIO(file)) as image:
            return np.asarray(image.convert("RGB"))

    ours, theirs = decoded(made.encode(origin.format, origin.quality)), decoded(content)  # type: ignore[arg-type]
    return compare(ours, theirs) if ours.shape == theirs.shape else None


def _say(made: GeneratedImage, origin: Origin, found: Comparison | None) -> None:
    if found is None:
        height, width = made.pixels.shape[:2]
        typer.echo(
            f"DIFFERENT: the file is {origin.width}x{origin.height}, and its recipe makes {width}x{height}; it was resized."
        )
        return
    typer.echo(found.in_words)
    if not found.identical:
        for name, (then, now) in _other_environment(made, origin).items():
            typer.echo(f"  {name} was {then}, and is {now} here")


def _other_environment(made: GeneratedImage, origin: Origin) -> dict[str, tuple[str, str]]:
    """What could have had a part in the last bits, and is another thing here: by name, then and now."""
    names = dict.fromkeys([*origin.environment, *made.environment]) if origin.environment else {}
    both = {
        name: (origin.environment.get(name, "nothing"), made.environment.get(name, "nothing"))
        for name in names
    }
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _document(
    image: Path,
    target: Path,
    origin: Origin,
    changes: Mapping[str, tuple[Any, Any]],
    made: GeneratedImage,
    found: Comparison | None,
    compared: bool,
) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "image": str(image),
        "out": str(target),
        "source": "a1111" if origin.recipe is None else "fidelora",
        "recipe": made.recipe.to_dict(),
        "changes": {name: {"was": was, "now": now} for name, (was, now) in changes.items()},
        "ignored": [asdict(one) for one in origin.parameters.ignored] if origin.parameters else [],
        "environment": {
            name: {"was": then, "now": now}
            for name, (then, now) in _other_environment(made, origin).items()
        },
        "identical": found.identical if found else False if compared else None,
        "comparison": asdict(found) if found else None,
    }
