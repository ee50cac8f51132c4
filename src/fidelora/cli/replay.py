"""`fidelora replay`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.atomic import write_atomically
from fidelora.cli.console import make_output_folder, progress_bar, reserve_exit_code_1, warn
from fidelora.cli.engines import ImageMaker, image_maker
from fidelora.cli.options import (
    DEVICE_PANEL,
    MODEL_PANEL,
    AsJson,
    Debug,
    Device,
    FidelityOption,
    Offload,
)
from fidelora.errors import AdapterNotFoundError, AdaptersMissingError, ImageRecordError
from fidelora.recipe import AdapterRef, Recipe, file_sha256
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.images.parameters import Parameters
    from fidelora.images.read import Origin
    from fidelora.images.write import GeneratedImage
    from fidelora.training.compare import Comparison

DIFFERENT = 1  # exit code of --compare if pixels differ


@reserve_exit_code_1
def replay(
    image: Annotated[
        Path,
        typer.Argument(metavar="IMAGE", help="PNG, JPEG, WebP or MP4 file that contains a recipe."),
    ],
    lora: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="LoRA that the image was made with. Its file name matters only for images of "
            "other programs.",
        ),
    ] = None,
    lora_dir: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder to search for LoRAs, by hash, or by name for images of other programs.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            "--out",
            metavar="FILE",
            help="Output file (.png, .jpg, .webp or .mp4); by default IMAGE_again in the same "
            "folder.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Compare the pixels with those of IMAGE; exit with 1 if any differ."
        ),
    ] = False,
    fidelity: Annotated[
        FidelityOption | None,
        typer.Option(help="exact or fast; by default the recipe's.", rich_help_panel=DEVICE_PANEL),
    ] = None,
    emphasis: Annotated[
        bool,
        typer.Option(
            "--emphasis",
            help="For images of AUTOMATIC1111's web UI: weight words in brackets, such as "
            "(word:1.2), as the web UI does.",
        ),
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            "--base",
            metavar="BASE",
            help="Hub id, diffusers folder or .safetensors checkpoint; by default the recipe's.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    as_json: AsJson = False,
    device: Device = "auto",
    offload: Offload = "none",
    debug: Debug = False,
) -> None:
    """Generate an image again from the recipe in its file.

    Exit codes: 0 done (with --compare: all pixels are the same), 1 some pixels differ, 2 a usage
    error or a file that cannot be used.
    """
    from fidelora.images.read import read_origin

    try:
        content = image.read_bytes()
    except OSError as error:
        raise ImageRecordError(f"{image} cannot be read: {error.strerror or error}.") from error
    origin = read_origin(content, image.name, with_emphasis=emphasis)
    files = _AdapterFiles(lora or [], lora_dir or [])
    engine: ImageMaker | None = None
    if origin.recipe is not None:
        recipe = replace(origin.recipe, adapters=files.resolve(origin.recipe.adapters))
    else:
        assert origin.parameters is not None, "read_origin raises for an image that has neither"
        adapters = files.find_by_name(origin.parameters)
        engine = image_maker(device, offload)
        recipe = _recipe_from_parameters(origin.parameters, adapters, engine)
    recipe, changes = _apply_options(recipe, fidelity, base_model)
    _warn_of(changes)
    target = _output_path(image, out)

    engine = engine or image_maker(device, offload, recipe)
    with progress_bar(f"seed {recipe.seed}") as on_step:
        made = engine.generate(recipe, on_step)
    base_changes = _base_changes(origin.recipe, made.recipe)
    _warn_of(base_changes)
    changes |= base_changes
    for sentence in made.warnings:
        warn(sentence)
    _write(made, target, origin)
    comparison = _compare(made, content, origin) if compare else None
    if as_json:
        typer.echo(
            json.dumps(
                _document(image, target, origin, changes, made, comparison, compare), indent=2
            )
        )
    else:
        typer.echo(str(target))
        if compare:
            _print_comparison(made, origin, comparison)
    if compare and (comparison is None or not comparison.identical):
        raise typer.Exit(DIFFERENT)


class _AdapterFiles:
    """LoRA files given with `--lora` and `--lora-dir`; each file is hashed at most once."""

    def __init__(self, files: Sequence[Path], folders: Sequence[Path]) -> None:
        self._given = [AdapterRef.from_file(path) for path in files]
        for folder in folders:
            if not folder.is_dir():
                raise AdapterNotFoundError(f"The folder {folder} does not exist; check --lora-dir.")
        self._folders = [folder.expanduser().resolve() for folder in folders]
        self._hashes: dict[Path, str] = {}

    def resolve(self, adapters: Sequence[AdapterRef]) -> tuple[AdapterRef, ...]:
        """Return the adapters, each with the path of the file that has its hash.

        Raises:
            AdaptersMissingError: some files were not found.
        """
        found = [self._find_hash(ref) for ref in adapters]
        missing = [
            (ref.sha256, ref.name)
            for ref, path in zip(adapters, found, strict=True)
            if path is None
        ]
        if missing:
            raise _missing_error(missing)
        return tuple(replace(ref, path=path) for ref, path in zip(adapters, found, strict=True))

    def find_by_name(self, parameters: Parameters) -> tuple[AdapterRef, ...]:
        """Return the adapters named in another program's parameters; warn if a hash differs.

        Raises:
            AdaptersMissingError: some files were not found.
            AdapterNameError: several files have the same name.
        """
        from fidelora.loras.hashes import has_hash

        found = [self._find_name(lora.name) for lora in parameters.loras]
        missing = [
            (lora.hash, lora.name)
            for lora, ref in zip(parameters.loras, found, strict=True)
            if ref is None
        ]
        if missing:
            raise _missing_error(missing)
        refs = tuple(ref for ref in found if ref is not None)
        for lora, ref in zip(parameters.loras, refs, strict=True):
            assert ref.path is not None
            if lora.hash and not has_hash(ref.path, ref.sha256, lora.hash):
                warn(
                    f"The LoRA {lora.name} has the hash {lora.hash} in the image, which is not a "
                    f"hash of {ref.path}. The file may be a different LoRA."
                )
        return refs

    def _find_hash(self, adapter: AdapterRef) -> Path | None:
        from fidelora.loras.folder import adapter_path, adapter_with_hash

        for ref in self._given:
            if ref.sha256 == adapter.sha256:
                return ref.path
        for folder in self._folders:
            if (
                name := adapter_with_hash(folder, adapter.sha256, adapter.name, self._sha256_of)
            ) is not None:
                return adapter_path(folder, name)
        return None

    def _find_name(self, name: str) -> AdapterRef | None:
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


def _missing_error(missing: Sequence[tuple[str, str]]) -> AdaptersMissingError:
    error = AdaptersMissingError(missing=missing)
    return AdaptersMissingError(f"{error} Set --lora FILE or --lora-dir DIR.", missing=missing)


def _recipe_from_parameters(
    parameters: Parameters, adapters: Sequence[AdapterRef], engine: ImageMaker
) -> Recipe:
    from fidelora.adapters.tensor_names import noise_of_adapter

    warn(
        "The image has no Fidelora recipe. The recipe is read from its generation parameters "
        "as far as they are supported, so the new image will differ."
    )
    for entry in parameters.ignored:
        warn(f"{entry.name} {entry.value!r:.100} is ignored: {entry.reason}")
    dtypes = dict.fromkeys(("dtype", "vae_dtype", "text_encoder_dtype"), engine.auto_dtype)
    noise = noise_of_adapter(adapters[0]) if adapters else "modern"
    return parameters.recipe(adapters, noise=noise, **dtypes)


def _apply_options(
    recipe: Recipe, fidelity: FidelityOption | None, base_model: str | None
) -> tuple[Recipe, dict[str, tuple[Any, Any]]]:
    """Return the recipe with the options applied, and old and new values by changed field.

    If the recipe has the hash of its base model, a new location is not reported as a change.
    `_base_changes` then compares the hashes after the base model was loaded.
    """
    options: dict[str, Any] = {}
    if fidelity is not None:
        options["fidelity"] = fidelity.value
        if fidelity is FidelityOption.FAST:
            options["adapter_mode"] = "merged"  # the only mode that fast supports
    reported = dict(options)
    if base_model is not None:
        options |= {"base_model": base_model, "base_sha256": ""}
        if not recipe.base_sha256:
            reported["base_model"] = base_model
    changes = {name: (getattr(recipe, name), value) for name, value in reported.items()}
    return replace(recipe, **options), {
        name: change for name, change in changes.items() if change[0] != change[1]
    }


def _base_changes(recipe: Recipe | None, made: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the old and new `base_sha256` if the new image has another base model."""
    if recipe is None or recipe.base_sha256 in ("", made.base_sha256):
        return {}
    return {"base_sha256": (recipe.base_sha256, made.base_sha256)}


def _warn_of(changes: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (was, now) in changes.items():
        warn(f"{name} is {now!r} instead of {was!r}.")


def _output_path(image: Path, out: Path | None) -> Path:
    """Return the path of `--out`, or an unused name next to the image."""
    from fidelora.images.formats import format_of

    if out is not None:
        format_of(out)
        make_output_folder(out.expanduser().parent)
        return out.expanduser()
    path, count = image.with_stem(f"{image.stem}_again"), 1
    format_of(path)
    while path.exists():
        count += 1
        path = image.with_stem(f"{image.stem}_again_{count}")
    return path


def _write(made: GeneratedImage, target: Path, origin: Origin) -> None:
    from fidelora.images.formats import format_of

    image_format = format_of(target)
    write_atomically(
        target, made.encode(image_format, origin.quality if image_format == origin.format else None)
    )


def _compare(made: GeneratedImage, content: bytes, origin: Origin) -> Comparison | None:
    """Compare the new image with the file, after the same encoding; None if the sizes differ."""
    import numpy as np
    from PIL import Image

    from fidelora.images.mp4 import decode_mp4
    from fidelora.training.compare import compare, decoded_frames

    def decoded(file: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if origin.format == "mp4":
            return np.stack(decode_mp4(file))
        with Image.open(io.BytesIO(file)) as image:
            return decoded_frames(image)

    replayed = decoded(made.encode(origin.format, origin.quality))  # type: ignore[arg-type]
    original = decoded(content)
    return compare(replayed, original) if replayed.shape == original.shape else None


def _print_comparison(made: GeneratedImage, origin: Origin, comparison: Comparison | None) -> None:
    if comparison is None:
        height, width = made.pixels.shape[:2]
        typer.echo(
            f"DIFFERENT: the file is {origin.width}x{origin.height}, but its recipe gives "
            f"{width}x{height}; the file was resized."
        )
        return
    typer.echo(comparison.summary)
    if not comparison.identical:
        for name, (then, now) in _environment_changes(made, origin).items():
            typer.echo(printable(f"  {name} was {then} and is now {now}"))


def _environment_changes(made: GeneratedImage, origin: Origin) -> dict[str, tuple[str, str]]:
    """Return the old and new value of each entry in which the two environments differ, by name.

    These differences can change pixels.
    """
    names = dict.fromkeys([*origin.environment, *made.environment]) if origin.environment else {}
    unknown = "not recorded"
    both = {
        name: (origin.environment.get(name, unknown), made.environment.get(name, unknown))
        for name in names
    }
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _document(
    image: Path,
    target: Path,
    origin: Origin,
    changes: Mapping[str, tuple[Any, Any]],
    made: GeneratedImage,
    comparison: Comparison | None,
    compared: bool,
) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {
        "image": str(image),
        "out": str(target),
        "source": "a1111" if origin.recipe is None else "fidelora",
        "recipe": made.recipe.to_dict(),
        "changes": {name: {"was": was, "now": now} for name, (was, now) in changes.items()},
        "ignored": [asdict(entry) for entry in origin.parameters.ignored]
        if origin.parameters
        else [],
        "environment": {
            name: {"was": then, "now": now}
            for name, (then, now) in _environment_changes(made, origin).items()
        },
        "identical": comparison.identical if comparison else False if compared else None,
        "comparison": asdict(comparison) if comparison else None,
    }
