"""Answering requests for chatts as objects, and deleting them (contract §2)."""

import hashlib
from typing import Any, Final
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from chatterd.chatts import StoredChatt, encoded, encoded_page
from chatterd.database import Database
from chatterd.errors import Problem
from chatterd.feed import Feed
from chatterd.feed_http import PartsResponse, etag_of, is_match
from chatterd.models import chatt, chatts_page, deletable, place_of, tombstone
from chatterd.paging import NEWEST, Wanted, chatt_id, links
from chatterd.writer import token_hash

_JSON: Final = (b"content-type", b"application/json")
_NO_CACHE: Final = (b"cache-control", b"no-cache")


async def page_response(
    request: Request[Any], database: Database, feed: Feed, page: Wanted | None, media_url: str
) -> Response:
    """Answer a GET of a page; 304 where nothing has changed, for which no chatt is read.

    Raises `Problem` 404 for the id of no chatt, `DatabaseUnavailable`.
    """
    query: bytes = request.scope["query_string"]
    if if_none_match := _if_none_match(request):
        etag = etag_of((await feed.fresh()).version, media_url, query)
        if is_match(if_none_match, etag):
            return PartsResponse(304, [(b"etag", etag), _NO_CACHE], [b""])
    page = page or NEWEST
    state, chatts = await _read(database, page)
    cursor = f"{state.epoch.hex}.{state.table}.{state.newest}"
    ends = (chatts[0].id, chatts[-1].id) if chatts else (None, None)
    headers = [
        _JSON,
        (b"etag", etag_of(cursor, media_url, query)),
        _NO_CACHE,
        (b"link", links(request.scope["path"], page, *ends)),
    ]
    return PartsResponse(200, headers, [encoded_page(chatts, cursor, media_url)])


async def _read(database: Database, page: Wanted) -> tuple[Any, list[StoredChatt]]:
    """Return the feed's state and the chatts of a page at the same moment, oldest first."""
    async with database.transaction() as session:
        place = None
        if (bound := page.before or page.after) is not None:
            place = (await session.execute(place_of(bound))).one_or_none()
            if place is None:
                raise Problem("chatt-not-found", f"There is no chatt with the id {bound}.")
        before, after = (None, place) if page.after else (place, None)
        rows = (await session.execute(chatts_page(before, after, page.limit))).all()
    chatts = [StoredChatt.of(row) for row in rows if row.id is not None]
    return rows[0], chatts if page.after else chatts[::-1]


async def chatt_response(
    request: Request[Any], database: Database, text: str, media_url: str
) -> Response:
    """Answer a GET of the chatt with the id `text`; raises `Problem` 404, `DatabaseUnavailable`."""
    wanted = _id(text)
    async with database.transaction() as session:
        row = (await session.execute(chatt(wanted))).one_or_none()
    if row is None:
        raise _not_found(text)
    body = encoded(StoredChatt.of(row), media_url)
    etag = b'"%b"' % hashlib.blake2b(body, digest_size=16).hexdigest().encode()
    if is_match(_if_none_match(request), etag):
        return PartsResponse(304, [(b"etag", etag), _NO_CACHE], [b""])
    return PartsResponse(200, [_JSON, (b"etag", etag), _NO_CACHE], [body])


async def deleted(database: Database, text: str, token: str | None) -> list[str]:
    """Delete the chatt with the id `text`; return the keys of its files.

    Raises `Problem` 403 unless `token` is its delete token, 404 when it is not there (any more),
    `DatabaseUnavailable`.
    """
    wanted = _id(text)
    async with database.transaction() as session:
        found = (await session.execute(deletable(wanted))).one_or_none()
        if found is None:
            raise _not_found(text)
        # Hashes of what is random tell nothing by how long they take to compare.
        if found.delete_token_hash is None or token_hash(token or "") != found.delete_token_hash:
            raise Problem(
                "delete-token-wrong",
                "Chatterd-Delete-Token must be what posting the chatt was answered with.",
            )
        if await session.scalar(tombstone(wanted)) is None:  # somebody was faster
            raise _not_found(text)
    return [key for key in (found.image, found.video) if key is not None]


def _if_none_match(request: Request[Any]) -> bytes:
    # A field may come in several lines (RFC 9110 §5.3).
    return ",".join(request.headers.getlist("if-none-match")).encode("latin-1")


def _id(text: str) -> UUID:
    found = chatt_id(text)
    if found is None:
        raise _not_found(text)
    return found


def _not_found(text: str) -> Problem:
    return Problem("chatt-not-found", f"There is no chatt with the id {text[:64]}.")
