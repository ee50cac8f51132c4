"""Hostile adapter files, generated from one small LoRA for the tiny base model."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fidelora.safetensors_header import (
    MAX_BRACKETS,
    MAX_COMMAS,
    MAX_HEADER_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
)

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"
"""A convolution of the tiny base model with 16 input and 16 output channels."""
RANK = 2
DOWN, UP, ALPHA = f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight", f"{MODULE}.alpha"

Outcome = Literal["refused", "job fails", "any"]


@dataclass(frozen=True)
class Hostile:
    """A hostile file.

    Attributes:
        name: name of the file, which is also the id of the test.
        write: creates the file at a path, which does not exist.
        outcome: `refused` if it must be refused by its header, `job fails` if its header is valid
            but its job must fail, `any` if programs may use it.
        is_plain: False for links, pipes and folders, which cannot be uploaded.
    """

    name: str
    write: Callable[[Path], object]
    outcome: Outcome = "refused"
    is_plain: bool = True


def file_of(header: object, body: bytes = b"") -> bytes:
    """Return a file with this header (bytes as they are, anything else as JSON) and body."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def lora(
    metadata: Mapping[str, str] | None = None, /, **arrays: np.ndarray[Any, Any] | None
) -> tuple[dict[str, Any], bytes]:
    """Return header and body of a small LoRA; `arrays` replaces or, with None, removes tensors.

    The names of the arrays are `down`, `up`, `alpha`, or a key of the file.
    """
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "down": random.normal(0, 0.01, (RANK, 16, 1, 1)).astype("<f4"),
        "up": random.normal(0, 0.01, (16, RANK, 1, 1)).astype("<f4"),
        "alpha": np.array(RANK, "<f4"),
    } | arrays
    keys = {"down": DOWN, "up": UP, "alpha": ALPHA}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    body = b""
    for name, array in tensors.items():
        if array is not None:
            content = array.tobytes()
            span = len(body), len(body) + len(content)
            header[keys.get(name, name)] = entry(_DTYPES[array.dtype.str], list(array.shape), *span)
            body += content
    return header, body


_DTYPES = {
    "<f2": "F16", "<f4": "F32", "<f8": "F64", "<i8": "I64", "|u1": "U8", "|b1": "BOOL",
}  # fmt: skip

SOUND = file_of(*lora())


def hostile_adapters() -> Iterator[Hostile]:
    """Yield all hostile files."""
    for name, content in {
        **_truncated(),
        **_lying_offsets(),
        **_wrong_entries(),
        **_hostile_json(),
        **_other_formats(),
        **_hostile_names(),
    }.items():
        yield Hostile(name, _writer(content))
    yield from _huge()
    for name, content in _hostile_values().items():
        yield Hostile(name, _writer(content), "job fails")
    for name, content in _hostile_metadata().items():
        yield Hostile(name, _writer(content), "any")
    yield from _special_files()


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _truncated() -> dict[str, bytes]:
    """Cut the file at every boundary of the format, and one byte before and after it."""
    header, _ = lora()
    start = 8 + int.from_bytes(SOUND[:8], "little")
    places = {0: "start", 8: "length", start: "header", len(SOUND): "end"}
    for number, one in enumerate(value for key, value in header.items() if key != "__metadata__"):
        for place, offset in zip(("begin", "end"), one["data_offsets"], strict=True):
            places.setdefault(start + offset, f"tensor {number} {place}")
    found = {}
    for boundary, name in places.items():
        for shift in (-1, 0, 1):
            size = boundary + shift
            if 0 <= size < len(SOUND):
                found[f"cut {name} {shift:+}"] = SOUND[:size]
            elif size > len(SOUND):
                found["one byte too many"] = SOUND + b"x"
    found["cut in the header"] = SOUND[: start // 2]
    found["header alone with another length"] = struct.pack("<Q", start) + SOUND[8:start]
    return found


def _lying_offsets() -> dict[str, bytes]:
    _, body = lora()
    found = {}
    huge = (2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**19)
    spans: dict[str, tuple[Any, Any]] = {
        "overlap": (64, 192), "same place": (0, 128), "hole": (132, 260), "hole of one": (129, 257),
        "backwards": (256, 128), "negative begin": (-128, 0), "negative end": (128, -1),
        "beyond the end": (len(body), len(body) + 128), "empty": (128, 128), "too long": (128, 264),
        "float": (128.0, 256.0), "text": ("128", "256"), "true": (True, 129), "null": (None, None),
        "list": ([128], [256]),
    }  # fmt: skip
    spans |= {f"begin {number}": (number, number + 128) for number in huge}
    spans |= {f"end {number}": (128, number) for number in huge}
    for name, span in spans.items():
        header, body = lora()
        header[UP]["data_offsets"] = list(span)
        found[f"offsets {name}"] = file_of(header, body)
    for name, offsets in {"none": [], "one": [128], "three": [128, 192, 256], "object": {}}.items():
        header, body = lora()
        header[UP]["data_offsets"] = offsets
        found[f"offsets {name}"] = file_of(header, body)
    for size in (1, 7, 2**31, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        found[f"header length {size}"] = struct.pack("<Q", size) + SOUND[8:]
    return found


def _wrong_entries() -> dict[str, bytes]:
    found = {}
    dtypes = [
        "I8",
        "I64",
        "U8",
        "BOOL",
        "C64",
        "F4",
        "float32",
        "f32",
        "",
        "F" * 10**5,
        32,
        None,
        [],
    ]
    for number, dtype in enumerate(dtypes):
        header, body = lora()
        header[UP]["dtype"] = dtype
        found[f"dtype {number} {str(dtype)[:10]}"] = file_of(header, body)
    shapes: dict[str, Any] = {
        "overflow to zero": [2**32, 2**32], "overflow to the size": [2**63, 2, 16, 2],
        "2**64": [2**64], "10 ** 20": [10**20], "negative": [-16, -2], "one negative": [-32],
        "zero": [0], "zero and huge": [0, 2**62], "float": [16.0, 2.0], "text": ["16", "2"],
        "null": [None], "nested": [[16, 2]], "true": [True, 32], "9 dimensions": [1] * 8 + [32],
        "a million dimensions": [1] * 10**5, "other size": [16, 3], "no list": 32, "missing": None,
    }  # fmt: skip
    for name, shape in shapes.items():
        header, body = lora()
        header[UP]["shape"] = shape
        if shape is None:
            del header[UP]["shape"]
        found[f"shape {name}"] = file_of(header, body)
    entries: dict[str, Any] = {"null": None, "number": 5, "list": [], "empty": {}, "text": "x"}
    for name, value in entries.items():
        header, body = lora()
        header[UP] = value
        found[f"entry {name}"] = file_of(header, body)
    return found


def _hostile_json() -> dict[str, bytes]:
    header, body = lora()
    text = json.dumps(header)
    number = f'"shape": [16, {RANK}, 1, 1]'
    assert number in text
    deep = {depth: "[" * depth + "]" * depth for depth in (101, 300, 500, 900, 990, 100_000)}
    raw = {
        "4300 digits": text.replace(number, f'"shape": [{"9" * 4300}]'),
        "4301 digits": text.replace(number, f'"shape": [{"9" * 4301}]'),
        "a million digits": text.replace(number, f'"shape": [{"9" * 10**6}]'),
        "NaN": text.replace(number, '"shape": [NaN]'),
        "Infinity": text.replace(number, '"shape": [Infinity, -Infinity]'),
        "1e400": text.replace(number, '"shape": [1e400]'),
        "duplicate tensor": text[:-1] + f', "{UP}": {json.dumps(header[UP])}}}',
        "duplicate field": text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"', 1),
        "duplicate metadata": '{"__metadata__": {}, ' + text[1:],
        "duplicate long key": '{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 1}',
        "empty lists": '{"a": [' + "[]," * MAX_BRACKETS + "[]]}",
        "few empty lists": '{"a": [' + "[]," * (MAX_BRACKETS // 2) + "[]]}",
        "commas": '{"a": [' + "1," * MAX_COMMAS + "1]}",
        "braces in text": '{"__metadata__": {"a": "' + "{" * (MAX_BRACKETS + 1) + '"}}',
        "metadata list": text.replace('"__metadata__": {}', '"__metadata__": []'),
        "metadata number": text.replace('"__metadata__": {}', '"__metadata__": {"a": 1}'),
        "metadata nested": text.replace('"__metadata__": {}', '"__metadata__": {"a": {"b": "c"}}'),
        "not closed": text[:-1],
        "trailing text": text + "x",
        "two documents": text + text,
        "single quotes": text.replace('"', "'"),
        "comment": "{/* */" + text[1:],
        "only a list": "[]",
        "only null": "null",
        "space before": " " + text,
        "NUL inside": text.replace("F32", "F\x0032", 1),
        "line feed in text": text.replace("F32", "F\n32", 1),
        "no tensors": "{}",
        "only metadata": '{"__metadata__": {"a": "b"}}',
    }
    found = {f"JSON {name}": file_of(one.encode(), body) for name, one in raw.items()}
    for depth, nested in deep.items():
        shape = text.replace(number, f'"shape": {nested}')
        found[f"JSON {depth} deep"] = file_of(shape.encode(), body)
        # Escapes make the program walk through the whole value.
        found[f"JSON {depth} deep with escapes"] = file_of(
            shape.replace("F32", "F32\\u0000", 1).encode(), body
        )
    encoded = text.encode()
    binary = {
        "invalid UTF-8": encoded.replace(b"F32", b"F\xff\xfe2", 1),
        "overlong UTF-8": encoded.replace(b"F32", b"F\xc0\x8032", 1),
        "surrogate in UTF-8": encoded.replace(b"F32", b"F\xed\xa0\x8032", 1),
        "BOM": b"\xef\xbb\xbf" + encoded,
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32-le"),
        "zeros": bytes(len(encoded)),
        "0xff": b"\xff" * len(encoded),
    }
    return found | {f"JSON {name}": file_of(one, body) for name, one in binary.items()}


def _other_formats() -> dict[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("archive/data.pkl", b"x" * 100)
    return {
        "nothing": b"",
        "one zero": b"\0",
        "eight zeros": bytes(8),
        "nine zeros": bytes(9),
        "zip": buffer.getvalue(),
        "JSON": json.dumps({"a": 1}).encode(),
        "JSON list": json.dumps([1] * 100).encode(),
        "HTML": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "HTML with spaces": b" \n\t<HTML>",
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "ELF": b"\x7fELF\x02\x01\x01" + bytes(100),
        "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(100),
        "script": b"#!/bin/sh\necho no\n",
        "text": b"This is not a LoRA, but a long text that has more than eight bytes.",
        **{
            f"pickle {protocol}": pickle.dumps({"a": list(range(50))}, protocol)
            for protocol in range(6)
        },
    }


def _hostile_names() -> dict[str, bytes]:
    """Tensors and modules with names that are hostile or belong to no adapter."""
    names = {
        "escape": "\x1b]0;title\x07.lora_down.weight", "direction": "\u202egnp.weight",
        "NUL": "a\x00b", "line feeds": "a\nb\r\nc", "lone surrogate": "\ud800.alpha",
        "markup": "<img src=x onerror=alert(1)>", "parent": "../../../etc/passwd",
        "absolute": "/etc/passwd", "empty": "", "dot": ".", "dots": "." * 500, "space": " ",
        "longest": "n" * MAX_NAME_CHARACTERS, "too long": "n" * (MAX_NAME_CHARACTERS + 1),
        "a million": "n" * 10**6, "a million dots": "." * 10**6, "emoji": "\U0001f642" * 300,
        "only a suffix": ".lora_down.weight", "format": "{0}%s%n{name}",
        "whole model": "model.diffusion_model.input_blocks.0.0.weight",
        "bundled embedding": "bundle_emb.sks.string_to_param.*", "control": "lora_controlnet",
        "numbered": "unet:0:down", "quantised": "a.weight.scale_weight", "OFT": "a.oft_R.weight",
    }  # fmt: skip
    found = {}
    for name, key in names.items():
        found[f"name {name}"] = file_of({key: entry("F32", [1, 1, 1], 0, 4)}, bytes(4))
    header, body = lora(up=None)
    found["without up"] = file_of(header, body)
    header, body = lora(down=None)
    found["without down"] = file_of(header, body)
    header, body = lora(down=None, up=None)
    found["only an alpha"] = file_of(header, body)
    header, body = lora(**{f"{MODULE}.lora_A.weight": np.zeros((2, 16), "<f4")})
    found["two tensors for one part"] = file_of(header, body)
    header, body = lora(**{f"{MODULE}.hada_w1_a": np.zeros((2, 16), "<f4")})
    found["two kinds in one module"] = file_of(header, body)
    header, body = lora(alpha=np.ones(2, "<f4"))
    found["alpha of two numbers"] = file_of(header, body)
    header, body = lora(up=np.zeros((16, 2), "<i8"))
    found["whole numbers"] = file_of(header, body)
    for number, shape in enumerate([(76, 768), (1, 1, 768), (0, 768)]):
        array = np.zeros(shape, "<f4")
        header = {"emb_params": entry("F32", list(shape), 0, array.nbytes)}
        found[f"embedding {number}"] = file_of(header, array.tobytes())
    spans = {"clip_l": (1, 768), "clip_g": (2, 1280)}
    header, body = {}, b""
    for key, shape in spans.items():
        content = np.zeros(shape, "<f4").tobytes()
        header[key] = entry("F32", list(shape), len(body), len(body) + len(content))
        body += content
    found["embeddings of different lengths"] = file_of(header, body)
    return found


def _huge() -> Iterator[Hostile]:
    """Files that are large; each is made when it is written."""

    def tensors(count: int, key: str) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            entries = (
                f'"{key.format(number)}":{{"dtype":"F8_E4M3","shape":[1],"data_offsets":'
                f"[{number},{number + 1}]}}"
                for number in range(count)
            )
            path.write_bytes(file_of(("{" + ",".join(entries) + "}").encode(), bytes(count)))

        return write

    def metadata(size: int) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            path.write_bytes(file_of(*lora({"notes": "x" * size})))

        return write

    yield Hostile("20001 tensors", tensors(MAX_TENSORS + 1, "{}"))
    yield Hostile("20000 tensors", tensors(MAX_TENSORS, "{}"))
    yield Hostile("20000 alphas", tensors(MAX_TENSORS, "lora_unet_a_{}.alpha"))
    yield Hostile("5000 biases", tensors(5000, "lora_unet_a_{}.diff_b"), "job fails")
    yield Hostile("metadata of 1 MB", metadata(10**6), "any")
    yield Hostile("metadata of 31 MB", metadata(31 * 10**6), "any")
    yield Hostile("metadata of 34 MB", metadata(34 * 10**6))


def _hostile_values() -> dict[str, bytes]:
    """Valid headers with tensors that cannot be used; their jobs fail."""

    def filled(value: float, dtype: str = "<f4") -> np.ndarray[Any, Any]:
        array = np.full((16, RANK, 1, 1), 0.01, dtype)
        array[3, 1] = value
        return array

    arrays: dict[str, dict[str, Any]] = {
        "nan in up": {"up": filled(math.nan)},
        "inf in up": {"up": filled(math.inf)},
        "-inf in up": {"up": filled(-math.inf)},
        "inf in float16": {"up": filled(math.inf, "<f2")},
        "1e300 in float64": {"up": filled(1e300, "<f8")},
        "nan in down": {"down": np.full((RANK, 16, 1, 1), math.nan, "<f4")},
        "alpha nan": {"alpha": np.array(math.nan, "<f4")},
        "alpha inf": {"alpha": np.array(math.inf, "<f4")},
        "alpha -inf": {"alpha": np.array(-math.inf, "<f4")},
        "alpha 1e300": {"alpha": np.array(1e300, "<f8")},
        "rank 0 in up": {"up": np.zeros((16, 1, 1, 1), "<f4")},
        "ranks 2 and 3": {"up": np.zeros((16, 3, 1, 1), "<f4")},
        "swapped factors": {"up": np.zeros((RANK, 16, 1, 1), "<f4")},
        "one dimension": {"up": np.zeros(32, "<f4")},
        "three dimensions": {"up": np.zeros((16, RANK, 1), "<f4")},
        "five dimensions": {"up": np.zeros((16, RANK, 1, 1, 1), "<f4")},
        "no dimensions": {"up": np.array(0.0, "<f4")},
        "kernel in up": {"up": np.zeros((16, RANK, 3, 3), "<f4")},
        "too few inputs": {"down": np.zeros((RANK, 15, 1, 1), "<f4")},
        "too many outputs": {"up": np.zeros((17, RANK, 1, 1), "<f4")},
        "wide outputs": {"up": np.zeros((200_000, RANK, 1, 1), "<f4")},
        "bias of another length": {f"{MODULE}.diff_b": np.zeros(17, "<f4")},
        "bias with two dimensions": {f"{MODULE}.diff_b": np.zeros((16, 1), "<f4")},
        "dora_scale of another shape": {f"{MODULE}.dora_scale": np.zeros((3, 3), "<f4")},
        "magnitude of another length": {f"{MODULE}.magnitude": np.zeros(3, "<f4")},
        "mid of another shape": {f"{MODULE}.lora_mid.weight": np.zeros((3, 3, 1, 1), "<f4")},
        "dora_scale without dimensions": {f"{MODULE}.dora_scale": np.array(1.0, "<f4")},
    }
    found = {f"values {name}": file_of(*lora(**one)) for name, one in arrays.items()}
    only = {"down": None, "up": None, "alpha": None}
    kinds: dict[str, dict[str, Any]] = {
        "lokr": {"lokr_w1": np.zeros((5, 5), "<f4"), "lokr_w2": np.zeros((7, 7), "<f4")},
        "lokr scalar": {"lokr_w1": np.array(1.0, "<f4"), "lokr_w2": np.array(1.0, "<f4")},
        "lokr product": {"lokr_w1": np.zeros((2048, 2048), "<f2"),
                         "lokr_w2": np.zeros((2048, 2048), "<f2")},
        "loha": {f"hada_w{i}_{j}": np.zeros((3, 5), "<f4") for i in (1, 2) for j in "ab"},
        "glora": {f"{one}.weight": np.zeros((3, 5), "<f4") for one in ("a1", "a2", "b1", "b2")},
        "glora scalar": {f"{one}.weight": np.array(0.0, "<f4") for one in ("a1", "a2", "b1", "b2")},
        "oft": {"oft_blocks": np.zeros((3, 5, 5), "<f4")},
        "oft not square": {"oft_blocks": np.zeros((3, 5, 4), "<f4")},
        "oft of size 1": {"oft_blocks": np.zeros((1, 1, 1), "<f4")},
        "boft": {"oft_blocks": np.zeros((1, 3, 5, 5), "<f4")},
        "ia3": {"weight": np.zeros((3, 3), "<f4"), "on_input": np.array(2, "|u1")},
        "ia3 of length 3": {"weight": np.zeros(3, "<f4"), "on_input": np.array(True, "|b1")},
        "full": {"diff": np.zeros((1, 1), "<f4")},
        "full without dimensions": {"diff": np.array(1.0, "<f4")},
        "norm": {"w_norm": np.zeros(3, "<f4"), "b_norm": np.zeros(4, "<f4")},
    }  # fmt: skip
    for name, parts in kinds.items():
        named = {f"{MODULE}.{part}": array for part, array in parts.items()}
        found[f"values {name}"] = file_of(*lora(**only, **named))
    for name, module in {
        "FLUX": "lora_unet_double_blocks_0_img_attn_qkv", "unknown": "lora_unet_nothing",
        "path": "../../etc/passwd", "escape": "\x1b[2J\x1b]0;x\x07", "longest": "m" * 980,
        "dots": "a." * 480 + "b", "surrogate": "\ud800", "empty PEFT": "base_model.model.",
    }.items():  # fmt: skip
        header, body = lora()
        renamed = {key.replace(MODULE, module): value for key, value in header.items()}
        found[f"module {name}"] = file_of(renamed, body)
    return found


def _hostile_metadata() -> dict[str, bytes]:
    """Valid LoRAs with hostile metadata."""
    deep = "[" * 600 + "]" * 600
    peft = {
        f"alpha_pattern of {count}": json.dumps(
            {"unet.lora_alpha": 2, "unet.alpha_pattern": {f"a.b{i}": 1 for i in range(count)}}
        )
        for count in (1, 50_000)
    }
    peft |= {
        "1000 parts": json.dumps({f"p{number}.lora_alpha": number for number in range(1000)}),
        "alpha inf": '{"unet.lora_alpha": Infinity}',
        "alpha 1e400": '{"unet.lora_alpha": 1e400}',
        "alpha of 4000 digits": '{"unet.lora_alpha": ' + "9" * 4000 + "}",
        "alpha of 4400 digits": '{"unet.lora_alpha": ' + "9" * 4400 + "}",
        "alpha text": '{"unet.lora_alpha": "2"}',
        "alpha list": '{"unet.alpha": ' + deep + ', "unet.r": ' + deep + "}",
        "alpha unlike rank": '{"unet.alpha": "' + "x" * 10**5 + '", "unet.r": 1}',
        "expression": '{"unet.alpha_pattern": {"(a+)+$": 2}}',
        "pattern list": '{"unet.alpha_pattern": [1]}',
        "deep": '{"unet.lora_alpha": ' + deep + "}",
        "list": "[]",
        "no JSON": "{",
        "use_dora": '{"unet.use_dora": true}',
    }
    metadata: dict[str, dict[str, str]] = {
        f"PEFT {name}": {"lora_adapter_metadata": text} for name, text in peft.items()
    }
    for name, text in {
        "deep": deep, "deep object": '{"a":' * 300 + "1" + "}" * 300, "not closed": "{",
        "null": "null", "4400 digits": "9" * 4400, "surrogate": '"\\ud800"', "NUL": "\x00",
        "escape": "\x1b]0;title\x07\x1b[2J", "direction": "\u202e\u2066abc", "empty": "",
        "markup": "<script>alert(1)</script>", "a million": "x" * 10**6,
        "name deep": '{"name": ' + deep + ', "version": ' + deep + "}",
        "name list": '{"name": ["ai-toolkit"], "version": {"a": 1}}',
        "version": '{"name": "ai-toolkit", "version": "' + "9" * 5000 + '"}',
        "version number": '{"name": "ai-toolkit", "version": 1}',
        "step": '{"step": -1, "epoch": 1e400}', "step huge": '{"step": ' + "9" * 4000 + "}",
        "step true": '{"step": true, "epoch": [1]}',
    }.items():  # fmt: skip
        fields = (
            "software", "training_info", "ss_tag_frequency", "ss_trigger_word", "name", "step",
            "ss_steps", "ss_epoch", "ss_base_model_version", "sshs_model_hash", "ss_output_name",
        )  # fmt: skip
        metadata[f"fields {name}"] = dict.fromkeys(fields, text)
    return {f"metadata {name}": file_of(*lora(one)) for name, one in metadata.items()}


def _special_files() -> Iterator[Hostile]:
    def link(target: str) -> Callable[[Path], object]:
        return lambda path: path.symlink_to(target)

    yield Hostile("folder", Path.mkdir, is_plain=False)
    yield Hostile("pipe", os.mkfifo, is_plain=False)
    for name, target in {
        "device": "/dev/zero", "random device": "/dev/urandom", "passwords": "/etc/passwd",
        "memory": "/proc/self/mem", "environment": "/proc/self/environ", "itself": "itself",
        "nothing": "no such file", "parent": "..",
    }.items():  # fmt: skip
        yield Hostile(f"link to {name}", link(target), is_plain=False)
