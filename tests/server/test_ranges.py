"""Parts of files over HTTP, which browsers request to seek in videos."""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from email.message import Message

import pytest
from tests.server.serve_support import Server
from tests.support import TINY_WAN21, WAN21_LORA

from fidelora.server.ranges import ranged_response

FILE = bytes(range(100))
ETAG = '"abc"'


def ask(**headers: str) -> tuple[int, bytes, Mapping[str, str]]:
    asked = {name.replace("_", "-"): value for name, value in headers.items()}
    response = ranged_response(FILE, asked, "video/mp4", {"ETag": ETAG})
    return response.status_code, bytes(response.body), response.headers


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [
        ("bytes=0-", 0, 100),
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=90-1000", 90, 100),
        ("Bytes=99-", 99, 100),
        ("bytes=-10", 90, 100),
        ("bytes=-1000", 0, 100),
    ],
)
def test_a_range_is_answered_with_that_part(value, start, stop):
    status, body, headers = ask(range=value)
    assert (status, body) == (206, FILE[start:stop])
    assert headers["content-range"] == f"bytes {start}-{stop - 1}/100"
    assert headers["content-length"] == str(stop - start)
    assert headers["content-type"] == "video/mp4"


@pytest.mark.parametrize("value", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_a_range_after_the_end_is_refused(value):
    status, body, headers = ask(range=value)
    assert (status, body, headers["content-range"]) == (416, b"", "bytes */100")


@pytest.mark.parametrize(
    "value", ["", "bytes=", "bytes=-", "bytes=5-4", "bytes=0-1,5-6", "lines=0-1", "bytes=a-b"]
)
def test_other_ranges_are_answered_with_the_file(value):
    status, body, headers = ask(range=value)
    assert (status, body, headers["accept-ranges"]) == (200, FILE, "bytes")


@pytest.mark.parametrize(
    ("condition", "status"), [(ETAG, 206), (f"W/{ETAG}", 200), ('"other"', 200), ("", 200)]
)
def test_if_range_must_be_the_etag(condition, status):
    assert ask(range="bytes=0-9", if_range=condition)[0] == status


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("ranges")
    (data / "loras").mkdir()
    shutil.copyfile(WAN21_LORA, data / "loras" / "wan.safetensors")
    made = Server(data, f"wan21_1b={TINY_WAN21}")
    yield made
    made.close()


def _titled(headers: Message) -> dict[str, str]:
    return {name.title(): value for name, value in headers.items()}


def request(
    url: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    asked = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read(), _titled(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), _titled(error.headers)


def test_parts_of_a_video_are_served(server):
    prompt = {"prompt": "a", "width": 64, "height": 64, "sample_steps": 1, "num_frames": 5}
    body = {"model": "wan21_1b", "loras": [{"path": "wan.safetensors"}], "prompts": [prompt]}
    request_id = server.ask(body | {"output_format": "webp"})
    assert server.wait(request_id, "succeeded", "failed")["status"] == "succeeded"
    (video,) = server.call(f"/v1/requests/{request_id}/result")["outputs"]["videos"]
    api = server.url + f"/v1/requests/{request_id}/images/0"
    status, content, headers = request(api)
    assert (status, headers["Accept-Ranges"]) == (200, "bytes")
    assert hashlib.sha256(content).hexdigest() == video["sha256"]
    status, part, headers = request(api, headers={"Range": "bytes=4-11"})
    assert (status, part) == (206, content[4:12])
    assert headers["Content-Range"] == f"bytes 4-11/{len(content)}"
    status, nothing, headers = request(api, "HEAD")
    assert (status, nothing) == (200, b"")
    assert headers["Content-Length"] == str(len(content))
    assert headers["Etag"] == f'"{video["sha256"]}"'
    assert request(api, headers={"Range": f"bytes={len(content)}-"})[0] == 416
