"""The disk space of uploads: in total, for each key, and of uploads at the same time."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support import GOLDEN_JOBS, LORA

from fidelora.errors import AdapterExistsError, FideloraError, UploadQuotaError
from fidelora.loras.uploads import UploadQuota, add_upload, upload_folders

CONTENT = LORA.read_bytes()
SIZE = len(CONTENT)
A, B = "a" * 16, "b" * 16


def add(root, quota, name, owner="", content=CONTENT):
    return add_upload(root, io.BytesIO(content), f"{name}.safetensors", owner, quota)


def files(root):
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_the_total_counts_the_uploads_of_all_keys(tmp_path):
    quota = UploadQuota(tmp_path, 3 * SIZE)
    for name, owner in (("one", ""), ("two", A), ("three", B)):
        add(tmp_path, quota, name, owner)
    for owner in ("", A, B):
        with pytest.raises(UploadQuotaError, match=r"of this server .* FIDELORA_UPLOADS_GB"):
            add(tmp_path, quota, "four", owner)
    assert files(tmp_path) == ["one.safetensors", "three.safetensors", "two.safetensors"]
    (folder,) = [one for one in upload_folders(tmp_path) if one.name == f"key-{A}"]
    (folder / "two.safetensors").unlink()
    assert add(tmp_path, quota, "four", B)[1]


def test_the_quota_of_a_key_counts_its_own_uploads(tmp_path):
    quota = UploadQuota(tmp_path, 10 * SIZE, SIZE)
    add(tmp_path, quota, "one", A)
    add(tmp_path, quota, "one", B)
    with pytest.raises(UploadQuotaError, match=r"of this API key .* FIDELORA_UPLOADS_PER_KEY_GB"):
        add(tmp_path, quota, "two", A)
    for name in ("one", "two", "three"):  # without a key, only the total counts
        add(tmp_path, quota, name)


def test_the_same_upload_again_needs_no_space(tmp_path):
    quota = UploadQuota(tmp_path, SIZE)
    assert add(tmp_path, quota, "one") == ("uploads/one.safetensors", True)
    assert add(tmp_path, quota, "one") == ("uploads/one.safetensors", False)
    other = (GOLDEN_JOBS / "lokr_full" / "lokr_full.safetensors").read_bytes()
    with pytest.raises(AdapterExistsError):
        add(tmp_path, quota, "one", content=other)


def test_uploads_at_the_same_time_cannot_exceed_the_quota(tmp_path):
    quota, together = UploadQuota(tmp_path, 3 * SIZE), threading.Barrier(8)

    class Slow(io.BytesIO):
        """A file whose contents arrive when all uploads have begun, or were refused."""

        def read(self, size=-1, /):
            if self.tell() == 0:
                arrived.wait(60)
            return super().read(size)

    arrived = threading.Event()
    refused = []

    def upload(number):
        together.wait(60)
        try:
            name = f"{number}.safetensors"
            return add_upload(tmp_path, Slow(CONTENT), name, A, quota)[1]
        except UploadQuotaError:
            refused.append(number)
            if len(refused) == 5:
                arrived.set()
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(upload, range(8))) == 3
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("content", [b"", b"<html>", CONTENT[:-1]])
def test_a_refused_upload_gives_its_space_back(tmp_path, content):
    quota = UploadQuota(tmp_path, SIZE)
    for _ in range(3):
        with pytest.raises(FideloraError, match="broken"):
            add(tmp_path, quota, "broken", content=content)
    assert add(tmp_path, quota, "one")[1]
    assert files(tmp_path) == ["one.safetensors"]


def test_files_of_the_operator_are_not_counted(tmp_path):
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "one.safetensors").write_bytes(CONTENT)
    assert add(tmp_path, UploadQuota(tmp_path, SIZE), "two")[1]
