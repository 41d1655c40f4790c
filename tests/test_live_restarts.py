"""Those who follow, when PostgreSQL or the server stops, and when one of them does not read."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest

from tests.conftest import connected
from tests.live import (
    Blocks,
    Cut,
    connect,
    frames,
    open_stream,
    open_websocket,
    post,
    stream,
    timelines,
    websocket,
)
from tests.multipart import encode, fields, form_type, image, until
from tests.samples import longer_jpeg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartServer
    from tests.live import Answer, Batch, Follow, Line
    from tests.multipart import Connection
    from tests.process import Cluster, Server

STREAMS, POLLS, WEBSOCKETS = 100, 5, 5
STOP_SECONDS = 3
PATIENCE_SECONDS = 5
SMALL_BUFFER = 4096
LONG_MESSAGES = """
    INSERT INTO chatts (name, message)
    SELECT 'ann', rpad(number::text || ' ', 4000, 'x') FROM generate_series($1::int, $2) AS number
"""
LEAST = "1048576"
"""The smallest FEED_CACHE_BYTES."""


async def test_streams_catch_up_when_postgresql_has_been_restarted(
    cluster: Cluster, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=cluster.url)
    async with timelines(server.url, "stream", 50) as streams, connect(server.url) as line:
        for number in range(3):
            for _ in range(10):
                await post(line, f"{number}")
            await asyncio.to_thread(cluster.stop)
            await asyncio.to_thread(cluster.start)
            # While the server does not know yet that it is back, another program posts.
            async with connected(cluster.url) as psql:
                await psql.execute("INSERT INTO chatts (name, message) VALUES ('ann', 'psql')")
                await until_posted(line, "again")
                rows = await psql.fetch("SELECT message FROM chatts ORDER BY seq")
            order = [row["message"] for row in rows]
            await until(lambda order=order: all(one.order == order for one in streams))  # type: ignore[misc] # mypy#1484
        assert {one.resets for one in streams} == {0}
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log


async def until_posted(line: Line, message: str) -> None:
    body = json.dumps({"name": "ann", "message": message}).encode()
    with anyio.fail_after(20):
        while (answer := await line.ask("POST", "/v1/chatts", body)).status != 201:
            assert answer.status == 503, answer


class Audience:
    """Everybody who waits for something of a server that stops."""

    def __init__(self, server: Server, group: asyncio.TaskGroup) -> None:
        self._url = server.url
        self.waiting = 0
        start = group.create_task
        self.streams = [start(self._stream()) for _ in range(STREAMS)]
        self.polls = [start(self._poll()) for _ in range(POLLS)]
        self.websockets = [start(self._websocket()) for _ in range(WEBSOCKETS)]

    async def _stream(self) -> list[int]:
        """Return what the stream said of when to come again, at its proper end."""
        blocks = Blocks()
        async with (
            connect(self._url) as line,
            aclosing(open_stream(line, blocks, None)) as batches,
        ):
            await anext(batches)
            self.waiting += 1
            assert [batch async for batch in batches] == []
        return blocks.retries

    async def _poll(self) -> Answer:
        async with connect(self._url) as line:
            cursor = (await line.ask("GET", "/v1/chatts")).json["cursor"]
            await line.begin("GET", f"/v1/chatts?since={cursor}&wait=55")
            self.waiting += 1
            return await line.whole()

    async def _websocket(self) -> None:
        async with connect(self._url) as line:
            connection = await open_websocket(line)
            self.waiting += 1
            async with aclosing(frames(line, connection)) as received:
                assert [frame async for frame in received] == []


async def test_a_server_that_stops_lets_go_of_everybody_properly_and_in_time(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        audience = Audience(server, group)
        await until(lambda: audience.waiting == STREAMS + POLLS + WEBSOCKETS)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(server.wait)
        seconds = time.monotonic() - started
    assert status == 0, server.log
    assert seconds < STOP_SECONDS
    for task in audience.streams:
        first, last = task.result()
        assert first == 2_000
        assert last > 0
    for poll in audience.polls:
        assert poll.result().status in {200, 503}, poll.result()
    assert "Traceback" not in server.log, server.log


class InTwo:
    """A post and an upload, the rest of which comes when the server has been told to stop."""

    def __init__(self, server: Server, group: asyncio.TaskGroup) -> None:
        self._url = server.url
        self.waiting = 0
        self.stopping = asyncio.Event()
        self.posted = group.create_task(self._post())
        self.uploaded = group.create_task(self._upload())

    async def _post(self) -> Answer:
        body = json.dumps({"name": "ann", "message": "under way"}).encode()
        return await self._in_two("/v1/chatts", body, len(body) // 2, "application/json")

    async def _upload(self) -> Answer:
        body = encode(*fields("ann", "under way"), image(longer_jpeg(5_000_000)))
        return await self._in_two(
            "/postimages", body, len(body) - 100_000, form_type()["Content-Type"]
        )

    async def _in_two(self, path: str, body: bytes, at: int, content_type: str) -> Answer:
        async with connect(self._url) as line:
            await line.begin("POST", path, Content_Length=str(len(body)), Content_Type=content_type)
            await line.body(body[:at])
            self.waiting += 1
            await self.stopping.wait()
            return await line.whole(body[at:])


async def test_what_is_under_way_gets_its_answer_beside_clients_that_do_not_read(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, SHUTDOWN_TIMEOUT=str(PATIENCE_SECONDS))
    async with AsyncExitStack() as stack:
        for follow in (stream, websocket):
            await stack.enter_async_context(unread(server, follow))
        await psql.execute(LONG_MESSAGES, 1, 2_000)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            requests = InTwo(server, group)
            await until(lambda: requests.waiting == 2)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await until_refused(server)
            requests.stopping.set()
            status = await asyncio.to_thread(server.wait)
            seconds = time.monotonic() - started
    assert status == 0, server.log
    assert seconds < PATIENCE_SECONDS + STOP_SECONDS
    for request, status in (requests.posted, 201), (requests.uploaded, 200):
        assert request.result().status == status
        assert request.result().headers["connection"] == "close"
    assert "Traceback" not in server.log, server.log
    rows = await psql.fetch("SELECT image FROM chatts WHERE message = 'under way'")
    assert sorted(row["image"] is not None for row in rows) == [False, True]


async def until_refused(server: Server) -> None:
    """Wait until nobody can connect any more."""
    with anyio.fail_after(20), suppress(ConnectionError):
        while True:
            async with connect(server.url):
                pass


@asynccontextmanager
async def unread(server: Server, follow: Follow) -> AsyncIterator[None]:
    """Follow from now on, and read no more than the beginning."""
    async with (
        connect(server.url, buffer_bytes=SMALL_BUFFER) as line,
        aclosing(follow(line, None)) as batches,
    ):
        await anext(batches)
        yield


@pytest.mark.parametrize("follow", [stream, websocket])
async def test_who_stops_reading_holds_nobody_up_is_cut_and_goes_on_without_a_gap(
    own_database: str, psql: Connection, start_server: StartServer, follow: Follow
) -> None:
    server = start_server(
        DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST, STREAM_MAX_SUBSCRIBERS="2"
    )
    process = psutil.Process(server.pid)
    rounds, each = 20, 500
    got = Got()
    async with (
        timelines(server.url, "stream") as (other,),
        connect(server.url, buffer_bytes=SMALL_BUFFER) as line,
        aclosing(follow(line, None)) as batches,
    ):
        got.cursor = (await anext(batches)).cursor
        await psql.execute(LONG_MESSAGES, 1, each)
        await until(lambda: len(other.order) == each)
        resident = process.memory_info().rss
        for number in range(1, rounds):
            await psql.execute(LONG_MESSAGES, number * each + 1, (number + 1) * each)
            await until(lambda number=number: len(other.order) == (number + 1) * each)  # type: ignore[misc] # mypy#1484
        # 38 MB were posted meanwhile.
        assert process.memory_info().rss - resident < 16 << 20
        await until_there_is_room(server)
        with pytest.raises(Cut):
            await got.read(batches, rounds * each)
    assert 0 < len(got.order) < rounds * each
    async with connect(server.url) as line, aclosing(follow(line, got.cursor)) as batches:
        await got.read(batches, rounds * each)
    assert got.order == other.order
    assert [message.split()[0] for message in got.order] == [
        str(number + 1) for number in range(rounds * each)
    ]


class Got:
    """The messages that somebody got, and where to go on."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.cursor: str | None = None

    async def read(self, batches: AsyncIterator[Batch], enough: int) -> None:
        while len(self.order) < enough:
            batch = await anext(batches)
            self.cursor = batch.cursor
            self.order += [change.data["message"] for change in batch.changes]


async def until_there_is_room(server: Server) -> None:
    """Wait until the server has one subscriber less than it may have."""
    with anyio.fail_after(20):
        while True:
            async with connect(server.url) as line:
                await line.begin("GET", "/v1/stream")
                head = await line.answer()
            if head.status_code == 200:
                return
            assert head.status_code == 503, head
            await asyncio.sleep(0.05)
