"""Answers that stay the same while the server runs."""

import gzip
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from chatterd.feed_http import PartsResponse, is_gzip_accepted, is_match

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
    """A body with its headers, as it is and compressed, each with an ETag of its own."""

    def __init__(
        self, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._headers = [
            (b"content-type", content_type.encode()),
            (b"cache-control", b"no-cache"),
            (b"vary", b"Accept-Encoding"),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ]
        self._plain = body, _etag_of(body), self._headers
        # Here and not in a proxy: that would make weak tags of strong ones.
        gzipped = gzip.compress(body, mtime=0)  # without the time, every process has the same tag
        encoding = (b"content-encoding", b"gzip")
        self._gzipped = gzipped, _etag_of(gzipped), [*self._headers, encoding]

    def response(self, request: Request[Any]) -> Response:
        """Answer the body, or 304 to who has it."""
        accepted = _joined(request, "accept-encoding")
        body, etag, headers = self._gzipped if is_gzip_accepted(accepted) else self._plain
        if_none_match = _joined(request, "if-none-match")
        if if_none_match and is_match(if_none_match, etag):
            return PartsResponse(304, [(b"etag", etag), *self._headers[1:]], [b""])
        return PartsResponse(200, [(b"etag", etag), *headers], [body])


def _etag_of(body: bytes) -> bytes:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()


def _joined(request: Request[Any], name: str) -> bytes:
    """Return a field that may come in several lines (RFC 9110 §5.3)."""
    return ",".join(request.headers.getlist(name)).encode("latin-1")
