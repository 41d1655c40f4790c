"""The log over HTTP: as Server-Sent Events, and to those who ask and wait (contract §2)."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatterd.chatts import Changes, Deleted, encoded
from chatterd.errors import DatabaseUnavailable
from chatterd.events import Batch, position_of
from chatterd.feed_http import PartsResponse
from chatterd.live import Live, StreamEnd, Subscription
from chatterd.paging import Wanted

SEND_CHUNK: Final = "chatterd.send_chunk"
"""An ASGI extension: sends a chunk of a body (RFC 9112 §7.1) behind what has been sent, without
waiting. Takes the chunk; tells whether it was sent, which it is not while the client is behind."""

SENT_PAST: Final = "chatterd.sent_past"
"""Where a scope says how many bytes were sent in that way."""

_RETRY_MILLISECONDS: Final = 2000
# Those whom a server leaves do not all come back at once.
_RETRY_AFTER_STOP_MILLISECONDS: Final = (1000, 4000)
_HEADERS: Final = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    # Nginx would collect events before it passes them on.
    (b"x-accel-buffering", b"no"),
]


class StreamResponse(Response):
    """The log as Server-Sent Events (WHATWG HTML §9.2), behind `cursor` or from now on.

    It ends when the client leaves, takes too little for too long, or the server stops. Raises
    `Problem` 503 when there are too many, `DatabaseUnavailable`, both before it has begun.
    """

    def __init__(self, live: Live, cursor: str | None, media_url: str) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = _HEADERS
        self._live = live
        self._cursor = cursor
        self._media_url = media_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until it ends."""
        with self._live.subscribed() as subscription:
            position = await subscription.start(self._cursor)
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            # An id without data sets what the client comes back with, and is no event.
            begin = f"retry: {_RETRY_MILLISECONDS}\nid: {position}\n\n"
            if send_chunk := scope.get("extensions", {}).get(SEND_CHUNK):
                subscription.push = partial(self._push, scope, send_chunk)
            with suppress(StreamEnd, ClientDisconnect, DatabaseUnavailable):
                async with ended_with_client(subscription, receive), subscription.sending():
                    await self._send_events(subscription, begin.encode(), send)
            if self._live.is_stopping:
                retry = random.randint(*_RETRY_AFTER_STOP_MILLISECONDS)  # noqa: S311 - no secret
                end = f"retry: {retry}\n\n".encode()
                await send({"type": "http.response.body", "body": end})

    def _push(self, scope: Scope, send_chunk: Callable[[bytes], bool], batch: Batch) -> bool:
        chunk = batch.encoded(self._media_url, _chunk)
        if not send_chunk(chunk):
            return False
        scope[SENT_PAST] = scope.get(SENT_PAST, 0) + len(chunk)
        return True

    async def _send_events(self, subscription: Subscription, begin: bytes, send: Send) -> None:
        part = begin
        while True:
            subscription.begin_sending()
            await send({"type": "http.response.body", "body": part, "more_body": True})
            subscription.end_sending()
            batch = await subscription.take()
            if batch is None:
                part = b":\n\n"
            elif batch.is_reset:
                part = f"event: reset\nid: {subscription.position}\ndata: {{}}\n\n".encode()
            else:
                part = batch.encoded(self._media_url, _events)


def _events(batch: Batch, media_url: str) -> bytes:
    parts = []
    for event in batch.events:
        kind, data = b"chatt", encoded(event.chatt, media_url)
        if event.is_deleted:
            kind, data = b"delete", msgspec.json.encode(Deleted(event.chatt.id))
        cursor = batch.cursor_of(event).encode()
        parts.append(b"event: %b\nid: %b\ndata: %b\n\n" % (kind, cursor, data))
    return b"".join(parts)


def _chunk(batch: Batch, media_url: str) -> bytes:
    """Return the events as a chunk of HTTP/1.1 (RFC 9112 §7.1)."""
    events = batch.encoded(media_url, _events)
    return b"%x\r\n%b\r\n" % (len(events), events)


@asynccontextmanager
async def ended_with_client(subscription: Subscription, receive: Receive) -> AsyncIterator[None]:
    """End the subscription when the client leaves, while the context lasts."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        subscription.end()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def changes_response(live: Live, page: Wanted, media_url: str, receive: Receive) -> Response:
    """Answer what has changed after the cursor of `page`, once something has.

    Raises `Problem` 503 when too many are waiting, `DatabaseUnavailable`, `ClientDisconnect`.
    """
    assert page.since is not None
    position = position_of(page.since)
    batch = await live.changes(position, page.limit)
    if page.wait and not batch.events and not batch.is_reset:
        with live.subscribed() as subscription:
            async with ended_with_client(subscription, receive):
                batch = await _awaited(subscription, page) or batch
    events = batch.events[: page.limit]
    if batch.is_reset:
        position = (await live.fresh()).end
    cursor = batch.cursor_of(events[-1]) if events else str(position)
    body = msgspec.json.encode(
        Changes(
            [msgspec.Raw(encoded(e.chatt, media_url)) for e in events if not e.is_deleted],
            [event.chatt.id for event in events if event.is_deleted],
            batch.is_reset,
            cursor,
        )
    )
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    return PartsResponse(200, headers, [body])


async def _awaited(subscription: Subscription, page: Wanted) -> Batch | None:
    """Return what comes within the time; None when nothing does, or the server stops."""
    with suppress(TimeoutError, StreamEnd):
        async with asyncio.timeout(page.wait):
            await subscription.start(page.since)
            while True:
                if (batch := await subscription.take()) is not None:
                    return batch
    return None
