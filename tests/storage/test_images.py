"""Where images are kept: the same contract for a folder and a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from fidelora.errors import StorageError
from fidelora.storage.images import FolderImages, ImageStore, image_store


@pytest.fixture(params=["folder", "bucket"])
def images(request, tmp_path: Path) -> ImageStore:
    url = "" if request.param == "folder" else request.getfixturevalue("bucket_url")
    return image_store(tmp_path, f"{url}/prefix" if url else "")


def test_images_are_written_read_and_removed(images, tmp_path):
    first = images.write("job_output_0.png", b"one")
    second = images.write("job_output_1.png", b"two")
    assert first == images.location("job_output_0.png")
    assert Path(first).name == "job_output_0.png"
    assert [images.read(first), images.read(second)] == [b"one", b"two"]
    assert images.write("job_output_0.png", b"new") == first
    assert images.read(first) == b"new"
    images.remove([first, first])
    assert images.read(first) is None
    assert images.read(second) == b"two"
    images.remove([second])
    images.remove([])


def test_a_check_leaves_nothing_behind(images, tmp_path, request):
    images.check()
    assert not list(tmp_path.iterdir())
    if "bucket" in request.node.name:
        assert not list(images._bucket.list(""))


def test_images_from_before_the_bucket_are_found(bucket_url, tmp_path):
    old = FolderImages(tmp_path).write("old.png", b"old")
    images = image_store(tmp_path, bucket_url)
    assert images.read(old) == b"old"
    images.remove([old, images.write("new.png", b"new")])
    assert images.read(old) is None
    assert images.read(images.location("new.png")) is None


def test_images_in_other_buckets_are_left_alone(bucket_url, tmp_path):
    inside, outside = image_store(tmp_path, f"{bucket_url}/a"), image_store(tmp_path, bucket_url)
    location = outside.write("x.png", b"x")
    assert inside.read(location) is None
    inside.remove([location])
    assert outside.read(location) == b"x"


def test_a_folder_that_is_gone_cannot_be_used(tmp_path):
    images = FolderImages(tmp_path / "missing")
    with pytest.raises(StorageError, match="could not be written"):
        images.check()
    assert images.read(images.location("x.png")) is None


def test_a_file_that_cannot_be_removed_does_not_keep_the_others(tmp_path):
    (tmp_path / "folder.png").mkdir()  # unlink fails for it
    images = FolderImages(tmp_path)
    other = images.write("other.png", b"x")
    with pytest.raises(StorageError, match="could not be removed"):
        images.remove([images.location("folder.png"), other])
    assert images.read(other) is None
