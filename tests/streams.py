"""Server-Sent Events as a client reads them, and the places of those who follow the log."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from tests.multipart import DEADLINE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2

_BEGIN = re.compile(rb"retry: 2000\nid: ([0-9a-f.]+)\n\n")
_EVENT = re.compile(rb"event: (chatt|delete|reset)\nid: ([0-9a-f.]+)\ndata: (.+)\n\n")


class Event(NamedTuple):
    """What happened, the cursor behind it, and the data as sent."""

    kind: str
    id: str
    data: bytes

    def json(self) -> Any:  # noqa: ANN401 - what it is, the test knows
        return json.loads(self.data)


class EventStream:
    """An open stream, read block by block."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._parts = response.aiter_raw()
        self._received = b""

    async def block(self, seconds: float = DEADLINE_SECONDS) -> bytes:
        """Read up to the next blank line; at the end of the stream what is left."""
        with anyio.fail_after(seconds):
            while b"\n\n" not in self._received:
                part = await anext(self._parts, b"")
                if not part:
                    break
                self._received += part
        block, blank, self._received = self._received.partition(b"\n\n")
        return block + blank

    async def begin(self) -> str:
        """Read the first block; return its cursor."""
        block = await self.block()
        match = _BEGIN.fullmatch(block)
        assert match, block
        return match[1].decode()

    async def event(self) -> Event:
        """Read the next event, byte for byte as there may be one; comments are none."""
        while (block := await self.block()) == b":\n\n":
            pass
        match = _EVENT.fullmatch(block)
        assert match, block
        return Event(match[1].decode(), match[2].decode(), match[3])

    async def events(self, count: int) -> list[Event]:
        return [await self.event() for _ in range(count)]


@asynccontextmanager
async def stream_of(
    client: httpx2.AsyncClient, since: str | None = None, **headers: str
) -> AsyncIterator[EventStream]:
    """Open a stream behind a cursor, or from now on; the block that begins it is yet to be read."""
    query = {} if since is None else {"since": since}
    async with client.stream("GET", "/v1/stream", params=query, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        yield EventStream(response)


async def has_place(client: httpx2.AsyncClient) -> bool:
    """Whether the server has a place for one more who follows the log."""
    response = await client.head("/v1/stream")
    assert response.status_code in {200, 503}
    return response.status_code == 200


async def place_is_free(client: httpx2.AsyncClient) -> None:
    """Wait until somebody's place is free."""
    with anyio.fail_after(DEADLINE_SECONDS):
        while not await has_place(client):
            pass
