"""Hostile PNG, JPEG and WebP files, made from small good ones."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from fidelora import Recipe
from fidelora.images.write import GeneratedImage

RECIPE = Recipe(prompt="a ball", width=64, height=64, steps=2, seed=7)
PARAMETERS = (
    "a ball\nNegative prompt: b\nSteps: 2, Sampler: ddpm, Seed: 1, CFG scale: 7, Size: 64x64"
)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def good_images() -> dict[str, bytes]:
    """Return small images with a recipe or with parameters, in all formats."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    image = GeneratedImage(pixels, RECIPE, {"fidelora": "1"})
    found = {
        "own.png": image.encode("png"),
        "own.jpg": image.encode("jpeg", 80),
        "own.webp": image.encode("webp", 80),
        "lossless.webp": image.encode("webp"),
    }
    plain = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "workflow:{}"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = (
        b"ASCII\0\0\0" + PARAMETERS.encode()
    )
    for name, image_format in {"a1111.jpg": "JPEG", "a1111.webp": "WEBP"}.items():
        found[name] = _saved(plain, image_format, exif=exif.tobytes())
    texts = PngInfo()
    texts.add_text("parameters", PARAMETERS)
    texts.add_text("Title", "x" * 100, zip=True)
    texts.add_itxt("Comment", "ü", "en", "Kommentar", zip=True)
    found["a1111.png"] = _saved(plain, "PNG", pnginfo=texts, exif=exif.tobytes())
    found["palette.png"] = _saved(plain.convert("P"), "PNG", pnginfo=texts, transparency=0)
    found["animated.png"] = _saved(plain, "PNG", save_all=True, append_images=[plain] * 2)
    swarm = {"sui_image_params": {"prompt": "a", "seed": 1, "steps": 2, "width": 64, "height": 64}}
    found["swarm.png"] = png_with_text(json.dumps(swarm))
    return found


def png_with_text(text: str, key: str = "parameters") -> bytes:
    """Return a PNG with one text, as it is; lone surrogates are not supported."""
    texts = PngInfo()
    texts.add_itxt(key, text)
    return _saved(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts)


def hostile_images() -> dict[str, bytes]:
    """Return hostile images by name, without those of `mutated_images`."""
    return {**_png_bombs(), **_png_chunks(), **_jpegs(), **_webps(), **_texts()}


def mutated_images(rounds: int) -> Iterator[tuple[str, bytes]]:
    """Yield the good images with random changes: `rounds` of each kind and image."""
    for name, content in good_images().items():
        rng = random.Random(name)
        for number in range(rounds):
            for change in (_cut, _flipped, _spliced, _filled, _changed_numbers):
                yield f"{name} {change.__name__} {number}", change(content, rng)
            if name.endswith(".png"):
                for edit in (_shuffled, _resized_chunk, _changed_chunk):
                    yield f"{name} {edit.__name__} {number}", edit(content, rng)


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file with these chunks, whose checksums are right."""
    return _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content) if size is None else size) + kind + content + checksum


def _chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], len(_SIGNATURE)
    while position < len(png):
        (size,) = struct.unpack(">I", png[position : position + 4])
        kind = png[position + 4 : position + 8]
        found.append((kind, png[position + 8 : position + 8 + size]))
        position += 12 + size
    return found


def _ihdr(width: int, height: int, depth: int = 8, color: int = 2, rest: bytes = bytes(3)) -> bytes:
    return struct.pack(">IIBB", width, height, depth, color) + rest


_ROW = zlib.compress(bytes(25 * 8))
_END = (b"IEND", b"")


def _png_bombs() -> dict[str, bytes]:
    sizes = {
        "0x0": (0, 0), "0x8": (0, 8), "largest": (2**31 - 1, 2**31 - 1), "2**31": (2**31, 1),
        "2**32": (2**32 - 1, 2**32 - 1), "wide": (2**31 - 1, 1), "high": (1, 2**31 - 1),
        "13000x13000": (13_000, 13_000), "20000x20000": (20_000, 20_000), "5792": (5792, 5792),
        "5793": (5793, 5793),
    }  # fmt: skip
    found = {
        f"PNG size {name}.png": png_of((b"IHDR", _ihdr(*size)), (b"IDAT", _ROW), _END)
        for name, size in sizes.items()
    }
    pixels = zlib.compress(bytes((1 + 5792 * 3) * 5792), 1)
    found["PNG of 5792x5792 zeros.png"] = png_of(
        (b"IHDR", _ihdr(5792, 5792)), (b"IDAT", pixels), _END
    )
    found["PNG with 100 MB behind 8x8.png"] = png_of(
        (b"IHDR", _ihdr(8, 8)), (b"IDAT", zlib.compress(bytes(10**8), 1)), _END
    )
    bomb, start = zlib.compress(b"a" * (60 * 2**20), 1), (b"IHDR", _ihdr(8, 8))
    mega = zlib.compress(b"a" * (2**20 - 100), 1)
    found |= {
        "zTXt bomb.png": png_of(start, (b"zTXt", b"parameters\0\0" + bomb), _END),
        "iTXt bomb.png": png_of(start, (b"iTXt", b"fidelora\0\1\0\0\0" + bomb), _END),
        "zTXt bomb after the pixels.png": png_of(
            start, (b"IDAT", _ROW), (b"zTXt", b"parameters\0\0" + bomb), _END
        ),
        "iCCP bomb.png": png_of(start, (b"iCCP", b"x\0\0" + bomb), (b"IDAT", _ROW), _END),
        "100 zTXt of 1 MiB.png": png_of(
            start, *((b"zTXt", b"k%d\0\0" % number + mega) for number in range(100)), _END
        ),
        "100 iTXt of 1 MiB.png": png_of(
            start, *((b"iTXt", b"k%d\0\1\0\0\0" % n + mega) for n in range(100)), _END
        ),
        "100000 texts.png": png_of(
            start, *((b"tEXt", b"%d\0a" % number) for number in range(100_000)), _END
        ),
        "100000 empty chunks.png": png_of(start, *[(b"IDAT", b"")] * 100_000, _END),
        "1000000 unknown chunks.png": png_of(start, *[(b"abCd", b"")] * 1_000_000, _END),
        "parameters of 20 MB.png": png_of(
            start, (b"tEXt", b"parameters\0" + b"a" * 20_000_000), _END
        ),
        "record of 20 MB.png": png_of(
            start, (b"tEXt", b'fidelora\0{"recipe":{"a":"' + b"a" * 20_000_000 + b'"}}'), _END
        ),
        "record of a million lists.png": png_of(
            start, (b"tEXt", b'fidelora\0{"recipe":[' + b"[]," * 10**6 + b"[]]}"), _END
        ),
    }  # fmt: skip
    return found


def _png_chunks() -> dict[str, bytes]:
    start, pixels = (b"IHDR", _ihdr(8, 8)), (b"IDAT", _ROW)
    tiff = b"MM\x00\x2a"
    bodies = {
        b"tEXt": [b"", b"\0", b"parameters", b"parameters\0", b"\0\0\0", b"\xff\xfe\0\xff"],
        b"zTXt": [b"", b"k", b"k\0", b"k\0\1", b"k\0\0", b"k\0\0x", b"k\0\xff" + _ROW],
        b"iTXt": [b"", b"k", b"k\0", b"k\0\0", b"k\0\0\0", b"k\0\0\0\0", b"k\0\1\0\0\0x",
                  b"k\0\0\0\0\0\xff", b"k\0\1\1\0\0x", b"k\0\0\0\xff\0\xff\0\xff", b"k\0\2\0\0\0"],
        b"eXIf": [b"", b"II", tiff, tiff + b"\0\0\0\x08", tiff + b"\xff" * 4, b"Exif\0\0" + tiff],
        b"iCCP": [b"", b"x", b"x\0", b"x\0\0", b"x\0\1x", b"x\0\0x"],
        b"pHYs": [b"", b"\0", bytes(9), b"\xff" * 9],
        b"gAMA": [b"", b"\0", bytes(4), b"\xff" * 4],
        b"cHRM": [b"", b"\0", bytes(32), b"\xff" * 33],
        b"sRGB": [b"", b"\xff"],
        b"tRNS": [b"", b"\0", b"\xff" * 300],
        b"PLTE": [b"", b"\0", bytes(800)],
        b"acTL": [b"", b"\0", bytes(8), b"\xff" * 8, struct.pack(">II", 2**31 - 1, 0)],
        b"fcTL": [b"", b"\0", bytes(26), b"\xff" * 26],
        b"fdAT": [b"", b"\0", bytes(4), b"\xff" * 8],
        b"IHDR": [b"", b"\0", _ihdr(8, 8), _ihdr(0, 0), b"\xff" * 13],
        b"IDAT": [b"", b"\0", b"\xff" * 100],
        b"\0\0\0\0": [b""],
        b"\xff\xff\xff\xff": [b"x"],
    }  # fmt: skip
    found = {}
    for kind, contents in bodies.items():
        for number, content in enumerate(contents):
            name = f"{kind.decode('latin-1')!r} {number}.png"
            found[f"before {name}"] = png_of(start, (kind, content), pixels, _END)
            found[f"after {name}"] = png_of(start, pixels, (kind, content), _END)
    for depth, color in ((0, 0), (3, 2), (8, 1), (16, 3), (255, 255), (1, 0), (16, 6)):
        header = _ihdr(8, 8, depth, color)
        found[f"depth {depth} color {color}.png"] = png_of((b"IHDR", header), pixels, _END)
    for number, rest in enumerate((b"\1\0\0", b"\0\1\0", b"\0\0\1", b"\xff\xff\xff", b"")):
        header = _ihdr(8, 8, rest=rest)
        found[f"interlace {number}.png"] = png_of((b"IHDR", header), pixels, _END)
    for size in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        lying = _chunk(b"tEXt", b"parameters\0Steps: 1", size)
        found[f"lying chunk {size}.png"] = png_of(start) + lying + png_of(pixels, _END)[8:]
    found["only the signature.png"] = _SIGNATURE
    found["no IHDR.png"] = png_of(pixels, _END)
    found["no IDAT.png"] = png_of(start, _END)
    found["wrong checksum.png"] = png_of(start, pixels, _END).replace(b"IDAT", b"IDAU")
    return found


def _tiff(*entries: tuple[int, int, int, bytes], order: str = ">", after: bytes = b"") -> bytes:
    """Return EXIF data with one directory of (tag, type, count, value or offset)."""
    mark = b"MM\0\x2a" if order == ">" else b"II\x2a\0"
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, count) + value
    return b"Exif\0\0" + mark + struct.pack(f"{order}I", 8) + body + bytes(4) + after


def _exifs() -> dict[str, bytes]:
    offset = struct.Struct(">I").pack
    comment, exif_ifd, description = 0x9286, 0x8769, 0x010E
    deep = b"[" * 20_000
    return {
        "nothing": b"",
        "only the mark": b"Exif\0\0",
        "no directory": b"Exif\0\0MM\0\x2a" + offset(8),
        "directory beyond the end": b"Exif\0\0MM\0\x2a" + offset(2**32 - 1),
        "directory at itself": b"Exif\0\0MM\0\x2a" + offset(0),
        "65535 entries": b"Exif\0\0MM\0\x2a" + offset(8) + b"\xff\xff",
        "Exif directory at the first": _tiff((exif_ifd, 4, 1, offset(8))),
        "Exif directory beyond the end": _tiff((exif_ifd, 4, 1, offset(2**32 - 1))),
        "Exif directory of type text": _tiff((exif_ifd, 2, 4, b"abc\0")),
        "Exif directory of many": _tiff((exif_ifd, 4, 2**32 - 1, offset(8))),
        "Exif directory of a fraction": _tiff((exif_ifd, 5, 1, offset(8))),
        "Exif directory negative": _tiff((exif_ifd, 9, 1, offset(2**32 - 8))),
        "description of 4 GB": _tiff((description, 2, 2**32 - 1, offset(26))),
        "description beyond the end": _tiff((description, 2, 100, offset(2**31))),
        "description of numbers": _tiff((description, 3, 2, offset(7))),
        "description of fractions": _tiff((description, 5, 1, offset(26)), after=bytes(8)),
        "description of type 255": _tiff((description, 255, 1, offset(7))),
        "description of type 0": _tiff((description, 0, 1, offset(7))),
        "deep record": _tiff((description, 2, 20_000, offset(26)), after=deep),
        "comment of numbers": _tiff((comment, 3, 2, offset(7))),
        "comment of floats": _tiff((comment, 12, 1, offset(26)), after=b"\x7f\xf0" + bytes(6)),
        "camera": _tiff((271, 2, 4, b"a:{\0"), (272, 3, 1, offset(7))),
        "little endian": _tiff((description, 2, 2**31, struct.pack("<I", 26)), order="<"),
        "repeated": _tiff(*[(description, 2, 4, b"abc\0")] * 2000),
    }


def _jpegs() -> dict[str, bytes]:
    good = good_images()["a1111.jpg"]
    start = good.index(b"\xff\xe1")
    (size,) = struct.unpack(">H", good[start + 2 : start + 4])
    before, after = good[:start], good[start + 2 + size :]

    def with_segment(marker: int, content: bytes, length: int | None = None) -> bytes:
        length = len(content) + 2 if length is None else length
        return before + struct.pack(">BBH", 0xFF, marker, length) + content + after

    found = {f"JPEG EXIF {name}.jpg": with_segment(0xE1, exif) for name, exif in _exifs().items()}
    for marker in (0xC0, 0xC4, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDA, 0x01, 0xFF):
        for length in (None, 0, 1, 2, 0xFFFF):
            content = b"\x08\xff\xff\xff\xff\x03" * 3
            found[f"JPEG segment {marker:02x} {length}.jpg"] = with_segment(marker, content, length)
    for name, content in {
        "Photoshop": b"Photoshop 3.0\x00" + b"8BIM\x03\xed\x00\x00\xff\xff\xff\xff",
        "MPF": b"MPF\0" + b"MM\0\x2a\xff\xff\xff\xff",
        "ICC": b"ICC_PROFILE\0\x01\xff" + bytes(10),
        "XMP": b"http://ns.adobe.com/xap/1.0/\0<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
    }.items():  # fmt: skip
        for marker in (0xE1, 0xE2, 0xED):
            found[f"JPEG {name} {marker:02x}.jpg"] = with_segment(marker, content)
    frame = good.index(b"\xff\xc0")
    for name, side in {"65535": 65_535, "0": 0, "20000": 20_000}.items():
        sides = struct.pack(">HH", side, side)
        found[f"JPEG size {name}.jpg"] = good[: frame + 5] + sides + good[frame + 9 :]
    found["JPEG of segments.jpg"] = good[:2] + b"\xff\xe1\x00\x02" * 200_000 + good[2:]
    found["JPEG of bare markers.jpg"] = good[:2] + b"\xff\xd0" * 1_000_000 + good[2:]
    found["JPEG of other bytes.jpg"] = good[:2] + b"\x00" * 1_000_000 + good[2:]
    found["JPEG of markers.jpg"] = good[:2] + b"\xff" * 1_000_000 + good[2:]
    found["JPEG without pixels.jpg"] = b"\xff\xd8\xff\xd9"
    return found


def _webps() -> dict[str, bytes]:
    good = good_images()["own.webp"]

    def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
        body = b"WEBP" + b"".join(
            kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
            for kind, content in chunks
        )
        return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body

    picture = good[good.index(b"VP8 ") + 8 :]
    picture = picture[: struct.unpack("<I", good[good.index(b"VP8 ") + 4 :][:4])[0]]
    extended = b"\x08\0\0\0" + b"\x07\0\0" * 2
    found = {
        f"WebP EXIF {name}.webp": riff((b"VP8X", extended), (b"VP8 ", picture), (b"EXIF", exif))
        for name, exif in _exifs().items()
    }
    for size in (0, 4, 2**31, 2**32 - 1):
        found[f"WebP RIFF {size}.webp"] = riff((b"VP8 ", picture), size=size)
    for name, side in {"16384": b"\xff\x3f\0", "2**24": b"\xff\xff\xff"}.items():
        canvas = b"\x0a\0\0\0" + side * 2
        frame = b"\0" * 6 + b"\x07\0\0" * 2 + b"\0" * 4 + b"VP8 "
        frame += struct.pack("<I", len(picture)) + picture
        found[f"WebP canvas {name}.webp"] = riff(
            (b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)
        )
    found["WebP of chunks.webp"] = riff((b"VP8X", extended), *[(b"abcd", b"")] * 100_000)
    found["WebP without picture.webp"] = riff((b"VP8X", extended))
    found["WebP nothing.webp"] = riff()
    return found


def _texts() -> dict[str, bytes]:
    """Images whose parameters, records or settings of other programs are hostile."""
    recipe = RECIPE.to_dict()
    deep = {depth: "[" * depth + "]" * depth for depth in (99, 101, 300, 450, 600, 900, 100_000)}
    others: tuple[Any, ...] = (None, [], {}, 1, "x", -(10**30), 1e308, True)
    records: dict[str, str] = {
        f"recipe {name} {number}": json.dumps({"recipe": recipe | {name: value}})
        for name in recipe
        for number, value in enumerate(others)
    }
    records |= {f"deep {depth}": f'{{"recipe": {text}}}' for depth, text in deep.items()}
    for depth, text in deep.items():
        written = json.dumps({"recipe": recipe, "quality": 0})
        records[f"deep quality {depth}"] = written.replace("0}", text + "}")
        records[f"deep environment {depth}"] = written.replace(
            '"quality": 0', f'"environment": {{"a": {text}}}'
        )
        records[f"deep adapters {depth}"] = written.replace('"adapters": []', f'"adapters": {text}')
    records |= {
        "list": "[]", "null": "null", "recipe list": '{"recipe": []}',
        "recipe text": '{"recipe": "a"}',
        "4400 digits": '{"recipe": ' + "9" * 4400 + "}", "NaN": '{"recipe": NaN}',
        "surrogate": '{"recipe": {"prompt": "\\ud800"}}', "not closed": '{"recipe": {',
        "environment": json.dumps({"recipe": recipe, "environment": {"\ud800": "\ud800"}}),
        "unknown fields": json.dumps(
            {"recipe": recipe | {"x" * 100 + str(number): 1 for number in range(999)}}
        ),
        "long adapters": json.dumps({"recipe": recipe | {"adapters": [
            {"sha256": f"{n:064x}", "multiplier": 1, "name": "n" * 9999} for n in range(100)]}}),
    }  # fmt: skip
    parameters: dict[str, str] = {
        "Hashes " + str(depth): f"a\nSteps: 1, Seed: 1, Size: 64x64, Hashes: {text}"
        for depth, text in deep.items()
    }
    parameters |= {
        "many Hashes": "a\nSteps: 1, Seed: 1, Size: 8x8" + ", Hashes: {}" * 4000,
        "steps": "a\nSteps: " + "9" * 5000 + ", Sampler: ddpm, Seed: 1",
        "cfg": "a\nSteps: 1, CFG scale: 1e999, Seed: 1",
        "nan": "a\nSteps: 1, CFG scale: nan, Seed: 1",
        "size": "a\nSteps: 1, Size: 999999999999999999x1, Seed: 1",
        "tags": "<lora:a:1>" * 4000 + "\nSteps: 1, Seed: 1, Size: 64x64",
        "path in a tag": "<lora:../../../etc/passwd:1>\nSteps: 1, Seed: 1, Size: 64x64",
        "brackets": "(" * 40_000 + "\nSteps: 1, Seed: 1, Size: 64x64",
        "quotes": "a\nSteps: 1, " + 'a:"' * 15_000,
        "colons": "a\nSteps: 1, " + "a:" * 20_000,
        "escaped quotes": 'a\nSteps: 1, a: "' + '\\"' * 20_000,
        "lines": "Steps: 1, a: b, c: d\n" * 2300,
        "spaces": "a:" + " " * 49_000,
        "NUL": "a\x00b\nSteps: 1, Seed: 1, Size: 64x64",
        "escape": "\x1b]0;x\x07\nSteps: 1, Seed: 1, \x1b[2J: 5, Size: 64x64",
        "markup": "<img src=x onerror=alert(1)>\nSteps: 1, Seed: 1, Size: 64x64",
        "50001 characters": "a" * 50_001,
    }
    settings: dict[str, tuple[str, str]] = {}
    values: tuple[Any, ...] = (None, [], {}, True, -1, 10**400, 1e308, "x" * 10**5)
    for depth, text in deep.items():
        settings[f"swarm {depth}"] = "parameters", f'{{"sui_image_params": {{"loras": {text}}}}}'
        settings[f"invoke {depth}"] = "invokeai_metadata", f'{{"seed": {text}}}'
        settings[f"comfy {depth}"] = "prompt", f'{{"1": {text}}}'
    for number, value in enumerate(values):
        keys = ("prompt", "seed", "steps", "width", "cfgscale", "loras", "loraweights", "sampler")
        swarm = {"sui_image_params": dict.fromkeys(keys, value)}
        settings[f"swarm values {number}"] = "parameters", json.dumps(swarm)
        names = ("positive_prompt", "seed", "steps", "cfg_scale", "loras", "scheduler", "model")
        settings[f"invoke values {number}"] = (
            "invokeai_metadata",
            json.dumps(dict.fromkeys(names, value)),
        )
    return {
        **{f"record {name}.png": png_with_text(one, "fidelora") for name, one in records.items()},
        **{f"parameters {name}.png": png_with_text(one) for name, one in parameters.items()},
        **{f"{name}.png": png_with_text(one, key) for name, (key, one) in settings.items()},
    }


# --- random changes -------------------------------------------------------------------------------


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _spliced(content: bytes, rng: random.Random) -> bytes:
    first, second, third = sorted(rng.randrange(len(content)) for _ in range(3))
    return content[:second] + content[first:third] * rng.choice((1, 1, 50)) + content[third:]


def _filled(content: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(content)), rng.randint(1, 40)
    filler = rng.choice((b"\0", b"\xff", b"[", b'"', b"\n"))
    return content[:start] + filler * size + content[start + size :]


def _changed_numbers(content: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(content) - 8), rng.choice((2, 4))
    value = rng.choice((0, 1, 2**8 - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
    number = value.to_bytes(size, rng.choice(("big", "little")))
    return content[:start] + number + content[start + size :]


def _shuffled(content: bytes, rng: random.Random) -> bytes:
    chunks = _chunks(content)
    return png_of(*rng.sample(chunks, len(chunks)))


def _resized_chunk(content: bytes, rng: random.Random) -> bytes:
    chunks = _chunks(content)
    index = rng.randrange(len(chunks))
    written = [_chunk(kind, body) for kind, body in chunks]
    kind, body = chunks[index]
    written[index] = _chunk(kind, body, rng.choice((0, 1, len(body) + 1, 2**31 - 1, 2**32 - 1)))
    return _SIGNATURE + b"".join(written)


def _changed_chunk(content: bytes, rng: random.Random) -> bytes:
    """Change the content of a chunk, and compute its checksum again."""
    chunks = _chunks(content)
    index = rng.choice([index for index, (_, body) in enumerate(chunks) if len(body) > 8])
    kind, body = chunks[index]
    change: Callable[[bytes, random.Random], bytes] = rng.choice((_flipped, _filled, _spliced))
    return png_of(*chunks[:index], (kind, change(body, rng)), *chunks[index + 1 :])
