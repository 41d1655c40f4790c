"""The web client's files, as they lie in `chatterd/web`."""

import hashlib
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from werkzeug.http import parse_etags

from chatterd import settings
from chatterd.errors import Problem
from chatterd.feed_http import PartsResponse

_MEDIA_TYPES: Final = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}


class _File(NamedTuple):
    content: bytes
    media_type: bytes
    etag: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _MEDIA_TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:32])


def _policy(public_url: str | None) -> bytes:
    """Return the page's Content-Security-Policy: nothing runs or loads but what is ours."""
    media = "'self'"
    if public_url:
        # Pictures and videos are linked under this address, whatever the page's own is.
        url = urlsplit(public_url)
        media += f" {url.scheme}://{url.netloc.encode('idna').decode()}"
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        f"img-src {media}; media-src {media}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ).encode()


_FILES: Final = {
    path.name: _read(path)
    for path in (Path(__file__).parent / "web").iterdir()
    if path.suffix in _MEDIA_TYPES
}
_HEADERS: Final = (
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", _policy(settings.PUBLIC_URL)),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def web_response(name: str, headers: Headers) -> PartsResponse:
    """Return the answer to a request for one of the files; raises `Problem` 404 for another."""
    file = _FILES.get(name)
    if file is None:
        raise Problem("not-found", "There is no such file.")
    answer_headers = [*_HEADERS, (b"etag", b'"%b"' % file.etag.encode())]
    if parse_etags(headers.get("if-none-match")).contains_weak(file.etag):
        return PartsResponse(304, answer_headers, [b""])
    answer_headers.append((b"content-type", file.media_type))
    return PartsResponse(200, answer_headers, [file.content])
