"""Read how an image was made from its file, without decoding pixels and without numpy or torch."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from fidelora.errors import ImageRecordError, RecipeError
from fidelora.families import get_family
from fidelora.images.parameters import Parameters, read_parameters
from fidelora.recipe import Recipe

RECORD_KEY = "fidelora"
"""The PNG text field with our JSON; in JPEG and WebP it is the EXIF field ImageDescription."""
PARAMETERS_KEY = "parameters"
"""The PNG text field that AUTOMATIC1111 and everything after it reads; in JPEG and WebP it is the EXIF field UserComment."""

MAX_DECODED_PIXELS = 2**25
"""A PNG whose texts stand behind its pixels is decoded to be read, but none that is larger than any image made here."""
MAX_PARAMETERS_CHARACTERS = 50_000
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Origin:
    """How an image was made: its recipe, or what another program wrote.

    Attributes:
        format: png, jpeg or webp.
        width, height: of the image, in pixels.
        recipe: complete, if the image was made here; its adapters are known by their sha256, and have no paths.
        environment: what else could have had a part in its last bits; empty if the recipe is None.
        quality: 0..100, that the image was written in, if it was not the usual one.
        parameters: what was understood of AUTOMATIC1111's text, and what was not; None if there is a recipe.
    """

    format: str
    width: int
    height: int
    recipe: Recipe | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    quality: int | None = None
    parameters: Parameters | None = None


def read_origin(content: bytes, name: str = "The image", *, model: str = "sd15") -> Origin:
    """Read the origin of a PNG, JPEG or WebP file: our recipe, else another program's parameters.

    Args:
        name: what messages call the image.
        model: id of the model family that another program's parameters are read for.

    Raises:
        ImageRecordError: not an image, or it says nothing that is understood, or what it says is contradictory.
        UnknownModelError: there is no such model.
    """
    spec = get_family(model)
    with _opened(content, name) as image:
        record, parameters = _texts(image)
        about: dict[str, Any] = {
            "format": str(image.format).lower(),
            "width": image.width,
            "height": image.height,
        }
    plain = _record(record)
    if plain is not None:
        recipe, environment = recipe_of(plain, name)
        quality = plain.get("quality")
        if quality is not None and (
            type(quality) is not int or not 0 <= quality <= 100 or about["format"] == "png"
        ):
            raise ImageRecordError(
                f"{name} says that it was written in quality {quality!r}, which no such file can have."
            )
        return Origin(**about, recipe=recipe, environment=environment, quality=quality)
    if len(parameters) > MAX_PARAMETERS_CHARACTERS:
        raise ImageRecordError(
            f"{name} has parameters of {len(parameters):,} characters; {MAX_PARAMETERS_CHARACTERS:,} are read."
        )
    if parameters.strip():
        read = read_parameters(parameters, spec)
        size = {"width": about["width"], "height": about["height"]}  # where the text has none
        return Origin(**about, parameters=replace(read, fields={**size, **read.fields}))
    raise ImageRecordError(
        f"{name} carries neither a recipe of Fidelora's nor parameters in AUTOMATIC1111's form: another program made it, or they "
        "were stripped."
    )


def read_parameters_text(content: bytes) -> str:
    """Return AUTOMATIC1111's text in an image; empty if there is none.

    Raises:
        ImageRecordError: not an image.
    """
    with _opened(content, "The image") as image:
        return _texts(image)[1]


def recipe_of(record: Mapping[str, Any], name: str = "The image") -> tuple[Recipe, dict[str, str]]:
    """Return recipe and environment of an image's record.

    Raises:
        ImageRecordError: the recipe is of no format that is read here, or not the one that the digest belongs to.
    """
    try:
        recipe = Recipe.from_dict(record["recipe"])
    except RecipeError as error:
        raise ImageRecordError(f"{name} has a recipe that cannot be used. {error}") from error
    if record.get("digest") not in (None, recipe.digest):
        raise ImageRecordError(
            f"{name} has a recipe that was changed after the image was made: its digest is another one."
        )
    environment = record.get("environment")
    shown = environment.items() if isinstance(environment, Mapping) else ()
    return recipe, {str(key): str(value) for key, value in shown}


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record in an image of Fidelora's: `{"recipe": ..., "digest": ..., "environment":
    ...}`.

    Raises:
        ImageRecordError: not an image, or it says nothing.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            record = _record(_texts(image)[0])
    except FileNotFoundError:
        raise ImageRecordError(f"There is no image {path}; check the path.") from None
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ImageRecordError(f"{path.name} is not an image that can be read.") from error
    if record is None:
        raise ImageRecordError(
            f"{path.name} carries no recipe of Fidelora's: it comes from another program, or was stripped."
        )
    return record


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """Yield the image; errors of Pillow in the block become one error."""
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            yield image
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ImageRecordError(
            f"{name} is not a PNG, JPEG or WebP image that can be read."
        ) from error


def _texts(image: Image.Image) -> tuple[str | bytes, str]:
    """Our record and AUTOMATIC1111's text as they stand in the file; empty where there is none."""
    if image.format == "PNG":
        texts = image.info
        if (
            not {RECORD_KEY, PARAMETERS_KEY} & texts.keys()
            and image.width * image.height <= MAX_DECODED_PIXELS
        ):
            texts = getattr(image, "text", {})
        found = (texts.get(RECORD_KEY, ""), texts.get(PARAMETERS_KEY, ""))
        return str(found[0]), str(found[1])
    exif = image.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    return exif.get(ExifTags.Base.ImageDescription, ""), _comment(comment)


def _comment(comment: object) -> str:
    """Decode an EXIF UserComment.

    Eight bytes name its encoding, but not the byte order, on which programs disagree.
    """
    if not isinstance(comment, bytes):
        return str(comment)
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # Every text of parameters is mostly of ASCII letters, whose upper byte is zero.
        big = body[0::2].count(0) >= body[1::2].count(0)
        return body.decode("utf-16-be" if big else "utf-16-le", "replace")
    return (body if code == b"ASCII\0\0\0" else comment).decode("utf-8", "replace").strip("\0")


def _record(text: object) -> dict[str, Any] | None:
    try:
        record = json.loads(text) if isinstance(text, str | bytes) and text else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "recipe" in record else None
