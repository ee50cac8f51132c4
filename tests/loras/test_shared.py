"""LoRAs that several servers and workers share through a bucket."""

from __future__ import annotations

import io
from datetime import timedelta
from pathlib import Path

import pytest
from tests.support import LORA

from fidelora.adapters.library import AdapterLibrary
from fidelora.errors import (
    AdapterChangedError,
    AdapterExistsError,
    AdapterNotFoundError,
    StorageError,
    UploadNotFoundError,
)
from fidelora.loras.cache import AdapterCache
from fidelora.loras.folder import adapter_names
from fidelora.loras.shared import SharedAdapters, SharedLoras
from fidelora.loras.upload_folder import UploadFolder
from fidelora.loras.uploads import UploadQuota
from fidelora.recipe import AdapterRef, file_sha256
from fidelora.storage.bucket import Bucket

CONTENT = LORA.read_bytes()
SHA256 = file_sha256(LORA)


@pytest.fixture
def bucket(bucket_url: str) -> Bucket:
    return Bucket(f"{bucket_url}/fidelora")


def server(bucket: Bucket, folder: Path) -> UploadFolder:
    (folder / "uploads").mkdir(parents=True)
    return UploadFolder(folder, UploadQuota(folder, 2**30), SharedLoras(bucket, folder))


def test_a_worker_fetches_what_a_server_has_published(bucket, tmp_path):
    cache = AdapterCache(tmp_path / "server", 2**30, SharedAdapters(bucket))
    ref = cache.add(LORA, LORA.name)
    cache.publish(ref.sha256)
    (tmp_path / "worker").mkdir()
    library = AdapterLibrary(folder=tmp_path / "worker", fetch=SharedAdapters(bucket).fetch)
    assert library.get(AdapterRef(ref.sha256)).sha256 == SHA256
    assert (tmp_path / "worker" / f"{SHA256}.safetensors").read_bytes() == CONTENT
    bucket.delete([f"adapters/{SHA256}.safetensors"])
    assert library.get(AdapterRef(ref.sha256)).sha256 == SHA256
    other = AdapterLibrary(folder=tmp_path / "worker", fetch=SharedAdapters(bucket).fetch)
    assert other.get(AdapterRef(ref.sha256)).sha256 == SHA256  # from the machine's folder


def test_an_adapter_that_exists_nowhere_is_reported(bucket, tmp_path):
    library = AdapterLibrary(folder=tmp_path, fetch=SharedAdapters(bucket).fetch)
    with pytest.raises(AdapterNotFoundError, match="does not exist"):
        library.get(AdapterRef("0" * 64))
    cache = AdapterCache(tmp_path, 2**30, SharedAdapters(bucket))
    assert cache.find("0" * 64) is None


def test_a_server_finds_the_adapters_of_another(bucket, tmp_path):
    first = AdapterCache(tmp_path / "first", 2**30, SharedAdapters(bucket))
    second = AdapterCache(tmp_path / "second", 2**30, SharedAdapters(bucket))
    first.add(LORA, LORA.name)
    assert second.find(SHA256) is None
    first.publish(SHA256)
    assert second.find(SHA256) is not None


def test_another_content_under_the_hash_is_refused(bucket, tmp_path):
    bucket.put(f"adapters/{SHA256}.safetensors", CONTENT + b"x")
    with pytest.raises(AdapterChangedError, match="Delete it; the server stores it again"):
        SharedAdapters(bucket).fetch(SHA256, tmp_path / "file")
    assert not list(tmp_path.glob("file")) + list(tmp_path.glob("*.part"))


def test_old_adapters_without_jobs_are_removed(bucket, tmp_path):
    old = SharedAdapters(bucket, timedelta(0))
    old.publish(SHA256, LORA)
    assert SharedAdapters(bucket).trim(lambda _: False) == []
    assert old.trim(lambda sha256: sha256 == SHA256) == []
    assert old.trim(lambda _: False) == [SHA256]
    assert not list(bucket.list("adapters"))


def test_an_adapter_is_stored_again_before_it_is_too_old(bucket, tmp_path):
    key = f"adapters/{SHA256}.safetensors"
    bucket.put(key, b"stored before")
    SharedAdapters(bucket).publish(SHA256, LORA)
    assert bucket.get(key) == b"stored before"
    SharedAdapters(bucket, timedelta(0)).publish(SHA256, LORA)
    assert bucket.get(key) == CONTENT


def test_servers_have_the_same_uploads(bucket, tmp_path):
    first, second = server(bucket, tmp_path / "1"), server(bucket, tmp_path / "2")
    owner = "0123456789abcdef"
    name, is_new = first.add(io.BytesIO(CONTENT), "a b.safetensors", owner)
    assert (name, is_new) == (f"uploads/key-{owner}/a b.safetensors", True)
    assert second.add(io.BytesIO(CONTENT), "a b.safetensors", owner) == (name, False)
    with pytest.raises(AdapterExistsError, match="Another LoRA is called a b"):
        second.add(io.BytesIO(_other()), "a b.safetensors", owner)
    assert adapter_names(tmp_path / "2", owner=owner) == [name]
    second.remove(second.find(name, owner))
    assert adapter_names(tmp_path / "2", owner=owner) == []
    first.refresh()
    assert adapter_names(tmp_path / "1", owner=owner) == []
    with pytest.raises(UploadNotFoundError):
        first.find(name, owner)


def test_an_upload_can_be_found_right_after_it_was_made_elsewhere(bucket, tmp_path):
    first, second = server(bucket, tmp_path / "1"), server(bucket, tmp_path / "2")
    first.add(io.BytesIO(CONTENT), "x.safetensors")
    assert second.find("x.safetensors").read_bytes() == CONTENT


def test_the_first_of_two_uploads_at_the_same_time_wins(bucket, tmp_path, monkeypatch):
    first, second = server(bucket, tmp_path / "1"), server(bucket, tmp_path / "2")
    shared = second._shared
    assert shared is not None
    publish = shared.publish

    def late(path):
        first.add(io.BytesIO(CONTENT), "x.safetensors")
        monkeypatch.setattr(shared, "publish", publish)
        return publish(path)

    monkeypatch.setattr(shared, "publish", late)
    with pytest.raises(AdapterExistsError):
        second.add(io.BytesIO(_other()), "x.safetensors")
    assert (tmp_path / "2" / "uploads" / "x.safetensors").read_bytes() == CONTENT


def test_files_that_an_operator_puts_into_the_bucket_are_used(bucket, tmp_path):
    uploads = server(bucket, tmp_path / "1")
    (tmp_path / "1" / "local.safetensors").write_bytes(CONTENT)
    bucket.put("loras/styles/ink.safetensors", CONTENT)
    bucket.put("loras/readme.txt", b"")
    bucket.put("loras/.hidden.safetensors", CONTENT)
    bucket.put("loras/a/.b/c.safetensors", CONTENT)
    uploads.refresh()
    expected = ["local.safetensors", "styles/ink.safetensors"]
    assert adapter_names(tmp_path / "1") == expected
    bucket.put("loras/styles/ink.safetensors", _other())
    uploads.refresh()
    assert (tmp_path / "1" / "styles" / "ink.safetensors").read_bytes() == _other()
    (tmp_path / "1" / "styles" / "ink.safetensors").unlink()
    uploads.refresh()  # a lost copy is restored
    assert adapter_names(tmp_path / "1") == expected
    bucket.delete(["loras/styles/ink.safetensors"])
    uploads.refresh()
    assert adapter_names(tmp_path / "1") == ["local.safetensors"]


def test_objects_whose_names_no_file_can_have_are_left_out(bucket, tmp_path, caplog):
    """A single object must not keep servers from starting and requests from their LoRAs."""
    for name in ("a.safetensors", "a.safetensors/b.safetensors", "z.safetensors"):
        bucket.put(f"loras/{name}", CONTENT)
    for part in ("n" * 250, "\u00e4" * 125):
        bucket.put(f"loras/{part}.safetensors", CONTENT)
        bucket.put(f"loras/{part}safetensors/x.safetensors", CONTENT)
    uploads = server(bucket, tmp_path / "1")
    for _ in range(2):
        uploads.refresh()
        assert adapter_names(tmp_path / "1") == ["a.safetensors", "z.safetensors"]
    assert caplog.text.count("a.safetensors/b.safetensors") == 1


def test_a_restarted_server_removes_copies_of_deleted_uploads(bucket, tmp_path, monkeypatch):
    server(bucket, tmp_path / "1").add(io.BytesIO(CONTENT), "x.safetensors")
    restarted = UploadFolder(tmp_path / "1", None, SharedLoras(bucket, tmp_path / "1"))
    monkeypatch.setattr(bucket, "download", None)  # copies that exist are not downloaded again
    restarted.refresh()
    bucket.delete(["loras/uploads/x.safetensors"])
    restarted.refresh()
    assert adapter_names(tmp_path / "1") == []


def test_an_upload_that_cannot_be_shared_is_not_stored(own_object_store, tmp_path, monkeypatch):
    bucket = Bucket(own_object_store.make_bucket("bucket"))
    uploads = server(bucket, tmp_path)

    def fail(*_args, **_options):
        raise StorageError("full")

    monkeypatch.setattr(bucket, "put_file", fail)
    with pytest.raises(StorageError):
        uploads.add(io.BytesIO(CONTENT), "x.safetensors")
    assert adapter_names(tmp_path) == []
    monkeypatch.undo()
    uploads.add(io.BytesIO(CONTENT), "x.safetensors")
    monkeypatch.setattr(bucket, "delete", fail)
    with pytest.raises(StorageError):
        uploads.remove(uploads.find("x.safetensors"))
    assert adapter_names(tmp_path) == ["uploads/x.safetensors"]


def test_a_resolver_refreshes_the_folder_before_it_refuses_a_name(bucket, tmp_path):
    import asyncio

    from fidelora.loras.download import DownloadRules
    from fidelora.loras.resolve import AdapterResolver

    first = server(bucket, tmp_path / "1")
    server(bucket, tmp_path / "2")
    resolver = AdapterResolver(
        tmp_path / "2",
        AdapterCache(tmp_path / "cache", 2**30),
        DownloadRules(hosts=frozenset(), max_bytes=1, timeout_s=1),
        shared=SharedLoras(bucket, tmp_path / "2"),
    )
    name, _ = first.add(io.BytesIO(CONTENT), "x.safetensors")
    assert asyncio.run(resolver.resolve(name, owner=None)).sha256 == SHA256
    with pytest.raises(AdapterNotFoundError):
        asyncio.run(resolver.resolve("y.safetensors", owner=None))


def _other() -> bytes:
    """Return a valid adapter with another content."""
    import safetensors.torch

    tensors = safetensors.torch.load(CONTENT)
    return safetensors.torch.save({key: tensor + 1 for key, tensor in tensors.items()})
