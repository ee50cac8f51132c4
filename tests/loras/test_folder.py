"""Names of adapters from requests never lead out of the adapter folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support import LORA, save_adapter

from fidelora.adapter_file import EMPTY_SHA256
from fidelora.errors import AdapterError, AdapterNameError, AdapterNotFoundError
from fidelora.loras.folder import adapter_named_in_prompt, adapter_path, names_in_prompts
from fidelora.recipe import file_sha256
from fidelora.safetensors_header import read_file_header


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "adapters" / "job").mkdir(parents=True)
    (tmp_path / "adapters" / "job" / "sks.safetensors").write_bytes(b"x")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "adapters-of-others").mkdir()
    (tmp_path / "adapters-of-others" / "x.safetensors").write_bytes(b"x")
    return tmp_path / "adapters"


def test_a_prompt_can_name_a_file_by_the_digits_of_its_hash(tmp_path):
    (tmp_path / "people").mkdir()
    path = Path(shutil.copyfile(LORA, tmp_path / "people" / "a b.safetensors"))
    sha256 = file_sha256(path)
    for name in (sha256, sha256[:10], sha256[:12].upper()):
        found = adapter_named_in_prompt(tmp_path, name, file_sha256)
        assert found == "people/a b.safetensors"
    for name in (sha256[:9], "0" * 12, sha256 + "0"):
        with pytest.raises(AdapterNotFoundError):
            adapter_named_in_prompt(tmp_path, name, file_sha256)
    with pytest.raises(AdapterNotFoundError):
        adapter_named_in_prompt(tmp_path, sha256)


def test_a_prompt_can_name_a_file_by_the_hash_in_its_metadata(tmp_path):
    path = Path(shutil.copyfile(LORA, tmp_path / "renamed.safetensors"))
    stored = read_file_header(path).metadata["sshs_model_hash"]
    for name in (stored, stored[:10], stored[:12].upper()):
        assert adapter_named_in_prompt(tmp_path, name, file_sha256) == path.name
    # Older versions of the trainer store the hash of an empty file.
    old = {"sshs_model_hash": EMPTY_SHA256}
    save_adapter(tmp_path / "old.safetensors", {"x": torch.zeros(1)}, **old)
    for name in (stored[:9], EMPTY_SHA256, EMPTY_SHA256[:12]):
        with pytest.raises(AdapterNotFoundError):
            adapter_named_in_prompt(tmp_path, name, file_sha256)


def test_a_file_below_the_folder_is_found(root):
    expected = root / "job" / "sks.safetensors"
    for name in ("job/sks.safetensors", "./job//sks.safetensors", str(expected)):
        assert adapter_path(root, name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "job/../../secret.safetensors", "job/../job/sks.safetensors",
        "/etc/passwd", "/etc/x.safetensors", "", "\0.safetensors", "job", "job/sks", "job/sks.ckpt",
        ".", "/", "../adapters-of-others/x.safetensors",
    ],
)  # fmt: skip
def test_names_outside_the_folder_are_refused(root, name):
    with pytest.raises(AdapterNameError):
        adapter_path(root, name)


def test_an_absolute_path_outside_is_refused_even_if_missing(root):
    for place in (root.parent / "secret.safetensors", root.parent / "absent.safetensors"):
        with pytest.raises(AdapterNameError, match="outside of the adapter folder"):
            adapter_path(root, str(place))


def test_a_folder_whose_name_has_the_same_prefix_is_outside(root):
    with pytest.raises(AdapterNameError, match="outside of the adapter folder"):
        adapter_path(root, str(root.parent / "adapters-of-others" / "x.safetensors"))


def test_links_out_of_the_folder_are_refused_and_links_inside_are_followed(root):
    (root / "out.safetensors").symlink_to(root.parent / "secret.safetensors")
    (root / "elsewhere").symlink_to(root.parent, target_is_directory=True)
    (root / "in.safetensors").symlink_to(root / "job" / "sks.safetensors")
    for name in ("out.safetensors", "elsewhere/secret.safetensors"):
        with pytest.raises(AdapterNameError, match="outside of the adapter folder"):
            adapter_path(root, name)
    assert adapter_path(root, "in.safetensors") == root / "job" / "sks.safetensors"


def test_the_adapter_folder_can_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert (
        adapter_path(tmp_path / "link", "job/sks.safetensors") == root / "job" / "sks.safetensors"
    )


@pytest.mark.parametrize(
    "name",
    [
        "absent.safetensors",
        "job/absent.safetensors",
        "x" * 300 + ".safetensors",
        "job.safetensors/a.safetensors",
    ],
)
def test_a_missing_file_is_an_error(root, name):
    with pytest.raises(AdapterNotFoundError):
        adapter_path(root, name)


def test_folders_and_pipes_are_refused(root):
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "pipe.safetensors")
    for name in ("folder.safetensors", "pipe.safetensors"):
        with pytest.raises(AdapterNotFoundError):
            adapter_path(root, name)


@given(
    parts=st.lists(
        st.sampled_from(
            [
                "..",
                ".",
                "/",
                "job",
                "sks.safetensors",
                "~",
                "secret.safetensors",
                "\\",
                "adapters",
                "x\0",
            ]
        ),
        max_size=7,
    )
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out_of_the_folder(root, parts):
    try:
        path = adapter_path(root, "/".join(parts))
    except AdapterError:
        return
    assert path.is_relative_to(root.resolve())
    assert path.is_file()


def test_prompts_name_files_without_folder_and_extension(root):
    (root / "other").mkdir()
    (root / "other" / "style.SAFETENSORS").write_bytes(b"x")
    assert names_in_prompts(root) == {
        "sks": "job/sks.safetensors",
        "style": "other/style.SAFETENSORS",
    }
    (root / "other" / "sks.safetensors").write_bytes(b"x")
    names = names_in_prompts(root)
    assert names == {
        "job/sks": "job/sks.safetensors",
        "other/sks": "other/sks.safetensors",
        "style": "other/style.SAFETENSORS",
    }
    assert all(adapter_named_in_prompt(root, name) == path for name, path in names.items())
    with pytest.raises(
        AdapterNameError,
        match="Several adapters are called 'sks'; use one of the names job/sks, other/sks",
    ):
        adapter_named_in_prompt(root, "sks")


def test_prompts_name_renamed_files_by_their_alias(root):
    """The web UI writes the alias into prompts, and people rename files."""
    for name in ("renamed", "copy"):
        shutil.copyfile(LORA, root / f"{name}.safetensors")
    with pytest.raises(AdapterNameError, match="use one of the names copy, renamed"):
        adapter_named_in_prompt(root, "lora_linear_f32")
    (root / "copy.safetensors").unlink()
    assert adapter_named_in_prompt(root, "lora_linear_f32") == "renamed.safetensors"
    shutil.copyfile(LORA, root / "lora_linear_f32.safetensors")  # a file's name has precedence
    assert adapter_named_in_prompt(root, "lora_linear_f32") == "lora_linear_f32.safetensors"


def test_prompts_name_files_with_characters_of_tags(root):
    (root / "a<b:c>.safetensors").write_bytes(b"x")
    assert names_in_prompts(root)["a_b_c_"] == "a<b:c>.safetensors"
    assert adapter_named_in_prompt(root, "a_b_c_") == "a<b:c>.safetensors"


@pytest.mark.parametrize(
    "name", ["none", "", "../secret", "/etc/passwd", "job/../job/sks", "*", "sks.safetensors"]
)
def test_other_names_in_prompts_are_refused(root, name):
    with pytest.raises(AdapterNotFoundError):
        adapter_named_in_prompt(root, name)
