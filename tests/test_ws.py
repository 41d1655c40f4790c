"""/v1/ws: the log and posting over a WebSocket (contract §2)."""

from __future__ import annotations

import asyncio
import json
import ssl
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import anyio
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.conftest import client_of, database_away
from tests.multipart import DEADLINE_SECONDS, TITLES, encode, fields, form_type, image
from tests.objects import TOMBSTONE, base_of, delete, objects, post
from tests.samples import JPEG
from tests.streams import Event, has_place, place_is_free, stream_of
from tests.test_feed import A_FEW, INSERT_MANY
from tests.test_longpoll import cursor_of, no_cursors
from tests.test_stream import log_of
from tests.test_tls import authority, pem, tls_options, trusting
from tests.test_writer import held_log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2
    from sqlalchemy.engine import URL

    from tests.conftest import StartServer
    from tests.multipart import Connection, Server

    Frame: TypeAlias = dict[str, Any]

__all__ = ["authority", "pem", "tls_options", "trusting"]  # fixtures

JSON_LIMIT = 65_536
DRAFT = {"name": "ann", "message": "hi"}
NO_FRAMES = {
    "empty": "",
    "no JSON": "hello",
    "cut": '{"since":null',
    "two": '{"since":null}{"since":null}',
    "null": "null",
    "number": "1",
    "string": '"since"',
    "array": '[{"since":null}]',
    "empty object": "{}",
    "unknown": '{"subscribe":null}',
    "both": '{"since":null,"post":{"name":"ann","message":"hi"}}',
    "one too many": '{"since":null,"x":1}',
    "key alone": '{"key":"a"}',
    "number as cursor": '{"since":1}',
    "object as cursor": '{"since":{}}',
    "text as post": '{"post":"hi"}',
    "null as post": '{"post":null}',
    "array as post": '{"post":["ann","hi"]}',
    "number as key": '{"post":{"name":"ann","message":"hi"},"key":1}',
    "lone surrogate": '{"post":{"name":"ann","message":"\\ud800"}}',
    "deep": "[" * 30_000,
    "deep in a post": '{"post":' * 7_000 + "1" + "}" * 7_000,
}
NO_POSTS = {
    "name-missing": {"message": "hi"},
    "message-missing": {"name": "ann"},
    "name-blank": {"name": " ", "message": "hi"},
    "name-invalid": {"name": None, "message": "hi"},
    "message-invalid": {"name": "ann", "message": "\0"},
    "field-unknown": {"name": "ann", "message": "hi", "image": "x"},
    "name-ambiguous": {"name": "ann", "username": "bob", "message": "hi"},
    "message-too-long": {"name": "ann", "message": "m" * 4_097},
    "name-too-long": {"username": "n" * 256, "message": "hi"},
}


class Socket:
    """A connection to /v1/ws, with a time limit for each frame."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def say(self, **frame: object) -> None:
        await self.connection.send(json.dumps(frame))

    async def text(self) -> str:
        with anyio.fail_after(DEADLINE_SECONDS):
            text = await self.connection.recv()
        assert isinstance(text, str)
        return text

    async def frame(self) -> Frame:
        """Read the next frame, whose JSON is compact."""
        text = await self.text()
        frame: Frame = json.loads(text)
        assert text == json.dumps(frame, ensure_ascii=False, separators=(",", ":"))
        return frame

    async def follow(self, since: str | None = None) -> str:
        """Ask for what comes after a cursor; return where that begins."""
        await self.say(since=since)
        frame = await self.frame()
        assert frame == {"event": "ready", "id": frame["id"], "data": {}}
        cursor: str = frame["id"]
        return cursor

    async def events(self, count: int) -> list[Event]:
        """Read events, as the stream has them."""
        found = []
        for _ in range(count):
            text = await self.text()
            frame = json.loads(text)
            assert list(frame) == ["event", "id", "data"]
            data = text.partition('"data":')[2][:-1].encode()
            found.append(Event(frame["event"], frame["id"], data))
        return found

    async def error(self, code: str, key: str | None = None) -> Frame:
        """Read an error; return the problem."""
        frame = await self.frame()
        assert list(frame) == ["error", "key"], frame
        assert frame["key"] == key
        problem: Frame = frame["error"]
        assert list(problem) == ["type", "title", "status", "detail", "code", "request_id"]
        assert problem["code"] == code
        assert problem["title"] == TITLES[problem["status"]]
        response = self.connection.response
        assert response is not None
        assert problem["request_id"] == response.headers["x-request-id"]
        return problem

    async def closed(self) -> int | None:
        """Read to the end; return the code."""
        with anyio.fail_after(DEADLINE_SECONDS):
            try:
                while True:
                    await self.connection.recv()
            except ConnectionClosed as error:
                return None if error.rcvd is None else error.rcvd.code


@asynccontextmanager
async def socket_of(
    server: Server,
    path: str = "/v1/ws",
    *,
    context: ssl.SSLContext | None = None,
    host: str | None = None,
    request_id: str = "",
) -> AsyncIterator[Socket]:
    """Connect; `host` is what the request says of it."""
    address = urlsplit(server.url)
    assert address.hostname
    is_tls = address.scheme == "https"
    async with connect(
        f"{address.scheme.replace('http', 'ws')}://{host or address.netloc}{path}",
        host=address.hostname,
        port=address.port,
        proxy=None,
        ssl=(context or ssl.create_default_context()) if is_tls else None,
        server_hostname=address.hostname if is_tls else None,
        additional_headers={"X-Request-Id": request_id},
    ) as connection:
        yield Socket(connection)


async def refusal(
    server: Server, path: str = "/v1/ws", host: str | None = None
) -> tuple[int, Frame]:
    """Try to connect; return the status and the problem of the refusal."""
    with pytest.raises(InvalidStatus) as refused:
        async with socket_of(server, path, host=host):
            pass
    response = refused.value.response
    assert response.headers["content-type"] == "application/problem+json"
    assert response.body is not None
    problem: Frame = json.loads(response.body)
    assert problem["request_id"] == response.headers["x-request-id"]
    return response.status_code, problem | {"retry-after": response.headers.get("retry-after")}


# Following


@pytest.mark.parametrize("path", ["/v1/ws", "/v1/ws/"])
async def test_nothing_is_sent_until_the_client_says_from_where(
    server: Server, client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    async with socket_of(server, path) as socket:
        await post(client, "before")
        cursor = await cursor_of(client)
        await socket.say(since=None)
        assert await socket.text() == f'{{"event":"ready","id":"{cursor}","data":{{}}}}'
        await post(client, "after\r\n😀")
        (event,) = await log_of(database, base_of(client), cursor)
        text = f'{{"event":"chatt","id":"{event.id}","data":{event.data.decode()}}}'
        assert await socket.text() == text


async def test_what_happens_is_told_as_the_stream_tells_it(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    async with socket_of(server) as socket, stream_of(client) as stream:
        begin = await socket.follow()
        assert await stream.begin() == begin

        async def told() -> list[Event]:
            nonlocal begin
            wanted = await log_of(database, base_of(client), begin)
            assert await socket.events(len(wanted)) == wanted
            assert await stream.events(len(wanted)) == wanted
            begin = wanted[-1].id
            return wanted

        form = encode(*fields("日本語", "look"), image(JPEG))
        await client.post("/postimages", content=form, headers=form_type())
        await told()
        chatt = await post(client, "soon deleted")
        await told()
        await delete(client, chatt)
        (deleted,) = await told()
        assert (deleted.kind, deleted.data) == ("delete", b'{"id":"%b"}' % chatt["id"].encode())
        await database.execute(A_FEW)
        await told()
        await database.execute("UPDATE chatts SET message = 'x', image = 'a b.jpg'")
        await told()
        await database.execute("TRUNCATE chatts")
        reset = Event("reset", await cursor_of(client), b"{}")
        assert await socket.events(1) == await stream.events(1) == [reset]


async def test_whoever_comes_back_with_a_cursor_goes_on_behind_it(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    start = await cursor_of(client)
    await database.execute(INSERT_MANY.format(1_200))
    await database.execute(f"{TOMBSTONE} WHERE seq % 7 = 0")
    for number in (0, 1, 600, 1_200):
        wanted = await log_of(database, base_of(client), start)
        cursor = wanted[number - 1].id if number else start
        async with socket_of(server) as socket:
            assert await socket.follow(cursor) == cursor
            assert await socket.events(len(wanted) - number) == wanted[number:]
            chatt = await post(client, "news")
            (event,) = await socket.events(1)
            assert event.json()["id"] == chatt["id"]


@pytest.mark.parametrize("kind", no_cursors("0.1.1"))
async def test_a_cursor_that_cannot_be_resumed_is_answered_with_reset(
    server: Server, client: httpx2.AsyncClient, database: Connection, kind: str
) -> None:
    await database.execute(A_FEW)
    cursor = await cursor_of(client)
    async with socket_of(server) as socket:
        assert await socket.follow(no_cursors(cursor)[kind]) == cursor
        assert await socket.events(1) == [Event("reset", cursor, b"{}")]
        chatt = await post(client, "after")
        (event,) = await socket.events(1)
        assert event.json()["id"] == chatt["id"]


async def test_a_second_cursor_is_refused_and_the_first_goes_on(
    server: Server, client: httpx2.AsyncClient
) -> None:
    async with socket_of(server) as socket:
        cursor = await socket.follow()
        for since in (cursor, None, "nonsense"):
            await socket.say(since=since)
            assert (await socket.error("frame-invalid"))["status"] == 422
        chatt = await post(client, "hi")
        (event,) = await socket.events(1)
        assert event.json()["id"] == chatt["id"]


@pytest.mark.usefixtures("client")
async def test_addresses_are_of_the_host_that_each_client_asked(
    server: Server, database: Connection
) -> None:
    hosts = ["one.example", "other.example:8443", "one.example"]
    scheme = urlsplit(server.url).scheme
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(socket_of(server, host=host)) for host in hosts]
        begins = [await socket.follow() for socket in sockets]
        await database.execute(A_FEW)
        for socket, begin, host in zip(sockets, begins, hosts, strict=True):
            assert await socket.events(5) == await log_of(database, f"{scheme}://{host}", begin)


async def test_over_tls_addresses_are_https(
    own_database: str,
    psql: Connection,
    start_server: StartServer,
    tls_options: tuple[str, ...],
    trusting: ssl.SSLContext,
) -> None:
    server = start_server(*tls_options, DATABASE_URL=own_database)
    async with socket_of(server, context=trusting) as socket:
        begin = await socket.follow()
        await psql.execute(A_FEW)
        assert await socket.events(5) == await log_of(psql, server.url, begin)
        assert server.url.startswith("https://")
        await socket.say(post=DRAFT)
        frames = [await socket.frame(), await socket.frame()]
        assert sorted(next(iter(frame)) for frame in frames) == ["event", "posted"]


# Posting


@pytest.mark.parametrize("spelling", ["name", "username"])
@pytest.mark.parametrize("following", [True, False])
async def test_a_post_is_answered_with_the_chatt_and_its_delete_token(
    server: Server,
    client: httpx2.AsyncClient,
    database: Connection,
    spelling: str,
    *,
    following: bool,
) -> None:
    async with socket_of(server) as socket:
        if following:
            await socket.follow()
        await socket.say(post={spelling: "日本語", "message": "😀"})
        frames = [await socket.frame() for _ in range(2 if following else 1)]
        (answer,) = (frame for frame in frames if "posted" in frame)
        (chatt,) = await objects(database, base_of(client))
        posted = answer["posted"]
        assert list(posted) == [*chatt, "delete_token"]
        assert posted == chatt | {"delete_token": posted["delete_token"]}
        assert answer == {"posted": posted, "key": None, "replayed": False}
        assert (chatt["name"], chatt["message"]) == ("日本語", "😀")
        if following:
            (event,) = (frame for frame in frames if "event" in frame)
            assert event["data"] == chatt
        await delete(client, posted)
        assert await database.fetchval("SELECT count(*) FROM idempotency_keys") == 0


@pytest.fixture(autouse=True)
async def no_keys(database: Connection) -> None:
    await database.execute("TRUNCATE idempotency_keys")


async def test_a_post_with_a_key_is_stored_once_also_beside_http(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    header = {"Idempotency-Key": "of-http"}
    by_http = await client.post("/v1/chatts", json=DRAFT, headers=header)
    async with socket_of(server) as socket, socket_of(server) as other:
        await socket.say(post=DRAFT, key="a")
        first = await socket.frame()
        assert (first["key"], first["replayed"]) == ("a", False)
        for again in (socket, other):
            await again.say(post=DRAFT, key="a")
            assert await again.frame() == first | {"replayed": True}
        await other.say(post=DRAFT, key="of-http")
        replay = {"posted": by_http.json(), "key": "of-http", "replayed": True}
        assert await other.frame() == replay
        for draft in (DRAFT | {"message": "Hi"}, DRAFT | {"name": "Ann"}):
            await socket.say(post=draft, key="a")
            await socket.error("idempotency-key-reused", "a")
        await socket.say(post=DRAFT, key=None)
        assert (await socket.frame())["key"] is None
    response = await client.post("/v1/chatts", json=DRAFT, headers={"Idempotency-Key": "a"})
    assert response.headers["idempotency-replayed"] == "true"
    assert response.json() == first["posted"]
    assert await database.fetchval("SELECT count(*) FROM chatts") == 3
    await delete(client, first["posted"])


async def test_while_the_first_with_a_key_is_under_way_others_are_told_so(
    own_database: str, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with (
        socket_of(one) as first,
        socket_of(one) as second,
        socket_of(other) as third,
        held_log(own_database) as log,
    ):
        await first.say(post=DRAFT, key="a")
        await log.waited_for()
        for socket in (second, third):
            await socket.say(post=DRAFT, key="a")
            assert (await socket.error("idempotency-key-in-use", "a"))["status"] == 409
        await log.release()
        assert not (await first.frame())["replayed"]


@pytest.mark.parametrize("key", ["", "a b", "k" * 256, "ключ", '"', "\0"])
async def test_what_is_no_key_is_refused(
    server: Server, client: httpx2.AsyncClient, key: str
) -> None:
    async with socket_of(server) as socket:
        await socket.say(post=DRAFT, key=key)
        await socket.error("idempotency-key-invalid")
    assert (await client.get("/getchatts")).content == b"[]"


async def test_what_is_no_chatt_is_refused_and_the_connection_goes_on(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    async with socket_of(server) as socket:
        for code, draft in NO_POSTS.items():
            for key in ({}, {"key": "a"}):
                await socket.say(post=draft, **key)
                problem = await socket.error(code, key.get("key"))
                assert problem["status"] == (400 if code.endswith("too-long") else 422)
        assert await database.fetchval("SELECT count(*) FROM chatts") == 0
        await socket.say(post=DRAFT, key="a")  # which is as free as before
        assert not (await socket.frame())["replayed"]
    assert len((await client.get("/getchatts")).json()) == 1


async def test_posts_of_many_connections_reach_all_in_one_order(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(socket_of(server)) for _ in range(8)]
        begin = {await socket.follow() for socket in sockets}.pop()

        async def chat(socket: Socket) -> list[str]:
            for number in range(20):
                await socket.say(
                    post={"name": "ann", "message": str(number)}, key=str(id(socket) + number)
                )
            frames = [await socket.frame() for _ in range(20 + 160)]
            posted = [frame["posted"]["id"] for frame in frames if "posted" in frame]
            events = [frame["data"]["id"] for frame in frames if "event" in frame]
            # One's own chatts come in the order in which they were sent.
            assert [each for each in events if each in posted] == posted
            return events

        told = await asyncio.gather(*(chat(socket) for socket in sockets))
        wanted = [event.json()["id"] for event in await log_of(database, base_of(client), begin)]
        assert len(wanted) == 160
        assert all(events == wanted for events in told)


# Frames


async def test_what_is_no_frame_is_answered_and_the_connection_goes_on(
    server: Server, client: httpx2.AsyncClient
) -> None:
    async with socket_of(server) as socket:
        for text in NO_FRAMES.values():
            await socket.connection.send(text)
            assert (await socket.error("frame-invalid"))["status"] == 422, text
        for data in (b"", b'{"since":null}', b"\xff" * 1_000):
            await socket.connection.send(data)
            await socket.error("frame-invalid")
        await socket.follow()
        await socket.connection.send(NO_FRAMES["unknown"])
        await socket.error("frame-invalid")
        await socket.connection.send(['{"post":', '{"name":"ann",', '"message":"in parts"}}'])
        frames = [await socket.frame(), await socket.frame()]
        assert {next(iter(frame)) for frame in frames} == {"event", "posted"}
        pong = await socket.connection.ping()
        with anyio.fail_after(DEADLINE_SECONDS):
            await pong
    assert len((await client.get("/getchatts")).json()) == 1


@pytest.mark.parametrize("parts", [1, 2, 3])
async def test_a_message_over_the_limit_closes_the_connection(
    server: Server, client: httpx2.AsyncClient, parts: int
) -> None:
    text = json.dumps({"post": DRAFT})
    async with socket_of(server) as socket:
        await socket.connection.send(text.ljust(JSON_LIMIT))
        assert "posted" in await socket.frame()
        # The last part is behind the limit; what comes after it counts no more.
        longer = text.ljust(JSON_LIMIT + parts)
        size = len(longer) // parts + 1
        pieces = [longer[at : at + size] for at in range(0, len(longer), size)]
        assert len(pieces) == parts
        await socket.connection.send(pieces if parts > 1 else longer)
        with suppress(ConnectionClosed):
            await socket.say(post=DRAFT)
        assert await socket.closed() == 1009
    assert len((await client.get("/getchatts")).json()) == 1


@pytest.mark.usefixtures("client")
async def test_nothing_is_compressed(server: Server) -> None:
    """64 KiB may have been compressed from 64 MiB."""
    async with socket_of(server) as socket:
        response = socket.connection.response
        assert response is not None
        assert "sec-websocket-extensions" not in response.headers


# Places, and the end


async def test_beyond_the_last_place_a_client_is_refused_before_it_is_connected(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, STREAM_MAX_SUBSCRIBERS="1")
    async with client_of(server) as client:
        for leave in ("close", "drop"):
            async with socket_of(server) as socket:
                status, problem = await refusal(server)
                assert (status, problem["code"]) == (503, "too-many-subscribers")
                assert 1 <= int(problem["retry-after"]) <= 5
                assert not await has_place(client)
                await socket.follow()
                if leave == "drop":
                    socket.connection.transport.abort()
            await place_is_free(client)
        async with stream_of(client) as stream:
            await stream.begin()
            assert (await refusal(server))[0] == 503


async def test_what_is_refused_before_it_is_connected_is_told_why(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, ALLOWED_HOSTS="chatter.example,127.0.0.1")
    status, problem = await refusal(server, host="evil.example")
    assert (status, problem["code"]) == (400, "host-not-allowed")
    for path in ("/v1/wsx", "/v1/chatts", "/v1/stream"):
        status, problem = await refusal(server, path)
        assert (status, problem["code"]) == (404, "not-found")
    async with socket_of(server, host="chatter.example", request_id="mine") as socket:
        await socket.connection.send("x")
        assert (await socket.error("frame-invalid"))["request_id"] == "mine"


async def test_while_the_database_is_away_each_frame_is_told_so(
    own_database: str, postgres_url: URL, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with socket_of(server) as socket:
        async with database_away(own_database, postgres_url):
            for frame in ({"since": None}, {"post": DRAFT}):
                await socket.say(**frame)
                assert (await socket.error("database-unavailable"))["status"] == 503
            await socket.say(post=DRAFT, key="a")
            await socket.error("database-unavailable", "a")
        await socket.follow()
        await socket.say(post=DRAFT, key="a")
        frames = [await socket.frame(), await socket.frame()]
        assert {next(iter(frame)) for frame in frames} == {"event", "posted"}


async def test_a_server_that_stops_says_goodbye(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with socket_of(server) as silent, socket_of(server) as following:
        await following.follow()
        server.process.terminate()
        assert await following.closed() == 1012
        assert await silent.closed() == 1012
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.log
