"""The files of the web client and of the API's page, as they lie in `chatterd/web`."""

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from chatterd import settings
from chatterd.static import PAGE_HEADERS, Static

_MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _policy(public_url: str | None) -> str:
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
    )


_HEADERS: Final = {**PAGE_HEADERS, "content-security-policy": _policy(settings.PUBLIC_URL)}

WEB_FILES: Final = {
    path.name: Static(path.read_bytes(), _MEDIA_TYPES[path.suffix], _HEADERS)
    for path in (Path(__file__).parent / "web").iterdir()
    if path.suffix in _MEDIA_TYPES
}
"""What is answered for each name."""
WEB_PAGE: Final = WEB_FILES.pop("index.html")
"""The web client, which has one address: its links lead from there."""
