"""Clients that follow what happens: by event stream, long poll and WebSocket, byte for byte.

They are strict, so that what a lenient client would mend is seen here.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlencode, urlsplit

import h11
import wsproto
from wsproto import events as ws

from tests.multipart import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from tests.multipart import Connection

_CHUNK_BYTES = 65_536


class Change(NamedTuple):
    """What happened: the kind is chatt, delete or reset."""

    kind: str
    data: Any


class Batch(NamedTuple):
    """Changes that came together; with the cursor, a reader goes on behind them."""

    cursor: str
    changes: list[Change]


class Cut(Exception):  # noqa: N818 - it is what these tests are about, and no error
    """The connection is at its end, and what came over it is not."""


class Line:
    """A client's connection. It is cut when `limit` bytes have come, wherever that is."""

    def __init__(self, url: str, limit: float, buffer_bytes: int | None) -> None:
        self._address = urlsplit(url)
        self._left = limit
        self._buffer_bytes = buffer_bytes
        self.host = self._address.netloc

    async def open(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        connection = socket.socket()
        try:
            connection.setblocking(False)
            # asyncio does so for the sockets that it makes itself.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._buffer_bytes is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (self._address.hostname, self._address.port))
            self._reader, self._writer = await asyncio.open_connection(
                sock=connection, limit=self._buffer_bytes or _CHUNK_BYTES
            )
        except BaseException:
            connection.close()
            raise

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> bytes:
        """Return what has come, b"" at the end; raises `Cut`."""
        if self._left <= 0:
            raise Cut
        try:
            data = await self._reader.read(int(min(self._left, _CHUNK_BYTES)))
        except ConnectionError as error:
            raise Cut from error
        self._left -= len(data)
        return data

    def abort(self) -> None:
        """End it like a phone in a tunnel: nothing more is sent or read."""
        self._writer.transport.abort()

    async def begin(self, method: str, target: str, **headers: str) -> None:
        """Send the head of a request; its body, if it has one, comes later."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        elif self._http.our_state is h11.MUST_CLOSE:  # as after many requests
            self.abort()
            await self.open()
        lines = [("Host", self.host)]
        lines += [(name.replace("_", "-"), value) for name, value in headers.items()]
        head = self._http.send(h11.Request(method=method, target=target, headers=lines))
        assert head is not None
        await self.send(head)

    async def body(self, data: bytes) -> None:
        """Send a part of a request's body."""
        await self.send(self._http.send(h11.Data(data=data)) or b"")

    async def answer(self, body: bytes = b"") -> h11.Response:
        """Send the rest of a request; return the head of its answer. Raises `Cut`."""
        if body:
            await self.body(body)
        await self.send(self._http.send(h11.EndOfMessage()) or b"")
        head = await self._event()
        assert isinstance(head, h11.Response), head
        return head

    async def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> Answer:
        """Return the whole answer to a request; raises `Cut`."""
        if body:
            headers |= {"Content_Length": str(len(body))}
        await self.begin(method, target, **headers)
        return await self.whole(body)

    async def whole(self, body: bytes = b"") -> Answer:
        """Send the rest of a request; return its whole answer. Raises `Cut`."""
        head = await self.answer(body)
        parts = [part async for part in self.parts()]
        return Answer(head.status_code, headers_of(head), b"".join(parts))

    async def parts(self) -> AsyncGenerator[bytes]:
        """Yield the answer's body as it comes, to its proper end; raises `Cut`."""
        while isinstance(event := await self._event(), h11.Data):
            yield bytes(event.data)
        assert isinstance(event, h11.EndOfMessage), event

    async def _event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                data = await self.receive()
                if not data:
                    raise Cut
                self._http.receive_data(data)
                continue
            assert isinstance(event, h11.Event), event
            return event


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever it is
        return json.loads(self.body)


def headers_of(head: h11.Response) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in head.headers}


@asynccontextmanager
async def connect(
    url: str, *, limit: float = math.inf, buffer_bytes: int | None = None
) -> AsyncIterator[Line]:
    """Open a connection, on which we take no more than `buffer_bytes` without reading them.

    It is aborted when the block ends.
    """
    line = Line(url, limit, buffer_bytes)
    await line.open()
    try:
        yield line
    finally:
        line.abort()


class Blocks:
    """Takes an event stream apart (WHATWG HTML §9.2.5) and accepts only what ours may hold."""

    def __init__(self) -> None:
        self.rest = b""
        self.retries: list[int] = []

    def feed(self, data: bytes) -> list[Batch]:
        """Return the events that are whole by now; what is half is kept, and lost at a cut."""
        *blocks, self.rest = (self.rest + data).split(b"\n\n")
        return [batch for block in blocks if (batch := self._take(block)) is not None]

    def _take(self, block: bytes) -> Batch | None:
        fields: dict[bytes, bytes] = {}
        for line in block.split(b"\n"):
            name, colon, value = line.partition(b":")
            assert colon, block
            if not name:
                continue  # a comment
            assert value[:1] == b" ", block
            assert name not in fields, block
            fields[name] = value[1:]
        if (retry := fields.pop(b"retry", None)) is not None:
            self.retries.append(int(retry))
        if not fields:
            return None
        cursor = fields.pop(b"id").decode("ascii")
        assert cursor
        if not fields:
            return Batch(cursor, [])
        kind, data = fields.pop(b"event").decode(), fields.pop(b"data")
        assert not fields, block
        return Batch(cursor, [_change(kind, json.loads(data))])


def _change(kind: str, data: Any) -> Change:  # noqa: ANN401 - JSON
    members = {"chatt": _MEMBERS, "delete": ["id"], "reset": []}[kind]
    assert list(data) == members
    return Change(kind, data)


_MEMBERS = ["id", "name", "message", "time", "image", "video"]


class Follow(Protocol):
    """Follows what happens from a cursor, or from now, until the server ends it.

    First it yields a batch without changes, unless the cursor cannot be resumed. Raises `Cut`.
    """

    def __call__(self, line: Line, cursor: str | None) -> AsyncGenerator[Batch]: ...


async def stream(line: Line, cursor: str | None) -> AsyncGenerator[Batch]:
    blocks = Blocks()
    async with aclosing(open_stream(line, blocks, cursor)) as batches:
        async for batch in batches:
            yield batch


async def open_stream(line: Line, blocks: Blocks, cursor: str | None) -> AsyncGenerator[Batch]:
    """Follow a stream, which `blocks` takes apart."""
    resume = {} if cursor is None else {"Last_Event_ID": cursor}
    await line.begin("GET", "/v1/stream", **resume)
    head = await line.answer()
    headers = headers_of(head)
    if head.status_code == 503:
        raise Cut
    assert head.status_code == 200, head
    assert headers["content-type"].partition(";")[0] == "text/event-stream"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    async with aclosing(line.parts()) as parts:
        async for part in parts:
            for batch in blocks.feed(part):
                yield batch
    assert blocks.rest == b""


async def poll(line: Line, cursor: str | None) -> AsyncGenerator[Batch]:
    if cursor is None:
        answer = await line.ask("GET", "/v1/chatts?limit=1")
        assert answer.status == 200
        cursor = answer.json["cursor"]
    yield Batch(cursor, [])
    while True:
        query = urlencode({"since": cursor, "wait": 25, "limit": 50})
        answer = await line.ask("GET", f"/v1/chatts?{query}")
        if answer.status == 503:
            raise Cut
        assert answer.status == 200, answer
        assert answer.headers["cache-control"] == "no-store"
        found = answer.json
        assert list(found) == ["chatts", "deleted", "reset", "cursor"]
        cursor = found["cursor"]
        changes = [_change("chatt", chatt) for chatt in found["chatts"]]
        changes += [_change("delete", {"id": chatt_id}) for chatt_id in found["deleted"]]
        assert len(changes) <= 50
        if found["reset"]:
            assert changes == []
            changes = [_change("reset", {})]
        yield Batch(cursor, changes)


async def websocket(line: Line, cursor: str | None) -> AsyncGenerator[Batch]:
    connection = await open_websocket(line)
    await line.send(connection.send(ws.TextMessage(data=json.dumps({"since": cursor}))))
    async with aclosing(frames(line, connection)) as received:
        async for frame in received:
            assert list(frame) == ["event", "id", "data"]
            if frame["event"] == "ready":
                assert frame["data"] == {}
                yield Batch(frame["id"], [])
            else:
                yield Batch(frame["id"], [_change(frame["event"], frame["data"])])


async def open_websocket(line: Line) -> wsproto.WSConnection:
    connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    await line.send(connection.send(ws.Request(host=line.host, target="/v1/ws")))
    while True:
        for event in connection.events():
            assert isinstance(event, ws.AcceptConnection), event
            return connection
        data = await line.receive()
        if not data:
            raise Cut
        connection.receive_data(data)


async def frames(line: Line, connection: wsproto.WSConnection) -> AsyncGenerator[Any]:
    """Yield what the server says until it stops; raises `Cut`, also when it wants us to go."""
    text = ""
    while True:
        for event in connection.events():
            match event:
                case ws.TextMessage(data=part, message_finished=finished):
                    text += part
                    if finished:
                        yield json.loads(text)
                        text = ""
                case ws.Ping():
                    await line.send(connection.send(event.response()))
                case ws.CloseConnection(code=1012):
                    await line.send(connection.send(event.response()))
                    return
                case ws.CloseConnection(code=1013):
                    raise Cut
                case unexpected:
                    raise AssertionError(unexpected)
        data = await line.receive()
        if not data:
            raise Cut
        connection.receive_data(data)


async def post(line: Line, message: str) -> tuple[str, str]:
    """Post a chatt; return its id and what it is deleted with."""
    body = json.dumps({"name": "ann", "message": message}).encode()
    answer = await line.ask("POST", "/v1/chatts", body)
    assert answer.status == 201, answer
    return answer.json["id"], answer.json["delete_token"]


async def shown(psql: Connection) -> dict[str, dict[str, Any]]:
    """Return the chatts that are in the database, as they should be shown."""
    rows = await psql.fetch("""
        SELECT id::text, name, message,
            to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS time, image, video
        FROM chatts WHERE NOT deleted
    """)
    return {row["id"]: dict(row) for row in rows}


class Timeline:
    """A client's screen: it follows, fetches all anew after a reset, and comes back when cut."""

    def __init__(self, url: str, kind: str) -> None:
        self._url = url
        self._follow = FOLLOWS[kind]
        self.cursor: str | None = None
        self.shown: dict[str, Any] = {}
        self.order: list[str] = []
        """The messages as they came."""
        self.connects = 0
        self.resets = 0

    async def run(self) -> None:
        while True:
            with suppress(Cut, ConnectionError):
                async with (
                    connect(self._url) as line,
                    aclosing(self._follow(line, self.cursor)) as batches,
                ):
                    self.connects += 1
                    async for batch in batches:
                        for change in batch.changes:
                            await self._take(change)
                        self.cursor = batch.cursor
            await asyncio.sleep(0.05)

    async def _take(self, change: Change) -> None:
        match change.kind:
            case "chatt":
                self.shown[change.data["id"]] = change.data
                self.order.append(change.data["message"])
            case "delete":
                self.shown.pop(change.data["id"], None)
            case _:
                self.resets += 1
                async with connect(self._url) as line:
                    answer = await line.ask("GET", "/v1/chatts?limit=500")
                if answer.status != 200:
                    raise Cut
                self.shown = {chatt["id"]: chatt for chatt in answer.json["chatts"]}


@asynccontextmanager
async def timelines(url: str, kind: str, count: int = 1) -> AsyncIterator[list[Timeline]]:
    """Keep timelines that have begun to follow; what fails in them fails here."""
    found = [Timeline(url, kind) for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(timeline.run()) for timeline in found]
        await until(lambda: all(timeline.cursor is not None for timeline in found))
        yield found
        for task in tasks:
            task.cancel()


FOLLOWS: Mapping[str, Follow] = {"stream": stream, "poll": poll, "websocket": websocket}
