"""The quota of uploads over HTTP and on the page."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.http_support import client_of, context_in
from tests.support import LORA

from fidelora.errors import UploadQuotaError
from fidelora.server.access import Caller
from fidelora.server.page.uploads import add_lora
from fidelora.server.page.visitor import acting_for

GIB = 2**30
SIZE = LORA.stat().st_size


def upload(client: Any, name: str, key: dict[str, str]) -> Any:
    return client.post("/v1/loras", files={"file": (name, LORA.read_bytes())}, headers=key)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"uploads_gb": 1.5 * SIZE / GIB}, "FIDELORA_UPLOADS_GB"),
        ({"uploads_per_key_gb": 1.5 * SIZE / GIB}, "FIDELORA_UPLOADS_PER_KEY_GB"),
    ],
)
def test_an_upload_over_the_quota_is_refused(tmp_path, settings, named):
    context = context_in(tmp_path, **settings)
    secret = context.keys.add("alice")
    key = {"Authorization": f"Bearer {secret}"}
    with client_of(context) as client:
        assert upload(client, "one.safetensors", key).status_code == 201
        refused = upload(client, "two.safetensors", key)
        assert refused.status_code == 507
        error = refused.json()["detail"]["error"]
        assert error["code"] == "UPLOAD_QUOTA"
        assert named in error["message"]
        file = tmp_path / "three.safetensors"
        file.write_bytes(LORA.read_bytes())
        alice = context.keys.find(secret)
        assert alice is not None
        with (
            acting_for(Caller(alice.id, is_admin=False)),
            pytest.raises(UploadQuotaError, match=named),
        ):
            add_lora(context, file)
        assert client.delete("/v1/loras/one.safetensors", headers=key).status_code == 204
        assert upload(client, "two.safetensors", key).status_code == 201


def test_by_default_only_the_total_is_limited(tmp_path):
    settings = context_in(tmp_path).settings
    assert (settings.uploads_gb, settings.uploads_per_key_gb) == (50, None)
