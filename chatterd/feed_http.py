"""Answering a request for the feed: whole or a page of it, conditional, compressed."""

import hashlib
import http
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from werkzeug.http import parse_accept_header, parse_etags

from chatterd import metrics
from chatterd.blocks import Page, Snapshot, encode, page_of, with_media
from chatterd.errors import BrokenAnswer, DatabaseUnavailable
from chatterd.feed import Feed
from chatterd.paging import Wanted, links, wanted

# Media addresses differ by the host that a request names, and strangers choose that: only a feed
# up to this size is kept as a whole for each of a few hosts.
_KEPT_SIZE: Final = 8 * 1024 * 1024


async def feed_response(request: Request[Any], feed: Feed, media_url: str | None) -> Response:
    """Answer a GET of the feed: rows of four, or of six where `media_url` is given.

    The ETag is strong and the same in every process: it names the feed's version and what was
    asked for. Raises `Problem` 404 or 422 for a query that cannot be answered,
    `DatabaseUnavailable`.
    """
    query: bytes = request.scope["query_string"]
    page = wanted(query) if query else None
    snapshot = await feed.fresh()
    if_none_match = accept_encoding = b""
    for name, value in request.scope["headers"]:
        # A field may come in several lines (RFC 9110 §5.3).
        if name == b"if-none-match":
            if_none_match = if_none_match + b"," + value if if_none_match else value
        elif name == b"accept-encoding":
            accept_encoding = accept_encoding + b"," + value if accept_encoding else value
    # What is sent block by block is sent as it is.
    in_memory = snapshot.older_than is None and (media_url is None or snapshot.size <= _KEPT_SIZE)
    gzip = page is None and in_memory and is_gzip_accepted(accept_encoding)
    etag = etag_of(snapshot.version, media_url, query, gzip)
    headers = [
        (b"content-type", b"application/json"),
        (b"etag", etag),
        (b"cache-control", b"no-cache"),
        (b"vary", b"Accept-Encoding"),
    ]
    if if_none_match and is_match(if_none_match, etag):
        metrics.FEED_WITH_CLIENT.count += 1
        return PartsResponse(304, headers[1:], [b""])
    if page is not None:
        found = await _found(feed, snapshot, page, media_url)
        headers.append((b"link", links(request.scope["path"], page, found.first, found.last)))
        return PartsResponse(200, headers, [found.body])
    if not in_memory:
        metrics.FEED_FROM_DATABASE.count += 1
        head = request.method == "HEAD"
        response = Response() if head else StreamingResponse(_by_block(feed, snapshot, media_url))
        response.raw_headers = headers
        return response
    metrics.FEED_FROM_MEMORY.count += 1
    if gzip:
        headers.append((b"content-encoding", b"gzip"))
        parts = await snapshot.gzipped_whole(media_url)
    else:
        parts = snapshot.whole(media_url)
    return PartsResponse(200, headers, parts)


class PartsResponse(Response):
    """A body of several parts, none of which is copied; headers as they go over the wire."""

    def __init__(
        self, status: int, headers: list[tuple[bytes, bytes]], parts: Sequence[bytes]
    ) -> None:
        # Not Response's own: it would encode each header again for each request.
        self.status_code = status
        self.raw_headers = headers
        self.background = None
        self._parts = parts
        if status != http.HTTPStatus.NOT_MODIFIED:
            headers.append((b"content-length", b"%d" % sum(map(len, parts))))

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the parts, or for HEAD only what they are."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        *parts, last = self._parts if scope["method"] != "HEAD" else (b"",)
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": last})


async def _by_block(feed: Feed, snapshot: Snapshot, media_url: str | None) -> AsyncIterator[bytes]:
    """Yield the rows that are in the database, then those of `snapshot`, as one array.

    No more than a page or a block is made at a time, whatever the client does.
    """
    begin = b"["
    try:
        async for rows in feed.older(snapshot):
            encoded = (with_media(*encode(row), media_url) for row in rows)
            yield begin + b",".join(encoded)
            begin = b","
    except DatabaseUnavailable as error:
        raise BrokenAnswer("The database went away within the feed") from error
    for block in snapshot.blocks:
        part = block.part(media_url)
        yield part if begin == b"," else begin + part[1:]
        begin = b","
    yield b"[]" if begin == b"[" else b"]"


async def _found(feed: Feed, snapshot: Snapshot, page: Wanted, media_url: str | None) -> Page:
    newest = page.before is None and page.after is None
    if newest and (kept := snapshot.newest(page.limit, media_url)) is not None:
        metrics.FEED_FROM_MEMORY.count += 1
        return kept
    metrics.FEED_FROM_DATABASE.count += 1
    rows = await feed.page(page.limit, before=page.before, after=page.after)
    return page_of([(row.id, with_media(*encode(row), media_url)) for row in rows])


@lru_cache(256)
def etag_of(version: str, media_url: str | None, query: bytes, gzip: bool = False) -> bytes:  # noqa: FBT001, FBT002 - lru_cache is fastest by position
    """Return the strong ETag of an answer: of the feed in this version, asked for in this way."""
    variant = hashlib.blake2b(b"%b?%b" % ((media_url or "").encode(), query), digest_size=6)
    return f'"{version}-{variant.hexdigest()}{"-gzip" if gzip else ""}"'.encode()


@lru_cache(256)
def is_gzip_accepted(accept_encoding: bytes) -> bool:
    """Tell whether the client takes what is compressed (RFC 9110 §12.5.3)."""
    return parse_accept_header(accept_encoding.decode("latin-1"))["gzip"] > 0


def is_match(if_none_match: bytes, etag: bytes) -> bool:
    """Tell whether the client has this version already (RFC 9110 §13.1.2)."""
    if if_none_match == etag:
        return True
    # A proxy that compresses makes a strong tag a weak one; the comparison is the weak one.
    return parse_etags(if_none_match.decode("latin-1")).contains_weak(etag.decode().strip('"'))
