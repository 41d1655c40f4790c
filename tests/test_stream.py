"""GET /v1/stream: what happens, as Server-Sent Events (contract §2)."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests.conftest import client_of, database_away
from tests.multipart import connect, encode, fields, form_type, image, problem
from tests.objects import TOMBSTONE, base_of, delete, objects, post
from tests.samples import JPEG
from tests.streams import Event, EventStream, has_place, http_2, place_is_free, stream_of
from tests.test_feed import A_FEW, INSERT_MANY
from tests.test_longpoll import cursor_of, no_cursors
from tests.test_tls import authority, pem, tls_options, trusting

if TYPE_CHECKING:
    import ssl

    from sqlalchemy.engine import URL

    from tests.conftest import StartServer
    from tests.multipart import Connection

__all__ = ["authority", "pem", "tls_options", "trusting"]  # fixtures

INSERT = "INSERT INTO chatts (name, message) VALUES ('psql', $1)"
HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-store",
    # Nginx would otherwise collect events before it passes them on.
    "x-accel-buffering": "no",
}


async def log_of(psql: Connection, base: str, after: str | None = None) -> list[Event]:
    """What a stream from `after`, or from the beginning, has to say by now."""
    chatts = {chatt["id"]: chatt for chatt in await objects(psql, base)}
    head = await psql.fetchrow("SELECT epoch, 'chatts'::regclass::oid AS oid FROM feed")
    assert head is not None
    log = f"{head['epoch'].hex}.{head['oid']}"
    assert after is None or after.startswith(f"{log}.")
    seq = 0 if after is None else int(after.rpartition(".")[2])
    rows = await psql.fetch("SELECT seq, id::text FROM chatts WHERE seq > $1 ORDER BY seq", seq)
    events = []
    for row in rows:
        chatt = chatts.get(row["id"])
        data = json.dumps(chatt or {"id": row["id"]}, ensure_ascii=False, separators=(",", ":"))
        kind = "delete" if chatt is None else "chatt"
        events.append(Event(kind, f"{log}.{row['seq']}", data.encode()))
    return events


# The head and the beginning


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/stream/"])
async def test_a_stream_begins_with_the_place_where_it_is(
    client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    await database.execute(A_FEW)
    cursor = await cursor_of(client)
    async with client.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as response:
        assert response.status_code == 200
        for name, value in HEADERS.items():
            assert response.headers[name] == value
        for name in ("content-length", "content-encoding", "etag"):
            assert name not in response.headers
        assert response.headers["x-request-id"]
        # An id without data sets what the client comes back with, and is no event.
        block = await EventStream(response).block()
        assert block == f"retry: 2000\nid: {cursor}\n\n".encode()


async def test_head_answers_the_head_and_takes_no_place(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, STREAM_MAX_SUBSCRIBERS="1")
    async with connect(server.url) as wire:
        for _ in range(3):
            await wire.request("HEAD", "/v1/stream")
            head = await wire.answer("HEAD")
            assert head.status_code == 200
            assert {name: head.headers[name] for name in HEADERS} == HEADERS
        # The connection is good for the next request.
        await wire.request("GET", "/v1/chatts")
        assert (await wire.answer()).status_code == 200


# Events


async def test_each_event_is_what_it_is_byte_for_byte(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    async with stream_of(client) as stream:
        begin = await stream.begin()
        first = await post(client, "a\r\nb\rc\n\nevent: x\u2028😀")
        form = encode(*fields("日本語", "look"), image(JPEG))
        await client.post("/postimages", content=form, headers=form_type())
        await client.post("/postchatt", json={"name": "bob", "message": ""})
        wanted = await log_of(database, base_of(client), begin)
        assert [event.kind for event in wanted] == ["chatt"] * 3
        for event in wanted:
            block = b"event: chatt\nid: %b\ndata: %b\n\n" % (event.id.encode(), event.data)
            assert await stream.block() == block
        # The cursor of the newest event is that of the list which shows it.
        cursor = await cursor_of(client)
        assert cursor == wanted[-1].id
        await delete(client, first)
        cursor = await cursor_of(client)
        deleted = f'event: delete\nid: {cursor}\ndata: {{"id":"{first["id"]}"}}\n\n'
        assert await stream.block() == deleted.encode()
        await database.execute("TRUNCATE chatts")
        cursor = await cursor_of(client)
        assert await stream.block() == f"event: reset\nid: {cursor}\ndata: {{}}\n\n".encode()
        chatt = await post(client, "after")
        assert (await stream.event()).json()["id"] == chatt["id"]


async def test_whatever_program_changes_chatts_is_heard(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with client_of(one) as here, client_of(other) as there, stream_of(here) as stream:
        begin = await stream.begin()
        began = time.monotonic()

        async def assert_told() -> None:
            nonlocal begin
            wanted = await log_of(psql, one.url, begin)
            assert wanted
            assert await stream.events(len(wanted)) == wanted
            begin = wanted[-1].id

        chatt = await post(there, "there")
        await assert_told()
        await delete(there, chatt)
        await assert_told()
        for sql in (
            "INSERT INTO chatts (name, message) SELECT 'psql', 'x' FROM generate_series(1, 700)",
            "INSERT INTO chatts (name, message, time) VALUES ('psql', 'past', '1999-01-01')",
            "UPDATE chatts SET message = 'y', image = 'a b.jpg' WHERE seq % 50 = 0",
            f"{TOMBSTONE} WHERE message = 'past'",
        ):
            await psql.execute(sql)
            await assert_told()
        # Two at once: the one that is committed first is told first.
        async with psql.transaction():
            await psql.execute(INSERT, "within a transaction")
            await psql.execute(INSERT, "within the same")
        await post(here, "here")
        await assert_told()
        # Nobody has waited for a periodic look at the table.
        assert time.monotonic() - began < 14


async def test_what_is_rolled_back_is_not_heard(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    async with stream_of(client) as stream:
        await stream.begin()
        await database.execute("BEGIN; INSERT INTO chatts (name, message) VALUES ('n', 'never')")
        await database.execute("ROLLBACK")
        await post(client, "ever")
        assert (await stream.event()).json()["message"] == "ever"


async def test_addresses_are_of_the_host_that_each_reader_asked(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    hosts = ["one.example", "other.example:8443", "one.example", "[2001:db8::7]"]
    async with client_of(server) as client, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(stream_of(client, Host=host)) for host in hosts]
        begins = [await stream.begin() for stream in streams]
        await psql.execute(A_FEW)
        for stream, begin, host in zip(streams, begins, hosts, strict=True):
            assert await stream.events(5) == await log_of(psql, f"http://{host}", begin)


async def test_the_public_url_is_used_whatever_the_host(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    public = "https://chatter.example"
    server = start_server(DATABASE_URL=own_database, PUBLIC_URL=public)
    async with client_of(server) as client, stream_of(client, Host="evil.example") as stream:
        begin = await stream.begin()
        await psql.execute(A_FEW)
        assert await stream.events(5) == await log_of(psql, public, begin)


# Coming back


async def test_whoever_comes_back_with_a_cursor_goes_on_behind_it(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    start = await cursor_of(client)
    await database.execute(A_FEW)
    for number in range(6):
        chatt = await post(client, str(number))
        if number % 2:
            await delete(client, chatt)
    wanted = await log_of(database, base_of(client), start)
    assert [event.kind for event in wanted].count("delete") == 3
    cursors = [start, *(event.id for event in wanted)]
    for number, cursor in enumerate(cursors):
        async with stream_of(client, cursor) as asked:
            assert await asked.begin() == cursor
            assert await asked.events(len(wanted) - number) == wanted[number:]
        # What the browser knows is newer than what the page was made with.
        async with stream_of(client, start, **{"Last-Event-ID": cursor}) as known:
            assert await known.begin() == cursor
            assert await known.events(len(wanted) - number) == wanted[number:]


async def test_more_changes_than_a_page_has_are_all_told_and_then_the_new_ones(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(1_200))
    # Some are longer than what goes out at once, some deleted.
    await psql.execute("UPDATE chatts SET message = repeat('😀', 4096) WHERE seq % 10 = 0")
    await psql.execute(f"{TOMBSTONE} WHERE seq % 7 = 0")
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client:
        start = (await cursor_of(client)).rpartition(".")[0] + ".0"
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(stream_of(client, start)) for _ in range(3)]
            for number in range(5):  # while they read
                await post(client, str(number))
            wanted = await log_of(psql, server.url)
            assert len(wanted) == 1_205
            for stream in streams:
                assert await stream.begin() == start
                assert await stream.events(1_205) == wanted
            await post(client, "last")
            for stream in streams:
                assert (await stream.event()).json()["message"] == "last"


async def test_more_than_is_kept_in_memory_is_told_without_a_gap_when_it_comes_at_once(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client, stream_of(client) as stream:
        await stream.begin()
        await psql.execute(
            "INSERT INTO chatts (name, message)"
            " SELECT 'psql', repeat('x', 30000) FROM generate_series(1, 400)"
        )
        wanted = await log_of(psql, server.url)
        assert sum(len(event.data) for event in wanted) > 12_000_000
        assert await stream.events(400) == wanted


@pytest.mark.parametrize("kind", no_cursors("0.1.1"))
async def test_a_cursor_that_cannot_be_resumed_is_answered_with_reset(
    client: httpx2.AsyncClient, database: Connection, kind: str
) -> None:
    await database.execute(A_FEW)
    cursor = await cursor_of(client)
    bad = no_cursors(cursor)[kind]
    in_header = bad.strip() == bad and bad.isascii() and bad
    ways: list[tuple[str, dict[str, str]]] = [(bad, {})]
    if in_header:
        ways.append((cursor, {"Last-Event-ID": bad}))
    for since, headers in ways:
        async with stream_of(client, since, **headers) as stream:
            await stream.begin()
            assert await stream.event() == Event("reset", cursor, b"{}")
            chatt = await post(client, "after")
            event = await stream.event()
            assert event.json()["id"] == chatt["id"]
            cursor = event.id


async def test_streams_that_come_and_go_amid_posts_miss_nothing_and_repeat_nothing(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    servers = [start_server(DATABASE_URL=own_database) for _ in range(2)]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(server)) for server in servers]
        start = (await cursor_of(clients[0])).rpartition(".")[0] + ".0"

        async def write(client: httpx2.AsyncClient) -> None:
            for number in range(60):
                chatt = await post(client, str(number))
                if number % 3 == 0:
                    await delete(client, chatt)

        async def read(count: int) -> list[Event]:
            """Read `count` events of one server, then of the other, up to the last chatt."""
            seen: list[Event] = []
            for visit in itertools.count():
                cursor = seen[-1].id if seen else start
                async with stream_of(clients[visit % 2], cursor) as stream:
                    assert await stream.begin() == cursor
                    for _ in range(count):
                        seen.append(await stream.event())
                        if b'"the last"' in seen[-1].data:
                            return seen
            raise AssertionError

        reading = [asyncio.create_task(read(count)) for count in (1_000, 40, 7)]
        await asyncio.gather(*(write(client) for client in clients))
        await post(clients[0], "the last")
        results = await asyncio.gather(*reading)
    rows = await psql.fetch("SELECT seq, id::text, deleted FROM chatts")
    for seen in results:
        numbers = [int(event.id.rpartition(".")[2]) for event in seen]
        assert numbers == sorted(set(numbers))
        # What was told of each chatt last is what it is.
        last = {event.json()["id"]: event for event in seen}
        told = {
            (int(event.id.rpartition(".")[2]), chatt_id, event.kind == "delete")
            for chatt_id, event in last.items()
        }
        assert told == {tuple(row) for row in rows}


# Places, and the end


async def test_beyond_the_last_place_a_client_is_told_to_come_again(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, STREAM_MAX_SUBSCRIBERS="2")
    async with client_of(server) as client:
        async with stream_of(client) as one, stream_of(client) as other:
            await one.begin()
            await other.begin()
            for method in ("GET", "HEAD"):
                response = await client.request(method, "/v1/stream")
                assert response.status_code == 503
                assert 1 <= int(response.headers["retry-after"]) <= 5
            response = await client.get("/v1/stream")
            problem(response, 503)
            assert response.json()["code"] == "too-many-subscribers"
            assert (await client.get("/v1/limits")).json()["stream_max_subscribers"] == 2
            assert (await post(client, "hi"))["message"] == "hi"
            assert [(await each.event()).kind for each in (one, other)] == ["chatt", "chatt"]
        for _ in range(3):  # who leaves gives the place back
            await place_is_free(client)
            async with stream_of(client) as one, stream_of(client) as other:
                await one.begin()
                await other.begin()
                assert not await has_place(client)


async def test_without_the_database_no_stream_begins(
    own_database: str, postgres_url: URL, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, STREAM_MAX_SUBSCRIBERS="1")
    async with client_of(server) as client:
        async with database_away(own_database, postgres_url):
            for path in (
                "/v1/stream",
                "/v1/chatts?since=a",
                "/v1/chatts",
                "/v1/chatts?since=a&wait=9",
            ):
                response = await client.get(path)
                problem(response, 503)
                assert response.json()["code"] == "database-unavailable"
                assert response.headers["retry-after"] == "1"
        # None of them has kept the place.
        async with stream_of(client) as stream:
            await stream.begin()
            await post(client, "back")
            assert (await stream.event()).json()["message"] == "back"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_stops_says_when_to_come_back_and_ends_the_stream(
    own_database: str, start_server: StartServer, signum: int
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(stream_of(client)) for _ in range(5)]
        for stream in streams:
            await stream.begin()
        chatt = await post(client, "last words")
        for stream in streams:
            assert (await stream.event()).json()["id"] == chatt["id"]
        server.process.send_signal(signum)
        for stream in streams:
            match = re.fullmatch(rb"retry: ([0-9]+)\n\n", await stream.block())
            assert match
            # They do not all come back at once.
            assert 1_000 <= int(match[1]) <= 4_000
            assert await stream.block() == b""
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.log


async def test_silence_is_broken_by_a_comment_every_fifteen_seconds(
    client: httpx2.AsyncClient,
) -> None:
    async with stream_of(client) as stream:
        await stream.begin()
        began = time.monotonic()
        assert await stream.block(20) == b":\n\n"
        assert 14 < time.monotonic() - began < 20
        chatt = await post(client, "hi")
        assert (await stream.event()).json()["id"] == chatt["id"]


async def test_over_http_2_streams_share_a_connection_and_leave_it_one_by_one(
    own_database: str,
    start_server: StartServer,
    tls_options: tuple[str, ...],
    trusting: ssl.SSLContext,
) -> None:
    settings = {"STREAM_MAX_SUBSCRIBERS": "2", "DATABASE_URL": own_database}
    server = start_server(*tls_options, **settings)
    async with (
        httpx2.AsyncClient(base_url=server.url, verify=trusting, timeout=30) as client,
        http_2(server.url, trusting) as connection,
    ):
        one, other = await connection.stream(), await connection.stream()
        for stream in (one, other):
            assert (await connection.until(stream, b"\n\n")).startswith(b"retry: 2000\nid: ")
        for number in range(3):
            chatt = await post(client, str(number))
            for stream in (one, other):
                data = await connection.until(stream, b"\n\n")
                assert data.startswith(b"event: chatt\n")
                assert chatt["id"].encode() in data
        assert not await has_place(client)
        await connection.leave(one)
        await place_is_free(client)
        third = await connection.stream()
        await connection.until(third, b"\n\n")
        await post(client, "news")
        for stream in (other, third):
            assert b'"news"' in await connection.until(stream, b"\n\n")
        server.process.terminate()
        for stream in (other, third):
            assert (await connection.until(stream, None)).startswith(b"retry: ")
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.log
