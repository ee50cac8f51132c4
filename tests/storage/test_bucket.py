"""A bucket of a real S3 server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from tests.object_store import ObjectStore

from fidelora.errors import SettingsError, StorageError
from fidelora.storage import bucket as bucket_module
from fidelora.storage.bucket import Bucket, bucket_and_prefix


def test_objects_are_stored_under_the_prefix(bucket_url, object_store_server):
    first, second = Bucket(f"{bucket_url}/one/"), Bucket(f"{bucket_url}/two")
    first.put("outputs/a b.png", b"first")
    assert first.get("outputs/a b.png") == b"first"
    assert second.get("outputs/a b.png") is None
    assert [one.key for one in Bucket(bucket_url).list("")] == ["one/outputs/a b.png"]
    stored = first.head("outputs/a b.png")
    assert stored is not None
    assert stored.size == 5
    first.put("outputs/a b.png", b"other")
    assert first.get("outputs/a b.png") == b"other"
    changed = first.head("outputs/a b.png")
    assert changed is not None
    assert changed.tag != stored.tag
    first.delete(["outputs/a b.png", "outputs/missing"])
    assert first.get("outputs/a b.png") is None
    assert first.head("outputs/a b.png") is None
    first.check()


@pytest.mark.parametrize("size", [0, 5, 17 * 2**20])
def test_files_keep_their_content(bucket_url, tmp_path, size):
    """The largest one is stored in parts, and read in ranges."""
    content = os.urandom(size)
    file, copy = tmp_path / "file", tmp_path / "copy"
    file.write_bytes(content)
    bucket = Bucket(bucket_url)
    assert bucket.put_file("adapters/x", file)
    assert bucket.download("adapters/x", copy) == hashlib.sha256(content).hexdigest()
    assert copy.read_bytes() == content
    assert bucket.download("adapters/y", copy) is None


@pytest.mark.parametrize("size", [5, 17 * 2**20])
def test_an_object_is_replaced_only_on_request(bucket_url, tmp_path, size):
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    bucket = Bucket(bucket_url)
    assert bucket.put_file("x", file, replace=False)
    assert not bucket.put_file("x", file, replace=False)
    assert bucket.put_file("x", file)


def test_more_objects_than_fit_on_a_page_are_listed_and_deleted(bucket_url):
    bucket = Bucket(bucket_url)
    for number in range(1005):
        bucket.put(f"many/{number}", b"")
    keys = [one.key for one in bucket.list("many")]
    assert len(set(keys)) == 1005
    bucket.delete(keys)
    assert not list(bucket.list("many"))


def test_an_object_that_changes_while_it_is_read_is_refused(bucket_url, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_module, "_CHUNK_BYTES", 4)
    bucket = Bucket(bucket_url)
    bucket.put("x", b"12345678")
    find = bucket.head
    calls: list[str] = []

    def head(key):
        found = find(key)
        if not calls:
            bucket.put("x", b"abcdefgh")
        calls.append(key)
        return found

    monkeypatch.setattr(bucket, "head", head)
    with pytest.raises(StorageError, match="x was replaced while it was read; try again"):
        bucket.download("x", tmp_path / "copy")


def test_a_missing_bucket_is_named(object_store_server):
    bucket = Bucket("s3://no-such-bucket")
    with pytest.raises(StorageError, match="the bucket does not exist; check FIDELORA_OBJECT"):
        bucket.check()
    for use in (lambda: bucket.put("x", b""), lambda: bucket.get("x")):
        with pytest.raises(StorageError, match="the bucket does not exist"):
            use()


def test_an_unreachable_server_is_reported_without_its_address(
    own_object_store: ObjectStore, monkeypatch
):
    monkeypatch.setattr(bucket_module, "_RETRIES", 0)
    bucket = Bucket(own_object_store.make_bucket("bucket"))
    own_object_store.stop()
    with pytest.raises(StorageError, match="it does not answer; check AWS_ENDPOINT_URL") as caught:
        bucket.put("x", b"")
    assert "127.0.0.1" not in str(caught.value)


def test_a_server_that_stops_answering_is_given_up(own_object_store, monkeypatch):
    monkeypatch.setattr(bucket_module, "_RETRIES", 0)
    monkeypatch.setattr(bucket_module, "_TIMEOUT_S", 1)
    bucket = Bucket(own_object_store.make_bucket("bucket"))
    bucket.put("x", b"1")
    own_object_store.pause()
    with pytest.raises(StorageError, match="it does not answer"):
        bucket.get("x")
    own_object_store.resume()
    assert bucket.get("x") == b"1"


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://my.bucket-1/a/b/", ("my.bucket-1", "a/b")),
    ],
)
def test_the_url_of_a_bucket_contains_its_name_and_a_prefix(url, parts):
    assert bucket_and_prefix(url) == parts


@pytest.mark.parametrize(
    "url", ["", "bucket", "s3://", "s3:///a", "https://a/b", "s3://Bucket", "s3://a/b?c", "s3://a"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(SettingsError, match=r"is not the URL of a bucket; write s3://BUCKET or"):
        bucket_and_prefix(url)


def test_a_file_that_cannot_be_written_is_reported(bucket_url, tmp_path: Path):
    bucket = Bucket(bucket_url)
    bucket.put("x", b"1")
    with pytest.raises(StorageError, match="copy could not be written: No such file"):
        bucket.download("x", tmp_path / "missing" / "copy")
    with pytest.raises(StorageError, match="file could not be read: No such file"):
        bucket.put_file("x", tmp_path / "file")
