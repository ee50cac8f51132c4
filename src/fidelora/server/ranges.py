"""Responses with a whole file or, for a request with `Range`, a part of it (RFC 9110, section 14).

Browsers ask for parts of a video to seek in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.responses import Response

_BYTE_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


def ranged_response(
    content: bytes, request_headers: Mapping[str, str], media_type: str, headers: Mapping[str, str]
) -> Response:
    """Return `content`, or the range of bytes that the request asks for.

    A `Range` that is not valid, has several ranges, or whose `If-Range` is not the ETag is ignored,
    as RFC 9110 permits.

    Args:
        request_headers: headers of the request; the names are not case-sensitive.
        headers: headers of the response, with `ETag`.

    Returns:
        A response with status 200 (the whole file), 206 (a part), or 416 (the range begins after
        the end of the file).
    """
    headers = {**headers, "Accept-Ranges": "bytes"}
    asked = _BYTE_RANGE.fullmatch(request_headers.get("range", ""))
    condition = request_headers.get("if-range")
    if asked is None or (condition is not None and condition != headers["ETag"]):
        return Response(content, media_type=media_type, headers=headers)
    first, last = asked.groups()
    size = len(content)
    if not first and last:  # the last bytes
        start, stop = max(0, size - int(last)), size
    elif first and (not last or int(first) <= int(last)):
        start, stop = int(first), min(size, int(last) + 1) if last else size
    else:
        return Response(content, media_type=media_type, headers=headers)
    if start >= size:
        headers |= {"Content-Range": f"bytes */{size}", "Cache-Control": "no-store"}
        return Response(status_code=416, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(content[start:stop], 206, media_type=media_type, headers=headers)
