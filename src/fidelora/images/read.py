"""Read the recipe or the parameters that an image file contains. Does not import numpy or torch."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from fidelora.checks import shown
from fidelora.errors import FideloraError, ImageRecordError, RecipeError
from fidelora.families import get_family
from fidelora.images.mp4 import is_mp4, read_mp4
from fidelora.images.other_programs import (
    PARAMETERS_KEY,
    name_of_program,
    read_other_program,
)
from fidelora.images.parameter_pairs import Ignored
from fidelora.images.parameters import Parameters, read_parameters
from fidelora.recipe import Recipe
from fidelora.texts import cleaned

RECORD_KEY = "fidelora"
"""PNG text field with Fidelora's JSON; in JPEG and WebP it is the EXIF field ImageDescription."""

COMMENT_KEY = "comment"
"""Text field of MP4 files with the parameters text."""
MAX_DECODED_PIXELS = 2**25
"""Maximum size of a PNG that is decoded to read text fields stored after the pixels; images made by
Fidelora are never larger."""
MAX_PARAMETERS_CHARACTERS = 50_000  # longest parameters text that is read
_MAX_RECORD_CHARACTERS = 2**20
"""Longest record that is read; those of Fidelora have a few thousand characters."""
_MAX_PARTS = 100_000
"""Largest number of chunks of a PNG, and of segments of a JPEG before its pixels. Pillow needs
about a second for that many. An image of 64 MiB with chunks of 8 KiB has 8,000."""
_PNG_START, _JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PIXELS = 0xDA
"""Marker of the segment of a JPEG that contains pixels."""
_BARE_MARKERS = frozenset({0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
"""Markers of a JPEG that Pillow reads without a length after them."""
_PAIRS = re.compile(r"^Steps: ", re.MULTILINE)
"""A line of AUTOMATIC1111's text, which other programs may add to their own metadata."""
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Origin:
    """Origin of an image: Fidelora's recipe or the parameters of another program.

    Attributes:
        format: png, jpeg, webp or mp4; empty without a file.
        width, height: size of the image in pixels.
        recipe: complete recipe if Fidelora made the image; its adapters have a sha256 but no path.
        environment: versions and device, which can affect the last bits; empty without a recipe.
        quality: quality of the file, 0..100; None for the default.
        parameters: parsed parameters of another program; None if there is a recipe.
    """

    format: str
    width: int
    height: int
    recipe: Recipe | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    quality: int | None = None
    parameters: Parameters | None = None


def read_origin(
    content: bytes,
    name: str = "The image",
    *,
    model: str = "sd15",
    with_emphasis: bool = False,
) -> Origin:
    """Read Fidelora's recipe from an image; if it has none, the parameters of another program.

    Args:
        content: contents of a PNG, JPEG, WebP or MP4 file.
        name: name of the image for messages.
        model: id of the model family that another program's parameters are parsed for.
        with_emphasis: True to weight words in brackets as AUTOMATIC1111's web UI does, in images of
            other programs.

    Raises:
        ImageRecordError: not an image, or its metadata are missing, not supported or inconsistent.
        UnknownModelError: the model family `model` does not exist.
    """
    spec = get_family(model)
    record, texts, about = _read(content, name)
    plain = _record(record, name)
    if plain is not None:
        recipe, environment = recipe_of(plain, name)
        quality = plain.get("quality")
        if quality is not None and (
            type(quality) is not int or not 0 <= quality <= 100 or about["format"] in ("png", "mp4")
        ):
            raise ImageRecordError(
                f"{name} has a record with the quality {shown(quality)}, "
                "which is not valid for its format."
            )
        return Origin(**about, recipe=recipe, environment=environment, quality=quality)
    size = {"width": about["width"], "height": about["height"]}  # if the text has none
    parameters = texts.get(PARAMETERS_KEY, "")
    if len(parameters) > MAX_PARAMETERS_CHARACTERS:
        raise ImageRecordError(
            f"{name} has parameters of {len(parameters):,} characters; "
            f"the limit is {MAX_PARAMETERS_CHARACTERS:,}."
        )
    read = read_other_program(texts, spec)
    program = "" if read else name_of_program(texts)
    if program and not _PAIRS.search(parameters):
        raise ImageRecordError(
            f"{name} was made with {program}, so its settings cannot be read. Copy the prompt and "
            "the settings from there."
        )
    if read or parameters.strip():
        read = read or read_parameters(parameters, spec, with_emphasis=with_emphasis)
        if changed := texts.get("postprocessing"):  # the tab Extras of A1111
            reason = "The image was changed after it was made, which is not supported."
            note = Ignored("postprocessing", changed[:200], reason)
            read = replace(read, ignored=(*read.ignored, note))
        return Origin(**about, parameters=replace(read, fields={**size, **read.fields}))
    raise ImageRecordError(
        f"{name} has neither a Fidelora recipe nor parameters in AUTOMATIC1111's form: "
        "another program made it, or its metadata were removed."
    )


def _read(content: bytes, name: str) -> tuple[str | bytes, Mapping[str, str], dict[str, Any]]:
    """Return Fidelora's record, all text fields, and format, width and height of an image."""
    if is_mp4(content):
        width, height, texts = read_mp4(content, name)
        if COMMENT_KEY in texts:
            texts[PARAMETERS_KEY] = texts[COMMENT_KEY]
        about: dict[str, Any] = {"format": "mp4", "width": width, "height": height}
        return texts.get(RECORD_KEY, ""), texts, about
    with _opened(content, name) as image:
        record, found = _texts(image)
        kind = str(image.format).lower()
        return record, found, {"format": kind, "width": image.width, "height": image.height}


@dataclass(frozen=True)
class ImageTexts:
    """Size of an image, and the text fields that programs stored in it.

    Attributes:
        format: png, jpeg or webp.
        texts: texts by name; the EXIF comment of JPEG and WebP files has the name `parameters`.
    """

    format: str
    width: int
    height: int
    texts: Mapping[str, str]


def read_texts(content: bytes, name: str = "The image") -> ImageTexts:
    """Return the text fields of an image.

    Args:
        content: contents of a PNG, JPEG or WebP file.
        name: name of the image for messages.

    Raises:
        ImageRecordError: not an image.
    """
    with _opened(content, name) as image:
        record, texts = _texts(image)
        if isinstance(record, str) and record:
            texts = {**texts, RECORD_KEY: record}
        return ImageTexts(str(image.format).lower(), image.width, image.height, texts)


def read_parameters_text(content: bytes) -> str:
    """Return the parameters text in AUTOMATIC1111's form from an image; empty if there is none.

    Raises:
        ImageRecordError: not an image.
    """
    with _opened(content, "The image") as image:
        return _texts(image)[1].get(PARAMETERS_KEY, "")


def recipe_of(record: Mapping[str, Any], name: str = "The image") -> tuple[Recipe, dict[str, str]]:
    """Return recipe and environment of an image's record.

    Args:
        record: `{"recipe": ..., "digest": ..., "environment": ...}`.
        name: name of the image for messages.

    Raises:
        ImageRecordError: the recipe's format is not supported, or its digest does not match.
    """
    try:
        recipe = Recipe.from_dict(record["recipe"])
    except RecipeError as error:
        raise ImageRecordError(f"{name} has a recipe that cannot be used. {error}") from error
    if record.get("digest") not in (None, recipe.digest):
        raise ImageRecordError(
            f"{name} has a recipe that was changed after the image was made: "
            "its digest does not match."
        )
    try:
        environment = cleaned(record.get("environment"))
    except ValueError as error:
        raise ImageRecordError(f"{name} has an environment that cannot be used: {error}.") from None
    values = environment.items() if isinstance(environment, Mapping) else ()
    return recipe, {str(key): str(value) for key, value in values}


def read_record(path: str | Path) -> dict[str, Any]:
    """Return Fidelora's record in an image: `{"recipe": ..., "digest": ..., "environment": ...}`.

    Raises:
        ImageRecordError: not an image, or it has no record.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ImageRecordError(f"The image {path} does not exist; check the path.") from None
    except OSError as error:
        raise ImageRecordError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    record = _record(_read(content, path.name)[0], path.name)
    if record is None:
        raise ImageRecordError(
            f"{path.name} has no Fidelora recipe: "
            "another program made it, or its metadata were removed."
        )
    return record


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """Open the image; convert all errors that Pillow raises in the block to ImageRecordError."""
    try:
        _check_parts(content)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            yield image
    except FideloraError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise ImageRecordError(
            f"{name} is not a PNG, JPEG or WebP image that can be read."
        ) from error


def _check_parts(content: bytes) -> None:
    """Raise if a PNG or JPEG has too many parts, which Pillow reads one by one."""
    positions: Iterable[int] = ()
    if content.startswith(_PNG_START):
        positions = _png_chunks(content)
    elif content.startswith(_JPEG_START):
        positions = _jpeg_segments(content)
    parts = sum(1 for _ in islice(positions, _MAX_PARTS + 1))
    if parts > _MAX_PARTS:
        raise ValueError(f"more than {_MAX_PARTS:,} parts")


def _png_chunks(content: bytes) -> Iterator[int]:
    """Yield the position of each chunk."""
    position = len(_PNG_START)
    while position < len(content):
        yield position
        position += 12 + int.from_bytes(content[position : position + 4], "big")


def _jpeg_segments(content: bytes) -> Iterator[int]:
    """Yield the position of each segment before the pixels, and of bytes that are skipped."""
    position, end = len(_JPEG_START), len(content) - 1
    while position < end and content[position : position + 2] != bytes((0xFF, _PIXELS)):
        yield position
        marker = content[position + 1]
        if content[position] != 0xFF or marker in (0x00, 0xFF):
            position += 1
        elif marker in _BARE_MARKERS:
            position += 2
        else:
            position += 2 + max(2, int.from_bytes(content[position + 2 : position + 4], "big"))


def _texts(image: Image.Image) -> tuple[str | bytes, dict[str, str]]:
    """Return Fidelora's record, empty if missing, and all text fields of the file by name."""
    if image.format == "PNG":
        texts = image.info
        if (
            not {RECORD_KEY, PARAMETERS_KEY} & texts.keys()
            and image.width * image.height <= MAX_DECODED_PIXELS
        ):
            texts = {**image.info, **getattr(image, "text", {})}
        found = {str(key): str(text) for key, text in texts.items() if isinstance(text, str)}
        if "exif" in image.info and PARAMETERS_KEY not in found:
            found[PARAMETERS_KEY] = _exif_parameters(image.getexif())
        return found.get(RECORD_KEY, ""), found
    exif = image.getexif()
    found = {PARAMETERS_KEY: _exif_parameters(exif)}
    comment = image.info.get("comment")  # of a JPEG; converters write the text of a PNG there
    if not found[PARAMETERS_KEY] and isinstance(comment, bytes):
        text = comment.decode("utf-8", "replace")
        found[PARAMETERS_KEY] = text if _PAIRS.search(text) else ""
    for tag in (ExifTags.Base.Make, ExifTags.Base.Model):  # ComfyUI: `workflow:{...}`
        key, _, text = str(exif.get(tag, "")).partition(":")
        found.setdefault(key, text)
    return exif.get(ExifTags.Base.ImageDescription, ""), found


def _exif_parameters(exif: Image.Exif) -> str:
    """Return the parameters text in EXIF: the UserComment, or else the ImageDescription.

    Some programs, such as Fooocus, write the UserComment to the first directory instead of the one
    that the standard requires. An ImageDescription counts only if it has a line of pairs.
    """
    key = ExifTags.Base.UserComment
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(key) or exif.get(key, b"")
    about = exif.get(ExifTags.Base.ImageDescription)
    if not comment and isinstance(about, str) and _PAIRS.search(about):
        return about
    return _comment(comment)


def _comment(comment: object) -> str:
    """Decode an EXIF UserComment.

    Its first eight bytes name the encoding but not the byte order, which differs between programs.
    """
    if not isinstance(comment, bytes):
        return str(comment)
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0" and body and 0 not in body:
        # UTF-16 has zero bytes wherever the text has ASCII characters, as parameters have.
        try:
            return body.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            pass
    if code == b"UNICODE\0":
        # Parameters are mostly ASCII characters, whose upper byte is zero.
        big = body[0::2].count(0) >= body[1::2].count(0)
        return body.decode("utf-16-be" if big else "utf-16-le", "replace").removeprefix("\ufeff")
    if code == b"JIS\0\0\0\0\0":
        return body.decode("iso2022_jp", "replace")
    text = (body if code == b"ASCII\0\0\0" else comment).decode("utf-8", "replace")
    return text.strip("\0").removeprefix("\ufeff")


def _record(text: object, name: str) -> dict[str, Any] | None:
    """Return the record in a text; None if the text is not a record.

    Raises:
        ImageRecordError: the text is too long.
    """
    if isinstance(text, str | bytes) and len(text) > _MAX_RECORD_CHARACTERS:
        raise ImageRecordError(
            f"{name} has a record of {len(text):,} characters; the limit is "
            f"{_MAX_RECORD_CHARACTERS:,}."
        )
    try:
        record = json.loads(text) if isinstance(text, str | bytes) and text else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "recipe" in record else None
