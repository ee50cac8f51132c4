"""Hostile prompts, names and values through all APIs, the command line and the page's form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.faults.fault_support import SMALL, FaultServer, assert_is_message
from tests.server.http_support import ManualWorker, jobs_succeeding, png_with_parameters
from tests.support import LORA, TINY_BASE

from fidelora.errors import FideloraError
from fidelora.server import job_watcher
from fidelora.server.middleware import MAX_BODY_BYTES
from fidelora.server.page.form import LABELS, Form, build_request, family_defaults, read_seed
from fidelora.server.page.html import escape, prompt_line

LORA_NAME = "sks.safetensors"
MARKUP = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))",
    "{{7*7}} ${7*7} <%= 7*7 %>", "'; DROP TABLE jobs; --", "%s%n%x {0} {name}", "$(id) `id`",
    "a\r\nSet-Cookie: a=b", "<!--#exec cmd=id-->", "&lt;b&gt;",
]  # fmt: skip
SYNTAX = [
    "(" * 1000, ")" * 1000, "(a:1e999)", "(a:nan)", "[a:b:0.5]", "[a|b]", "a AND b", "BREAK " * 500,
    "<lora:>", "<lora::>", "<lora:a:b:c:d>", "<lora:a:1e999>", "<hypernet:a:1>",
    "<lora:" + "<" * 999,
    "\\" * 5000, "[trigger]" * 1000, "[name]" * 1000, "__wildcard__", "a --w 5 --seed x",
]  # fmt: skip
PATHS = [
    "../sks", "/etc/passwd", "..\\..\\sks", "C:\\sks", "//host/share", "file:///etc/passwd", ".",
    "..", "uploads/../../x", "sks\0", "%2e%2e%2fsks", "~root/x", "con", "a" * 300, "sks/", "",
    "http://169.254.169.254/a.safetensors", "hf:../..", "hf:a/b/c.safetensors@../x",
]  # fmt: skip
PLANES = "".join(map(chr, (plane * 2**16 + place for plane in range(17) for place in range(100))))
"""The first characters of every Unicode plane."""
TEXTS: dict[str, str] = {
    "planes": PLANES,
    "Latin": "".join(map(chr, range(0xA0, 0x250))),
    "surrogates": "\ud800a\udfff",
    "surrogates in reverse": "\udfff\udbff",
    "private use": "\ue000\U000f0000\U0010fffd",
    "not characters": "\ufffe\uffff\U0001ffff\ufdd0",
    "controls": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "directions": "\u202e\u2066\u200f\u200e\u061c",
    "joined": "e" + "\u0301" * 5000,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 500,
    "ligature": "\ufdfa" * 3000,
    "folding": "İ" * 5000,
    "spaces": "\u00a0\u2003\u3000\u200b\ufeff" * 500,
    "separators": "\u2028\u2029\x85",
    "nothing": "",
    "10000 characters": "a" * 10_000,
    "10001 characters": "a" * 10_001,
    **{f"markup {number}": text for number, text in enumerate(MARKUP)},
    **{f"syntax {number}": text for number, text in enumerate(SYNTAX)},
    **{f"path {number}": text for number, text in enumerate(PATHS[:3])},
}
LONG = "a" * (900 * 1024)
"""A prompt that fits into a body of the largest size."""


@pytest.fixture(scope="module", autouse=True)
def working(server: FaultServer):
    """Let every job succeed at once, with a small image."""
    worker = ManualWorker(server.context)
    with (
        pytest.MonkeyPatch.context() as patch,
        jobs_succeeding(worker, png_with_parameters(), interval_s=0.02),
    ):
        patch.setattr(job_watcher, "POLL_INTERVAL_S", 0.02)
        yield


def body(**prompt: Any) -> dict[str, Any]:
    item = {"prompt": "a", **SMALL} | prompt
    return {"model": "sd15", "loras": [{"path": LORA_NAME}], "prompts": [item]}


def check(server: FaultServer, response: Any, before: str) -> bool:
    """Return True if a request was accepted; check that a refused one left no job."""
    if response.status_code < 300:
        assert server.newest_id() != before
        return True
    assert 400 <= response.status_code < 500
    assert server.newest_id() == before
    return False


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_make_a_job_or_are_refused(server, text):
    before = server.newest_id()
    for field in ("prompt", "neg", "trigger_word"):
        given = {field: text} | ({"prompt": "a [trigger]"} if field == "trigger_word" else {})
        if check(server, server.post("/v1/inference", body(**given)), before):
            before = server.newest_id()
            job = server.context.store.get(before)
            recipe = job.recipes[0]
            if field != "trigger_word":
                stored = recipe.prompt if field == "prompt" else recipe.negative_prompt
                assert stored == text or "[" in text, "the stored text was changed"
            prompt_line(job).encode()
    small = {"prompt": text, "width": 64, "height": 64, "steps": 1}
    if check(server, server.post("/sdapi/v1/txt2img", small), before):
        before = server.newest_id()
    check(server, server.post("/v1/images/generations", {"prompt": text, "size": "64x64"}), before)


@pytest.mark.parametrize("name", ["model", "sampler", "emphasis", "fidelity", "output_format"])
@pytest.mark.parametrize("text", [*MARKUP[:3], *PATHS[:4], "\ud800", "a" * 10_000, "\x1b[2J"])
def test_hostile_values_of_other_fields_are_refused(server, name, text):
    before = server.newest_id()
    whole = body()
    where = whole if name in ("model", "fidelity", "output_format") else whole["prompts"][0]
    where[name] = text
    assert not check(server, server.post("/v1/inference", whole), before)
    names = {"model": "model", "sampler": "sampler_name"}
    if name in names and text:
        given = {"prompt": "a", "override_settings": {"sd_model_checkpoint": text}}
        request = given if name == "model" else {"prompt": "a", "sampler_name": text}
        assert not check(server, server.post("/sdapi/v1/txt2img", request), before)
        images = {"prompt": "a", name: text}
        assert not check(server, server.post("/v1/images/generations", images), before)


@pytest.mark.parametrize("name", [*PATHS, *MARKUP, "\ud800.safetensors", "n" * 5000])
def test_names_that_look_like_paths_are_refused(server, name):
    before, files = server.newest_id(), server.files()
    for path in (name, f"{name}.safetensors"):
        given = body() | {"loras": [{"path": path}]}
        assert not check(server, server.post("/v1/inference", given), before)
        if not path or "\ud800" in path:  # a form cannot contain these
            continue
        upload = {"file": ("a.safetensors", LORA.read_bytes())}
        response = server.post("/v1/loras", files=upload, data={"name": path})
        left = {one.relative_to(server.loras).as_posix() for one in server.files() - files}
        if response.status_code < 300:
            (stored,) = left
            folder, _, file = stored.rpartition("/")
            assert (re.fullmatch(r"uploads/key-[0-9a-f]{16}", folder) is not None, file) == (
                True,
                path,
            )
            (server.loras / stored).unlink()
        else:
            assert left == set()
    tag = {"prompt": f"a <lora:{name}:1>", "width": 64, "height": 64}
    if not set(name) & set("<>:"):
        assert not check(server, server.post("/sdapi/v1/txt2img", tag), before)


@pytest.mark.parametrize(
    ("path", "sizes"),
    [
        ("/v1/inference", (LONG, "a" * MAX_BODY_BYTES)),
        ("/sdapi/v1/txt2img", (LONG, "a" * MAX_BODY_BYTES)),
        ("/v1/images/generations", (LONG, "a" * MAX_BODY_BYTES)),
    ],
)
def test_a_prompt_of_a_megabyte_is_refused(server, path, sizes):
    before = server.newest_id()
    for text in sizes:
        given = body(prompt=text) if path == "/v1/inference" else {"prompt": text}
        assert not check(server, server.post(path, given), before)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"NaN",
        b'{"prompts": NaN}', b'{"prompt": "' + b"\\ud800" * 1000 + b'"}',
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": 1e999}', b"\xef\xbb\xbf{}", b'{"prompt": "a", "prompt": "b"}', b"\0" * 100,
    ],
    ids=range(16),
)  # fmt: skip
def test_bodies_that_are_not_requests_are_refused(server, content):
    before = server.newest_id()
    headers = {"Content-Type": "application/json"}
    paths = ("/v1/inference", "/sdapi/v1/png-info", "/v1/images/generations", "/v1/replay")
    for path in paths:
        response = server.post(path, content=content, headers=headers)
        if b'"prompt": "b"' not in content:
            assert not check(server, response, before), path


def test_unknown_fields_with_hostile_names_are_named_briefly(server):
    for name in ("\ud800", "x" * 10_000, "\x1b[2J", "<b>", "__class__", ""):
        for path in ("/v1/inference", "/v1/images/generations", "/sdapi/v1/txt2img"):
            given = body() if path == "/v1/inference" else {"prompt": "a"}
            response = server.post(path, content=json.dumps(given | {name: 5}))
            assert 400 <= response.status_code < 500
            assert len(response.content) < 5000


# --- the command line and the form ----------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_command_line_plans_or_refuses_any_prompt(fidelora, text):
    if "\0" in text:
        pytest.skip("arguments of programs cannot contain NUL")
    options = ["--base-model", str(TINY_BASE), "--size", "64", "--device", "cpu"]
    code, out, err = fidelora("generate", "--dry-run", "--json", *options, "--", text)
    assert code in (0, 2), err
    assert "Unexpected" not in err
    if code:
        assert_is_message(err.removesuffix("\n").replace("\n", " "))
    else:
        assert json.loads(out)


@pytest.mark.parametrize("name", PATHS)
def test_the_command_line_refuses_hostile_loras(fidelora, name):
    if "\0" in name:
        pytest.skip("arguments of programs cannot contain NUL")
    options = ["--base-model", str(TINY_BASE), "--size", "64", "--device", "cpu", "--lora", name]
    code, _, err = fidelora("generate", "--dry-run", "a", *options)
    assert code in (1, 2)
    assert_is_message(err.removesuffix("\n"))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_form_makes_a_request_or_a_message_of_any_text(text):
    values: dict[str, Any] = dict.fromkeys(LABELS, "") | family_defaults("sd15", 512)
    values |= {"model": "sd15", "fidelity": "exact", "output_format": "png", "emphasis": "none"}
    form = Form(((LORA_NAME, 1.0),), 7, 1, values | {"prompt": text, "trigger_word": text})
    for changed in ({}, {"model": text}, {"sampler": text}, {"width": text}):
        try:
            build_request(Form(form.loras, form.seed, form.images, {**form.fields, **changed}))
        except FideloraError as error:
            assert_is_message(str(error))
            escape(error).encode()
    try:
        read_seed(text)
    except FideloraError as error:
        assert_is_message(str(error))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_page_shows_every_text_as_text(text):
    shown = escape(text)
    assert not set("<>\"'`*[]{}()$|\\!") & set(shown.replace("&#", "").replace(";", ""))
