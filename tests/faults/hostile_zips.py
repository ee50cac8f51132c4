"""Hostile zips of training runs, made from one small good run."""

from __future__ import annotations

import io
import random
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping

from tests.support import GOLDEN_JOBS

MIB = 2**20
MAX_ZIP_BYTES = 4 * MIB
"""Size limit of the zips; their content may be four times as large."""
_RUN = GOLDEN_JOBS / "lokr_full"
_CONFIG = (_RUN / "config.yaml").read_bytes()
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def good_zip() -> bytes:
    """Return a zip with a training run."""
    files = [path for path in sorted(_RUN.rglob("*")) if path.is_file()]
    return zip_of({f"run/{path.relative_to(_RUN)}": path.read_bytes() for path in files})


def zip_of(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def hostile_zips() -> dict[str, bytes]:
    """Return zips that must be refused, by name."""
    return {
        **_names(),
        **_kinds(),
        **_sizes(),
        **_structures(),
        **_truncated(),
        **_configurations(),
    }


def mutated_zips(rounds: int) -> Iterator[tuple[str, bytes]]:
    """Yield a zip with random changes, most of them in its lists of files."""
    small = zip_of({"run/config.yaml": _CONFIG, "run/samples/1__000000001_0.png": b"x" * 50})
    rng = random.Random("zips")
    records = [small.index(mark) for mark in (_LOCAL, _CENTRAL, _END)]
    for number in range(rounds):
        changed = bytearray(small)
        for _ in range(rng.randint(1, 4)):
            place = rng.choice((rng.randrange(len(small)), rng.choice(records) + rng.randrange(46)))
            place = min(place, len(small) - 1)
            changed[place] = rng.choice((0, 1, 0x7F, 0xFF, changed[place] ^ 1 << rng.randrange(8)))
        yield f"changed {number}", bytes(changed)
        yield f"cut {number}", small[: rng.randrange(len(small))]
        start, end = sorted(rng.randrange(len(small)) for _ in range(2))
        yield f"without a part {number}", small[:start] + small[end:]
        yield f"with a part twice {number}", small[:end] + small[start:]


def _names() -> dict[str, bytes]:
    """Zips with a good run and one file with a hostile name."""
    names = {
        "parent": "../x.json", "parents": "a/../../x.json", "inner parent": "run/../x.json",
        "absolute": "/etc/x.json", "two slashes": "//x.json", "backslash": "..\\x.json",
        "drive": "C:\\x.json", "drive with slash": "C:/x.json", "stream": "run/a.json:b.json",
        "UNC": "\\\\host\\share\\x.json", "deep": "a/" * 13 + "x.json", 
        "very deep": "a/" * 2000 + "x",
        "long": "n" * 201 + ".json", "longest": "n" * 65_000 + ".json", "long in bytes": "é" * 101,
        "parent alone": "..", "parent folder": "../", "dots": "run/.../../x.json",
        "home": "~/../x.json",
    }  # fmt: skip
    found = {
        f"name {name}": zip_of({"run/config.yaml": _CONFIG, file: b"{}"})
        for name, file in names.items()
    }
    found["name empty"] = zip_of({"run/config.yaml": _CONFIG, "x.json": b"{}"}).replace(
        b"x.json", b"\0.json"
    )
    return found


def _kinds() -> dict[str, bytes]:
    """Zips with the wrong content."""
    found = {
        "nothing": b"",
        "text": b"not a zip",
        "empty zip": zip_of({}),
        "no run": zip_of({"a.png": b""}),
        "two runs": zip_of({"a/config.yaml": _CONFIG, "b/config.yaml": _CONFIG}),
        "run in a run": zip_of({"config.yaml": _CONFIG, "a/b/config.yaml": _CONFIG}),
        "too deep a run": zip_of({"a/b/c/d/e/config.yaml": _CONFIG}),
        "only a folder": zip_of({"config.yaml/": b""}),
        "configuration as folder": zip_of({"config.yaml/x.json": b"{}"}),
        "file and folder": zip_of(
            {"run/config.yaml": _CONFIG, "run/a.json": b"{}", "run/a.json/b.json": b"{}"}
        ),
        "LZMA": zip_of({"config.yaml": _CONFIG}, zipfile.ZIP_LZMA),
        "gzip": b"\x1f\x8b\x08" + bytes(40),
        "pickle": b"\x80\x04" + bytes(40),
    }  # fmt: skip
    for name, mode in {"link": stat.S_IFLNK, "device": stat.S_IFCHR, "pipe": stat.S_IFIFO}.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as packed:
            info = zipfile.ZipInfo("run/config.yaml")
            info.external_attr = (mode | 0o777) << 16
            packed.writestr(info, "/etc/passwd")
        found[f"configuration as {name}"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed.writestr("run/config.yaml", _CONFIG)
        packed.writestr("run/config.yaml", b"other")
    found["two files of one name"] = buffer.getvalue()
    return found


def _sizes() -> dict[str, bytes]:
    """Zips whose content is too large, whatever they claim."""
    zeros = bytes(17 * MIB)
    bomb = zip_of({"run/config.yaml": _CONFIG, "run/a.png": zeros})
    claimed = struct.pack("<I", len(zeros))
    found = {
        "bomb": bomb,
        "bomb that claims 1 byte": bomb.replace(claimed, struct.pack("<I", 1)),
        "bomb that claims 4 GiB": bomb.replace(claimed, b"\xff" * 4),
        "bomb of bzip2": zip_of({"run/config.yaml": _CONFIG, "a.png": zeros}, zipfile.ZIP_BZIP2),
        "bomb of many files": zip_of(
            {"run/config.yaml": _CONFIG, **{f"{n}.png": bytes(MIB) for n in range(17)}}
        ),
        "large configuration": zip_of({"run/config.yaml": b"#" * (MIB + 1)}),
        "20001 files": zip_of({f"{number}.png": b"" for number in range(20_001)}),
        "zip in a zip": zip_of({"a.zip": bomb}),
    }
    stored = zip_of({"run/config.yaml": _CONFIG, "run/a.png": b"x"}, zipfile.ZIP_STORED)
    found["too large a zip"] = stored + bytes(MAX_ZIP_BYTES)
    return found


def _structures() -> dict[str, bytes]:
    """Zips whose lists of files contradict the files."""
    good = zip_of({"run/config.yaml": _CONFIG, "run/b.png": b"x" * 100}, zipfile.ZIP_STORED)
    central, end = good.index(_CENTRAL), good.index(_END)
    found = {}
    # Only fields that Python reads: the header of each file repeats the others.
    fields = {
        "flags": (8, 2), "method": (10, 2), "checksum": (16, 4),
        "size": (24, 4), "name length": (28, 2), "extra length": (30, 2),
        "offset": (42, 4),
    }  # fmt: skip
    for name, (place, size) in fields.items():
        for value in (1, 2 ** (8 * size) - 1):
            changed = value.to_bytes(size, "little")
            start = central + place
            found[f"list {name} {value}"] = good[:start] + changed + good[start + size :]
    for name, place in {"list size": 12, "list offset": 16}.items():
        for value in (0, 2**32 - 1):
            start = end + place
            found[f"end {name} {value}"] = (
                good[:start] + value.to_bytes(4, "little") + good[start + 4 :]
            )
    found["other name in the file"] = good.replace(b"run/config.yaml", b"run/confiG.yaml", 1)
    found["other checksum"] = good.replace(_CONFIG[:20], _CONFIG[:20][::-1])
    found["overlapping files"] = _overlapping()
    found["file inside the list"] = good[:central] + good[central:].replace(
        good[central + 42 : central + 46], struct.pack("<I", central), 1
    )
    found["64-bit end"] = (
        good[:end] + b"PK\x06\x06" + struct.pack("<Q", 44) + b"\xff" * 44 + good[end:]
    )
    found["64-bit locator"] = (
        good[:end] + b"PK\x06\x07" + struct.pack("<IQI", 0, 2**63, 1) + good[end:]
    )
    return found


def _overlapping(count: int = 200) -> bytes:
    """Return a zip whose list names the same compressed megabyte many times."""
    content = bytes(MIB)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(content) + packer.flush()
    checksum = zlib.crc32(content)
    sizes = struct.pack("<III", checksum, len(packed), len(content))
    local = _LOCAL + struct.pack("<HHHHH", 20, 0, 8, 0, 33) + sizes + struct.pack("<HH", 5, 0)
    body = zip_of({"run/config.yaml": _CONFIG})
    body = body[: body.index(_CENTRAL)]
    start = len(body)
    body += local + b"a.png" + packed
    config = zipfile.ZipFile(io.BytesIO(zip_of({"run/config.yaml": _CONFIG}))).infolist()[0]
    names = [("run/config.yaml", config.CRC, config.compress_size, config.file_size, 0)]
    names += [("a.png", checksum, len(packed), len(content), start)] * count
    listed = b"".join(
        _CENTRAL
        + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 33)
        + struct.pack("<III", crc, compressed, size)
        + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, offset)
        + name.encode()
        for name, crc, compressed, size, offset in names
    )
    end = _END + struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(listed), len(body), 0)
    return body + listed + end


def _truncated() -> dict[str, bytes]:
    """Cut a zip at the boundaries of its records, and one byte before and after them."""
    good = zip_of({"run/config.yaml": _CONFIG, "run/a.png": b"x" * 10})
    boundaries = {0, len(good)}
    for mark in (_LOCAL, _CENTRAL, _END):
        place = good.find(mark)
        while place >= 0:
            boundaries |= {place, place + 4, place + 30}
            place = good.find(mark, place + 1)
    sizes = {boundary + shift for boundary in boundaries for shift in (-1, 0, 1)}
    return {f"cut at {size}": good[:size] for size in sorted(sizes) if 0 <= size < len(good)}


def _configurations() -> dict[str, bytes]:
    """Zips with a hostile configuration."""
    aliases = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
    )
    text = _CONFIG.decode()
    assert "name: lokr_full" in text
    configs: dict[str, str | bytes] = {
        "empty": "", "list": "[]", "text": "a", "number": "1", "null": "null", "aliases": aliases,
        "recursive": "config: &a {process: [*a], name: *a}",
        "tags": "!!python/object/apply:os.system [id]", "deep": "[" * 1000,
        "deep mapping": "{a: " * 500, "number of colons": "config: " + "1:" * 5000 + "1",
        "invalid UTF-8": b"config: \xff\xfe", "NUL": b"config: \0",
        "cut UTF-16": text.encode("utf-16")[:-1], "unmarked UTF-16": text.encode("utf-16-le"),
        "escape": 'config: {name: "\\e]0;x", process: [{model: {name_or_path: a, arch: "\\e"}}]}',
        "long name": text.replace("name: lokr_full", f"name: {'n' * 10_000}"),
        "other family": text.replace("    model:\n", "    model:\n      is_v3: true\n"),
        "own VAE": text.replace("    model:\n", "    model:\n      vae_path: /etc/passwd\n"),
        "huge steps": text.replace("steps:", "steps: " + "9" * 99 + "x\n      y:"),
    }  # fmt: skip
    json_config = {"JSON": b'{"config": ' + b"[" * 900 + b"]" * 900 + b"}", "no JSON": b"{"}
    found = {
        f"configuration {name}": zip_of(
            {"run/config.yaml": config.encode() if isinstance(config, str) else config}
        )
        for name, config in configs.items()
    }
    return found | {
        f"configuration {name}": zip_of({"run/.job_config.json": config})
        for name, config in json_config.items()
    }
