"""Browser login: a form exchanges an API key for a session cookie."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from fidelora.jobs.api_keys import ApiKeys, hash_of
from fidelora.jobs.client_state import SESSION_S, Sessions

P = ParamSpec("P")
T = TypeVar("T")
COOKIE = "fidelora_session"
LOGIN_PATH, LOGOUT_PATH = "/login", "/logout"
_MAX_FORM_BYTES = 10_000
"""Maximum number of bytes to read from a login form; one with a key has fewer than 100."""
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


class Login:
    """The login form, which starts and ends the sessions of browsers.

    Args:
        keys: the server's keys; a session ends when its key is removed.
        secure: True if browsers must send the cookie over TLS only.
    """

    def __init__(self, keys: ApiKeys, sessions: Sessions, *, secure: bool) -> None:
        self._keys = keys
        self._sessions = sessions
        self._secure = secure

    async def key_sha256(self, headers: Headers) -> str:
        """Return the hash of the key behind this request's cookie; empty without a session."""
        token = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        key_sha256 = await self._call(self._sessions.key_of, hash_of(token)) if token else None
        return key_sha256 or ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the login form, and log in with a posted key."""
        request = Request(scope, receive)
        if request.method == "POST":
            form = parse_qs((await _read_form(request)).decode("utf-8", "replace"))
            key = form.get("key", [""])[0].strip()
            response = (
                await self._start_session(key)
                if await self._call(self._keys.find, key)
                else _login_page("This is not a key of this server.", 403)
            )
        else:
            response = _login_page()
        await response(scope, receive, send)

    async def logout(self, method: str, headers: Headers) -> Response:
        """End the session on POST. On GET, which other sites can trigger, return a logout form."""
        if method != "POST":
            return _page("logout", "<button autofocus>Log out</button>")
        token = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        await self._call(self._sessions.end, hash_of(token))
        response = RedirectResponse("./", 303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=self._secure)
        return response

    async def _start_session(self, key: str) -> Response:
        token = secrets.token_urlsafe(32)
        await self._call(self._sessions.start, hash_of(token), hash_of(key))
        response = RedirectResponse("./", 303)
        response.set_cookie(
            COOKIE,
            token,
            max_age=int(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=self._secure,
        )
        return response

    async def _call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the keys or sessions, on a thread if it can wait for a database."""
        if self._sessions.is_local:
            return call(*args, **kwargs)
        return await run_in_threadpool(call, *args, **kwargs)


async def _read_form(request: Request) -> bytes:
    """Return up to `_MAX_FORM_BYTES` of the body, which comes from an unauthenticated client."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_FORM_BYTES:
            break
    return body[:_MAX_FORM_BYTES]


def _login_page(error: str = "", status: int = 200) -> Response:
    notice = f"<p role=alert>{error}</p>" if error else ""
    return _page("login", _FIELD + notice + _HINT, status)


def _page(action: str, content: str, status: int = 200) -> Response:
    headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(_PAGE.format(action=action, content=content), status, headers)


_FIELD = """<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Enter</button>
"""
_HINT = "<p>The server's operator creates keys with <code>fidelora keys add NAME</code>.</p>"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fidelora</title><link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ display: grid; place-items: center; min-height: 100vh; margin: 0; }}
form {{ width: min(24rem, 100vw - 3rem); }} h1 {{ font-size: 1.4rem; }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .6rem; }}
input, button {{ margin-top: .4rem; }}
[role=alert] {{ color: #c33; }}
</style></head><body>
<form method="post" action="{action}">
<h1>Fidelora</h1>
{content}</form></body></html>
"""
