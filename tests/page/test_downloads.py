"""Download of all images of the gallery as a zip."""

from __future__ import annotations

import html
import io
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from tests.server.http_support import ManualWorker, context_in, now

from fidelora.jobs.job import new_job
from fidelora.recipe import Recipe
from fidelora.server.app import make_app
from fidelora.server.page.downloads import download_link


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return context_in(tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def client(context):
    app = make_app(context, with_page=True)
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)) as client:
        yield client


def finished_job(context, content):
    context.store.add(new_job((Recipe(prompt="a"),), now()))
    worker = ManualWorker(context)
    return worker.succeed(worker.claim(), content)


def test_the_zip_contains_the_images_that_still_exist(client, context):
    first, second, removed = (finished_job(context, text) for text in (b"one", b"two", b"three"))
    Path(removed.outputs[0].file_path).unlink()
    images = [(job.id, 0) for job in (first, second, removed, first)]
    link = download_link([*images, ("gone", 0), (first.id, 1)])
    address = re.search(r'href="\.(/[^"]*)"', link)
    assert address
    answer = client.get(html.unescape(address[1]))
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="fidelora-images.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == {
            Path(job.outputs[0].file_path).name: content
            for job, content in ((first, b"one"), (second, b"two"))
        }
    assert list((context.settings.data_dir / "page" / "files").glob("**/*.zip")) == []


def test_the_zip_has_no_images_of_another_key(client, context):
    mine, other = (finished_job(context, text) for text in (b"mine", b"other"))
    link = html.unescape(download_link([(mine.id, 0), (other.id, 0)]))
    key = context.keys.add("alice")
    me = context.keys.find(key).id
    context.store.change(mine.id, lambda job, _: replace(job, owner=me, version=job.version + 1))
    try:
        answer = client.get(
            link.split('"')[1].removeprefix("."), headers={"Authorization": f"Bearer {key}"}
        )
    finally:
        context.keys.remove("alice")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        assert [packed.read(name) for name in packed.namelist()] == [b"mine"]


@pytest.mark.parametrize("query", ["", "?image=gone.0", "?image=.", "?image=a.-1", "?image=%ff.٣"])
def test_a_zip_without_images_is_not_found(client, context, query):
    answer = client.get(f"/images.zip{query}")
    assert answer.status_code == 404
    assert "None of these images" in answer.text


def test_a_link_names_the_number_of_images():
    assert download_link([]) == ""
    assert "Download the image" in download_link([("a", 0)])
    assert "Download all 2 images" in download_link([("a", 0), ("a", 1)])
