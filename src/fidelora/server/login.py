"""The way in for people: a page asks for an API key once, and a cookie stands for it from then on."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from fidelora.server.api_keys import ApiKeys, hash_of

COOKIE = "fidelora_session"
LOGIN_PATH, LOGOUT_PATH = "/login", "/logout"
_LASTS_S = 7 * 24 * 3600.0
_MOST = 10_000
_MOST_BYTES = 10_000
_STRICT = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"


class Login:
    """Sessions of people who showed a key, and the page that asks for it. They are forgotten when the server ends.

    Args:
        keys: a session ends with its key.
        secure: whether browsers may send the cookie over TLS alone.
    """

    def __init__(self, keys: ApiKeys, *, secure: bool) -> None:
        self._keys = keys
        self._secure = secure
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[str, float]] = (
            OrderedDict()
        )  # hash of the cookie -> hash of the key, end

    def owner(self, headers: Headers) -> str | None:
        """Whose key the cookie of this request stands for; None if for none."""
        token = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        with self._lock:
            key, end = self._sessions.get(hash_of(token), ("", 0.0))
        return self._keys.owner_of(key) if time.monotonic() < end else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer somebody who has shown no key yet."""
        request = Request(scope, receive)
        if request.method == "POST":
            form = parse_qs((await _little(request)).decode("utf-8", "replace"))
            key = form.get("key", [""])[0].strip()
            answer = (
                self._opened(key)
                if self._keys.owner(key)
                else _form("This is no key of this server.", 403)
            )
        else:
            answer = _form()
        await answer(scope, receive, send)

    def leave(self, method: str, headers: Headers) -> Response:
        """Forget the session of this request; a GET asks first, because another site could have sent it."""
        if method != "POST":
            return _page("logout", "<button autofocus>Leave</button>")
        token = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        with self._lock:
            self._sessions.pop(hash_of(token), None)
        answer = RedirectResponse("./", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=self._secure)
        return answer

    def _opened(self, key: str) -> Response:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[hash_of(token)] = (hash_of(key), time.monotonic() + _LASTS_S)
            while len(self._sessions) > _MOST:
                self._sessions.popitem(last=False)
        answer = RedirectResponse("./", 303)
        answer.set_cookie(
            COOKIE,
            token,
            max_age=int(_LASTS_S),
            httponly=True,
            samesite="strict",
            secure=self._secure,
        )
        return answer


async def _little(request: Request) -> bytes:
    """The body, or as much of it as a key can need: who is not known yet cannot fill the memory."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            break
    return body[:_MOST_BYTES]


def _form(said: str = "", status: int = 200) -> Response:
    notice = f"<p role=alert>{said}</p>" if said else ""
    return _page("login", _FIELD + notice + _HINT, status)


def _page(action: str, content: str, status: int = 200) -> Response:
    headers = {"Content-Security-Policy": _STRICT, "Cache-Control": "no-store"}
    return HTMLResponse(_PAGE.format(action=action, content=content), status, headers)


_FIELD = """<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Enter</button>
"""
_HINT = "<p>Whoever runs this server makes keys with <code>fidelora keys add NAME</code>.</p>"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fidelora</title><link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ display: grid; place-items: center; min-height: 100vh; margin: 0; }}
form {{ width: min(24rem, 100vw - 3rem); }} h1 {{ font-size: 1.4rem; }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .6rem; margin-top: .4rem; }}
[role=alert] {{ color: #c33; }}
</style></head><body>
<form method="post" action="{action}">
<h1>Fidelora</h1>
{content}</form></body></html>
"""
