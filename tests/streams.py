"""Server-Sent Events as a client reads them, and the places of those who follow the log."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import anyio
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamEnded

from tests.multipart import DEADLINE_SECONDS

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    import httpx2
    from anyio.abc import ByteStream

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
        with anyio.fail_after(DEADLINE_SECONDS):
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


class Http2:
    """An HTTP/2 connection on which one stream can be left, which httpx2 does not do."""

    def __init__(self, stream: ByteStream, host: str) -> None:
        self._stream = stream
        self._host = host
        self._http = H2Connection()
        self._received: defaultdict[int, bytes] = defaultdict(bytes)
        self._ended: set[int] = set()

    async def begin(self) -> None:
        self._http.initiate_connection()
        await self._flush()

    async def stream(self) -> int:
        """Ask for the event stream; return the number of the HTTP/2 stream."""
        number = self._http.get_next_available_stream_id()
        target = [(":method", "GET"), (":scheme", "https"), (":path", "/v1/stream")]
        self._http.send_headers(number, [*target, (":authority", self._host)], end_stream=True)
        await self._flush()
        return number

    async def leave(self, number: int) -> None:
        self._http.reset_stream(number, ErrorCodes.CANCEL)
        await self._flush()

    async def until(self, number: int, end: bytes | None) -> bytes:
        """Read up to `end`, or where that is None to the end of the stream."""
        with anyio.fail_after(DEADLINE_SECONDS):
            while not (number in self._ended if end is None else end in self._received[number]):
                for event in self._http.receive_data(await self._stream.receive()):
                    if isinstance(event, DataReceived):
                        self._received[event.stream_id] += event.data
                        self._http.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )
                    elif isinstance(event, StreamEnded):
                        self._ended.add(event.stream_id)
                await self._flush()
        data, found, rest = self._received[number].partition(end or b"\0")
        self._received[number] = rest
        return data + found

    async def _flush(self) -> None:
        await self._stream.send(self._http.data_to_send())


@asynccontextmanager
async def http_2(url: str, context: ssl.SSLContext) -> AsyncIterator[Http2]:
    """Connect over TLS."""
    address = urlsplit(url)
    assert address.hostname
    assert address.port
    context.set_alpn_protocols(["h2"])
    async with await anyio.connect_tcp(
        address.hostname, address.port, ssl_context=context, tls_standard_compatible=False
    ) as stream:
        connection = Http2(stream, address.netloc)
        await connection.begin()
        yield connection
