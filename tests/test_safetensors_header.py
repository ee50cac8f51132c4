"""Checks of a `.safetensors` file before any tensor is read."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fidelora.errors import PickleRefusedError, WeightsFileError
from fidelora.safetensors_header import (
    DTYPE_BYTES,
    MAX_BRACKETS,
    MAX_COMMAS,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorInfo,
    read_file_header,
    read_header,
)

SOUND = save(
    {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, metadata={"who": "trainer"}
)
TWO_BYTES = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}


def file_of(header: object, body: bytes = b"") -> bytes:
    """Return a file with this header (bytes as they are, anything else as JSON) and body."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path):
    """Return a function that reads bytes as the file `lora.safetensors`."""

    def read_bytes(content: bytes):
        path = tmp_path / "lora.safetensors"
        path.write_bytes(content)
        return read_file_header(path)

    return read_bytes


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A file that every example of a property test overwrites."""
    return tmp_path_factory.mktemp("property") / "lora.safetensors"


# --- valid files ----------------------------------------------------------------------------------


def test_a_valid_file_gives_its_tensors_metadata_and_size(tmp_path):
    path = tmp_path / "lora.safetensors"
    tensors = {
        "half": torch.ones(2, 3, dtype=torch.float16),
        "brain": torch.ones(5, dtype=torch.bfloat16),
        "single": torch.ones(1, 2, 3, 4),
        "scalar": torch.tensor(4.0, dtype=torch.float64),
        "whole": torch.ones(7, dtype=torch.int8),
        "none": torch.ones(0, 3),
    }
    save_file(tensors, path, metadata={"who": "trainer", "text": "süß"})
    header = read_file_header(path)
    assert dict(header.tensors) == {
        "half": TensorInfo("F16", (2, 3)),
        "brain": TensorInfo("BF16", (5,)),
        "single": TensorInfo("F32", (1, 2, 3, 4)),
        "scalar": TensorInfo("F64", ()),
        "whole": TensorInfo("I8", (7,)),
        "none": TensorInfo("F32", (0, 3)),
    }
    assert header.metadata == {"who": "trainer", "text": "süß"}
    assert header.file_bytes == path.stat().st_size


def test_a_file_without_metadata_has_empty_metadata(read):
    assert read(file_of({"a": TWO_BYTES}, b"xx")).metadata == {}


def test_a_file_without_tensors_is_valid(read):
    assert read(file_of({})).tensors == {}


SIZES = {
    1: ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"],
    2: ["U16", "I16", "F16", "BF16"],
    4: ["U32", "I32", "F32"],
    8: ["U64", "I64", "F64"],
}


@pytest.mark.parametrize(
    ("dtype", "size"), [(dtype, size) for size, dtypes in SIZES.items() for dtype in dtypes]
)
def test_every_dtype_has_its_size(read, dtype, size):
    header = {"a": {"dtype": dtype, "shape": [3, 2], "data_offsets": [0, 6 * size]}}
    assert read(file_of(header, bytes(6 * size))).tensors["a"] == TensorInfo(dtype, (3, 2))
    with pytest.raises(WeightsFileError):
        read(file_of(header, bytes(6 * size - 1)))


def test_a_header_of_640_bytes_is_not_mistaken_for_a_pickle(read):
    """640 is 0x0280, so the file begins like a pickle of protocol 2."""
    header = json.dumps({"a": TWO_BYTES}).encode().ljust(640)
    content = file_of(header, b"xx")
    assert content.startswith(b"\x80\x02")
    assert read(content).tensors == {"a": TensorInfo("F16", (1,))}


def test_the_header_can_list_tensors_in_any_order(read):
    later = {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}
    assert list(read(file_of({"b": later, "a": TWO_BYTES}, bytes(4))).tensors) == ["b", "a"]


def test_reading_starts_at_0_and_ends_after_the_header(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(file_of({"a": TWO_BYTES}, b"xy"))
    with path.open("rb") as file:
        file.seek(11)
        read_header(file, "lora.safetensors")
        assert file.read() == b"xy"


# --- files that are something else ----------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        b"\n\n  <html lang='en'><head></head></html>",
        b'<?xml version="1.0"?><Error/>',
        b"<html>",
    ],
)
def test_a_web_page_is_recognised(read, page):
    with pytest.raises(
        WeightsFileError, match=r"lora\.safetensors is a web page \(HTML\).*direct download link"
    ):
        read(page)


def test_a_git_lfs_pointer_is_recognised(read):
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
    )
    with pytest.raises(WeightsFileError, match=r"Git LFS pointer.*git lfs pull"):
        read(pointer)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_named_safetensors_is_refused(read, protocol):
    with pytest.raises(
        PickleRefusedError, match="is a Python pickle or zip archive under the name"
    ):
        read(pickle.dumps({"state": list(range(50))}, protocol=protocol))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive, .* unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z archive"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(20), "a RAR archive"),
        (b"lora.safetensors".ljust(257, b"\x00") + b"ustar\x0000", "a tar archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "an image"),
        (bytes(5000), "begins with 512 zeros: the download is incomplete"),
        (b'{"error":"Unauthorized"}', "a text file, .* logged in"),
        (b"Entry not found", "a text file"),
        (b"<Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b"\xef\xbb\xbf<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("version https://git-lfs.github.com/spec/v1\n".encode("utf-16"), "a Git LFS pointer"),
        (b"\xef\xbb\xbf" + SOUND, "a byte order mark before its header"),
    ],
)
def test_other_kinds_of_files_are_named(read, content, kind):
    with pytest.raises(WeightsFileError, match=kind):
        read(content)


def test_a_safetensors_file_with_a_pickle_extension_is_named(tmp_path):
    path = tmp_path / "lora.pt"
    path.write_bytes(SOUND)
    with pytest.raises(PickleRefusedError, match=r"is a \.safetensors file; rename it"):
        read_file_header(path)


def test_a_zip_archive_named_safetensors_is_refused(read):
    with pytest.raises(PickleRefusedError, match="zip archive"):
        read(zip_archive())
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("lora.safetensors", SOUND)
    with pytest.raises(PickleRefusedError, match="is a zip archive; unpack it"):
        read(content.getvalue())


def test_a_torch_checkpoint_named_safetensors_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(PickleRefusedError, match="convert it"):
        read_file_header(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl", ".CKPT"])
def test_a_pickle_extension_is_refused_whatever_the_content(tmp_path, suffix):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(
        PickleRefusedError, match=rf"lora{suffix} is a Python pickle.*convert it to \.safetensors"
    ):
        read_file_header(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(
        WeightsFileError, match=r"nowhere\.safetensors cannot be read: No such file"
    ):
        read_file_header(tmp_path / "nowhere.safetensors")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(WeightsFileError, match="cannot be read: Is a directory"):
        read_file_header(tmp_path)


# --- damaged files --------------------------------------------------------------------------------


def test_an_empty_file_is_refused(read):
    with pytest.raises(WeightsFileError, match="has 0 bytes, too few"):
        read(b"")


def test_a_file_of_seven_bytes_is_refused(read):
    with pytest.raises(WeightsFileError, match="has 7 bytes, too few"):
        read(bytes(7))


def test_a_claimed_header_of_60_mb_is_refused(read):
    with pytest.raises(WeightsFileError, match=r"claims a header of 60,000,000 bytes.*damaged"):
        read(struct.pack("<Q", 60_000_000) + b"{}")


def test_an_actual_header_of_60_mb_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 60_000_000) + b"{}")
        file.truncate(8 + 60_000_000)  # a sparse file
    with pytest.raises(WeightsFileError, match="claims a header of 60,000,000 bytes"):
        read_file_header(path)


def test_a_header_of_the_maximum_size_is_read(read):
    raw = b"{}".ljust(MAX_HEADER_BYTES)
    assert read(file_of(raw)).tensors == {}
    with pytest.raises(WeightsFileError, match=f"at most {MAX_HEADER_BYTES:,} are accepted"):
        read(file_of(raw + b" "))


def test_the_largest_possible_header_length_is_refused(read):
    with pytest.raises(
        WeightsFileError, match="claims a header of 18,446,744,073,709,551,615 bytes"
    ):
        read(b"\xff" * 8 + b"{}")


def test_a_header_longer_than_the_file_is_refused(read):
    with pytest.raises(WeightsFileError, match="ends inside its own header: it is truncated"):
        read(struct.pack("<Q", 100) + b"{}")


def test_a_header_without_its_last_byte_is_refused(read):
    with pytest.raises(WeightsFileError, match="ends inside its own header"):
        read(file_of({"a": TWO_BYTES})[:-1])


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b"{'a': 1}", b'{"a": \xff\xfe}', b'{"\x80": 1}', b"[" * 100_000],
    ids=["empty", "brace", "word", "python", "not UTF-8", "key not UTF-8", "deeply nested"],
)
def test_a_header_that_is_not_json_is_refused(read, raw):
    with pytest.raises(
        WeightsFileError, match=r"is not a \.safetensors file: its header is not a JSON object"
    ):
        read(file_of(raw))


@pytest.mark.parametrize("raw", [b"[]", b"5", b'"text"', b"null"])
def test_a_header_that_is_not_an_object_is_refused(read, raw):
    with pytest.raises(WeightsFileError, match="its header is not a JSON object"):
        read(file_of(raw))


def test_a_duplicate_tensor_name_is_refused(read):
    entry = json.dumps(TWO_BYTES)
    with pytest.raises(WeightsFileError, match=r"has unet\.a twice in its header"):
        read(file_of(f'{{"unet.a": {entry}, "unet.a": {entry}}}'.encode(), b"xx"))


def test_a_duplicate_field_of_a_tensor_is_refused(read):
    with pytest.raises(WeightsFileError, match="has dtype twice"):
        read(
            file_of(
                b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}',
                b"xx",
            )
        )


@pytest.mark.parametrize(
    ("first", "second", "body_bytes"),
    [([0, 4], [2, 6], 6), ([0, 4], [0, 4], 4), ([0, 4], [5, 9], 9), ([1, 5], [5, 9], 9)],
    ids=["overlap", "same place", "gap", "gap at the start"],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(read, first, second, body_bytes):
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": at}
        for name, at in (("a", first), ("b", second))
    }
    with pytest.raises(WeightsFileError, match=r"overlap or leave gaps at [ab]: it is damaged"):
        read(file_of(header, bytes(body_bytes)))


def test_a_truncated_file_is_refused_with_both_sizes(read):
    header = {"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}
    with pytest.raises(
        WeightsFileError, match=r"is truncated: its tensors need 4,000 bytes and it has 3,999"
    ):
        read(file_of(header, bytes(3999)))


def test_bytes_after_the_last_tensor_are_refused(read):
    with pytest.raises(WeightsFileError, match="has 3 bytes after its last tensor"):
        read(file_of({"a": TWO_BYTES}, bytes(5)))


@pytest.mark.parametrize("dtype", ["F4", "float16", "f16", "C64", ""])
def test_the_error_for_an_unknown_dtype_names_it(read, dtype):
    with pytest.raises(WeightsFileError, match=f"stores unet.a as {dtype}, which is not supported"):
        read(file_of({"unet.a": {**TWO_BYTES, "dtype": dtype}}, b"xx"))


@pytest.mark.parametrize("shape", [[-1], [-1, -1], [1.0], ["1"], [None], [[1]], [True]])
def test_an_invalid_shape_is_refused(read, shape):
    with pytest.raises(
        WeightsFileError, match=r"has unet\.a with the invalid shape \[.*\]: it is damaged"
    ):
        read(file_of({"unet.a": {**TWO_BYTES, "shape": shape}}, b"xx"))


@pytest.mark.parametrize(
    ("shape", "at"),
    [([2], [0, 2]), ([1], [2, 0]), ([1], [-2, 0]), ([0], [0, 2]), ([2**62, 4], [0, 2])],
)
def test_offsets_that_do_not_match_the_shape_are_refused(read, shape, at):
    with pytest.raises(
        WeightsFileError, match=r"has unet\.a with data offsets that do not match its shape"
    ):
        read(file_of({"unet.a": {"dtype": "F16", "shape": shape, "data_offsets": at}}, b"xx"))


@pytest.mark.parametrize(
    "entry",
    [
        5,
        None,
        [],
        {},
        {"dtype": "F16", "shape": [1]},
        {"dtype": "F16", "data_offsets": [0, 2]},
        {"shape": [1], "data_offsets": [0, 2]},
        {**TWO_BYTES, "dtype": 16},
        {**TWO_BYTES, "shape": 1},
        {**TWO_BYTES, "shape": "1"},
        {**TWO_BYTES, "data_offsets": [0, 1, 2]},
        {**TWO_BYTES, "data_offsets": [0, 2.0]},
        {**TWO_BYTES, "data_offsets": "02"},
    ],
)
def test_an_invalid_tensor_entry_is_refused(read, entry):
    with pytest.raises(WeightsFileError, match=r"has a malformed entry for the tensor unet\.a"):
        read(file_of({"unet.a": entry}, b"xx"))


@pytest.mark.parametrize(
    "metadata", [{"step": 5}, {"a": None}, {"a": {"b": "c"}}, [], "text", 0, False]
)
def test_metadata_that_is_not_text_is_refused(read, metadata):
    with pytest.raises(WeightsFileError, match="has metadata that is not text"):
        read(file_of({"__metadata__": metadata, "a": TWO_BYTES}, b"xx"))


def test_metadata_that_is_null_is_empty(read):
    assert read(file_of({"__metadata__": None, "a": TWO_BYTES}, b"xx")).metadata == {}


def test_the_number_of_tensors_is_limited(read):
    entries = b",".join(b'"%d":0' % number for number in range(MAX_TENSORS + 1))
    with pytest.raises(
        WeightsFileError, match=f"claims {MAX_TENSORS + 1:,} tensors; at most {MAX_TENSORS:,} are"
    ):
        read(file_of(b"{" + entries + b"}"))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b",".join([b"[]"] * (MAX_BRACKETS + 1)) + b"]}",
        b'{"a":[' + b"[" * MAX_BRACKETS + b"]}",
        b'{"a":[' + b",".join([b"1"] * (MAX_COMMAS + 2)) + b"]}",
        b'{"__metadata__":{' + b",".join([b'"a":"b"'] * (MAX_COMMAS + 2)) + b"}}",
    ],
    ids=["lists", "nested", "numbers", "metadata"],
)
def test_headers_with_too_many_values_are_refused_before_parsing(read, header, monkeypatch):
    monkeypatch.setattr("json.loads", lambda *_args, **_options: pytest.fail("was parsed"))
    with pytest.raises(WeightsFileError, match="has more values in its header"):
        read(file_of(header))


def test_long_numbers_are_refused_before_conversion(read):
    shape = ",".join(["9" * 4_300] * 3)
    header = '{"a":{"dtype":"F32","shape":[' + shape + '],"data_offsets":[0,4]}}'
    with pytest.raises(WeightsFileError, match="has a number of 4,300 digits"):
        read(file_of(header.encode(), b"xxxx"))


def test_the_number_of_dimensions_is_limited(read):
    most = {"dtype": "F16", "shape": [1] * MAX_DIMENSIONS, "data_offsets": [0, 2]}
    assert read(file_of({"a": most}, b"xx")).tensors["a"].shape == (1,) * MAX_DIMENSIONS
    more = most | {"shape": [1] * (MAX_DIMENSIONS + 1)}
    with pytest.raises(WeightsFileError, match=f"with {MAX_DIMENSIONS + 1} dimensions"):
        read(file_of({"a": more}, b"xx"))


def test_lone_surrogates_in_texts_are_replaced(read):
    header = read(file_of({"__metadata__": {"\ud800k": "v\udfff"}, "\ud800": TWO_BYTES}, b"xx"))
    assert (header.metadata, list(header.tensors)) == ({"?k": "v?"}, ["?"])
    pair = file_of({"__metadata__": {"a": "\U0001f642"}, "a": TWO_BYTES}, b"xx")
    assert b"\\ud83d" in pair  # an emoji, as two escapes
    assert read(pair).metadata == {"a": "\U0001f642"}


# --- properties -----------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "F4"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON_VALUES,
    }
)
KEYS = st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=5)
ANY_BYTES = st.one_of(
    st.binary(max_size=700),
    st.builds(
        lambda start, rest: start + rest,
        st.sampled_from([b"<html", b"PK\x03\x04", b"\x80\x02", b"{"]),
        st.binary(),
    ),
    st.builds(file_of, st.binary(max_size=60), st.binary(max_size=20)),
    st.builds(file_of, JSON_VALUES, st.binary(max_size=20)),
    st.builds(
        file_of, st.dictionaries(KEYS, ENTRIES | JSON_VALUES, max_size=3), st.binary(max_size=40)
    ),
)


def header_or_refusal(path, content):
    """Return the header of `content`, or None if it is refused; other errors fail the test."""
    path.write_bytes(content)
    try:
        return read_file_header(path)
    except WeightsFileError:
        return None


@settings(max_examples=80, deadline=None)
@given(content=ANY_BYTES)
def test_arbitrary_bytes_are_read_or_refused(scratch, content):
    header = header_or_refusal(scratch, content)
    assert header is None or header.file_bytes == len(content)


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, len(SOUND) * 8 - 1), min_size=1, max_size=4, unique=True))
def test_a_valid_file_with_flipped_bits_is_read_or_refused(scratch, bits):
    damaged = bytearray(SOUND)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    header_or_refusal(scratch, bytes(damaged))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(SOUND) - 1))
def test_a_valid_file_that_is_truncated_anywhere_is_refused(scratch, length):
    assert header_or_refusal(scratch, SOUND[:length]) is None


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["float16", "bfloat16", "float32", "int64"]),
            st.lists(st.integers(0, 3), max_size=4),
        ),
        max_size=5,
    ),
    metadata=st.none()
    | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3),
)
def test_every_file_that_safetensors_writes_is_read(scratch, shapes, metadata):
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in shapes.items()
    }
    scratch.write_bytes(save(tensors, metadata))
    header = read_file_header(scratch)
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == (metadata or {})


def test_a_duplicate_among_many_keys_is_found_quickly(read):
    """Counting each key separately took minutes."""
    entries = ",".join(f'"k{number}":0' for number in range(40_000))
    with pytest.raises(WeightsFileError, match="has k7 twice"):
        read(file_of(f'{{{entries},"k7":0}}'.encode()))


def test_a_header_that_begins_with_a_space_is_refused(read):
    with pytest.raises(WeightsFileError, match="not a JSON object"):
        read(file_of(b" {}"))


def test_offsets_must_be_integers(read):
    with pytest.raises(WeightsFileError, match="damaged"):
        read(file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', b"x"))
