"""The description of the API at /docs, which needs no other host."""

from __future__ import annotations

import base64
import hashlib
import re

from fidelora.server.api_docs import DOCS_PATHS


def test_the_page_and_its_files_are_served_by_this_server(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text
    linked = set(re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text))
    assert {f"/{path}" for path in linked} == DOCS_PATHS - {"/docs"}
    for path in linked:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200
        assert len(answer.content) > 100_000
    assert "SwaggerUIBundle" in client.get("/docs/swagger-ui-bundle.js").text


def test_the_policy_allows_only_this_server_and_the_inline_script(client):
    page = client.get("/docs")
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_the_description_needs_no_key(client, context):
    context.keys.add("alice")
    assert client.get("/v1/models").status_code == 401
    assert {client.get(path).status_code for path in (*DOCS_PATHS, "/openapi.json")} == {200}
    assert client.get("/docs/other.js").status_code == 401
