"""Answers that stay the same while the server runs."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from chatterd.feed_http import PartsResponse, is_match

PAGE_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
}
"""What a page needs that runs nothing and fetches nothing but its style."""


class Static:
    """A body with its headers, and an ETag of its own."""

    def __init__(
        self, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._body = body
        self._etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()
        self._headers = [
            (b"content-type", content_type.encode()),
            (b"etag", self._etag),
            (b"cache-control", b"no-cache"),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ]

    def response(self, request: Request[Any]) -> Response:
        """Answer the body, or 304 to who has it."""
        if_none_match = ",".join(request.headers.getlist("if-none-match")).encode("latin-1")
        if if_none_match and is_match(if_none_match, self._etag):
            return PartsResponse(304, self._headers[1:], [b""])
        return PartsResponse(200, list(self._headers), [self._body])
