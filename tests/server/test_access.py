"""Who may call the server: API keys, host names, addresses and origins."""

from __future__ import annotations

import pytest
from tests.server.http_support import MINIMAL, client_of, context_in, error, submit

SECRET = "hf_do_not_tell"


def test_with_a_key_all_but_the_probes_need_one(client, context):
    submit(client)
    key = context.keys.add("a client")
    assert key not in (context.settings.data_dir / "api_keys.json").read_text()
    for path in ("/v1/models", "/v1/requests", "/v1/loras", "/metrics"):
        answer = client.get(path)
        assert error(answer) == (401, "UNAUTHORIZED")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for wrong in (f"Bearer {key}x", f"Basic {key}", key, "Bearer", "Bearer \xff"):
            assert (
                client.get(path, headers={"Authorization": wrong.encode("latin-1")}).status_code
                == 401
            )
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    context.keys.remove("a client")
    assert client.get("/v1/models").status_code == 200


def test_idempotency_keys_are_scoped_to_api_keys(client, context):
    keys = [
        {"Authorization": f"Bearer {context.keys.add(name)}", "Idempotency-Key": "same"}
        for name in ("one", "two")
    ]
    assert submit(client, **keys[0]) != submit(client, **keys[1])
    assert submit(client, **keys[0]) == submit(client, **keys[0])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_without_keys_other_hostnames_are_rejected(client, host):
    assert error(client.get("/v1/models", headers={"Host": host})) == (400, "HOST_NOT_ALLOWED")


def test_the_name_of_this_machine_in_a_container_is_explained(client):
    answer = client.get("/v1/models", headers={"Host": "host.docker.internal:8000"})
    assert error(answer) == (400, "HOST_NOT_ALLOWED")
    assert "Programs in a container use that name for this machine" in answer.text


@pytest.mark.parametrize("peer", ["192.0.2.7", "10.0.0.1", "::ffff:192.0.2.7", "2001:db8::1", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_keys_other_machines_are_refused(context, peer, method):
    """This holds after the last key was removed, too, and the headers make no difference."""
    client = client_of(context, client=(peer, 50000))
    key = context.keys.add("one")
    bearer = {"Authorization": f"Bearer {key}"}
    assert client.get("/v1/models", headers=bearer).status_code == 200
    context.keys.remove("one")
    headers = {**bearer, "Host": "localhost", "X-Forwarded-For": "127.0.0.1"}
    answer = client.request(method, "/v1/models", headers=headers)
    assert error(answer) == (403, "CALLER_NOT_ALLOWED")
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_keys_this_machine_is_served(context, peer):
    assert client_of(context, client=(peer, 1)).get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"]
)
def test_without_keys_names_of_this_machine_are_accepted(client, host):
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1.evil.example", "null", "http://[", ""]
)
def test_without_keys_pages_of_other_sites_are_rejected(client, origin):
    assert error(client.post("/v1/loras", files={"file": b""}, headers={"Origin": origin})) == (
        400,
        "HOST_NOT_ALLOWED",
    )


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:1"]
)
def test_without_keys_pages_of_this_machine_are_accepted(client, origin):
    assert client.get("/v1/models", headers={"Origin": origin}).status_code == 200


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
CHAT = "https://chat.example"


@pytest.mark.parametrize("with_key", [True, False])
def test_allowed_origins_may_call_the_server_from_a_browser(tmp_path, with_key):
    context = context_in(tmp_path, cors_origins="https://other.example, https://chat.example/")
    key = {"Authorization": f"Bearer {context.keys.add('one')}"} if with_key else {}
    client = client_of(context)
    asked = client.options("/v1/inference", headers={"Origin": CHAT, **PREFLIGHT})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == CHAT
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    answer = client.get("/v1/models", headers={"Origin": CHAT, **key})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, CHAT)
    other = client.get("/v1/models", headers={"Origin": "https://evil.example", **key})
    assert "access-control-allow-origin" not in other.headers
    assert other.status_code == (200 if with_key else 400)


def test_a_star_allows_all_origins_on_servers_with_keys_only(tmp_path):
    context = context_in(tmp_path, cors_origins="*")
    client = client_of(context)
    assert client.get("/v1/models", headers={"Origin": CHAT}).status_code == 400
    key = {"Authorization": f"Bearer {context.keys.add('one')}"}
    answer = client.get("/v1/models", headers={"Origin": CHAT, **key})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_by_default_no_origin_is_allowed(client):
    answer = client.options("/v1/inference", headers={"Origin": CHAT, **PREFLIGHT})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.status_code >= 400


@pytest.mark.parametrize("value", ["chat.example", "https://chat.example/path", "https://"])
def test_an_invalid_origin_stops_the_server(tmp_path, value):
    with pytest.raises(ValueError, match="is not an origin"):
        context_in(tmp_path, cors_origins=value)


def test_a_token_is_not_stored_logged_or_returned(client, context, caplog, capsys):
    caplog.set_level("DEBUG")
    request_id = submit(client, MINIMAL | {"hf_token": SECRET})
    number = 4567891234
    bodies = [
        {"hf_token": SECRET},
        {"hf_token": {"a": SECRET}},
        {"hf_token": number},
        MINIMAL | {"hf_token": SECRET, "model": "gpt"},
        MINIMAL | {"hf_token": SECRET, "loras": [{"path": "https://e.com/a?t=" + SECRET}]},
    ]
    texts = [client.post("/v1/inference", json=body).text for body in bodies]
    texts = [text.replace(str(number), SECRET) for text in texts]
    texts += [
        client.get(f"/v1/requests/{request_id}/status").text,
        str(context.store.get(request_id)),
        caplog.text,
        "".join(capsys.readouterr()),
        client.get("/metrics").text,
    ]
    assert [text for text in texts if SECRET in text] == []
