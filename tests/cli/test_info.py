"""`fidelora info`: what a bug report needs, without secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fidelora as package
from fidelora.cli import info


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDELORA_DATA_DIR", str(tmp_path / "data"))


def test_a_folder_without_permission_is_reported_and_not_an_error(monkeypatch):
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)
    found = info._folder(Path("/secret/loras"))
    assert found == {"path": "/secret/loras", "exists": None, "writable": False}
    assert info._shown(found) == "/secret/loras  (exists: -, writable: no)"


def test_the_object_has_versions_device_bases_and_folders(fidelora, tmp_path, monkeypatch):
    monkeypatch.setenv("FIDELORA_BASE_MODEL", "sd15=fidelora:miniature")
    (tmp_path / "data" / "loras").mkdir(parents=True)
    (tmp_path / "data" / "loras" / "a.safetensors").write_bytes(b"")
    code, out, err = fidelora("info", "--json", "--device", "cpu")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["versions"]["fidelora"] == package.__version__
    assert document["versions"]["torch"] == torch.__version__
    assert document["device"]["device"] == "cpu"
    assert document["device"]["threads"] == torch.get_num_threads()
    assert document["base_models"]["sd15"] == {
        "base": "fidelora:miniature",
        "on_this_machine": True,
    }
    assert document["base_models"]["sdxl"]["on_this_machine"] is False
    folder = document["folders"]["loras"]
    assert (folder["path"], folder["exists"], folder["writable"], folder["safetensors_files"]) == (
        str(tmp_path / "data" / "loras"),
        True,
        True,
        1,
    )
    images = document["folders"]["images"]
    assert (images["exists"], images["writable"]) == (False, True)
    assert list(tmp_path.iterdir()) == [tmp_path / "data"], "a file or folder was created"


def test_secrets_are_not_printed(fidelora, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    monkeypatch.setenv("FIDELORA_STORE_URL", "postgresql://me:hunter2@host/x")
    monkeypatch.setenv("FIDELORA_QUEUE_SIZE", "7")
    for arguments in (["--json"], []):
        code, out, err = fidelora("info", *arguments)
        assert code == 0
        assert "hunter2" not in out + err
    assert "FIDELORA_QUEUE_SIZE" in out
    assert "HF_TOKEN" in out


@pytest.mark.parametrize(
    ("arguments", "setting", "words"),
    [
        (["--device", "quantum"], "auto", "The device 'quantum' is not supported"),
        ([], "nonsense", "FIDELORA_DTYPE"),
    ],
)
def test_invalid_values_are_part_of_the_output(fidelora, monkeypatch, arguments, setting, words):
    monkeypatch.setenv("FIDELORA_DTYPE", setting)
    code, out, _ = fidelora("info", *arguments)
    assert code == 0
    assert words in out
    assert "versions" in out
