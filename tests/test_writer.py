"""Group commit: posts that wait share a transaction, and nothing else.

docs/decisions/0008-group-commit.md says how; here is what must hold.
"""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy.engine import make_url

from chatterd.database import Database
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.keys import Posted
from chatterd.media import SLOTS, Slot, StoredFile
from chatterd.media_sweep import Sweep
from chatterd.schemas import Draft
from chatterd.writer import Writer
from tests.conftest import client_of, connected
from tests.multipart import connect, encode, fields, files, form_type, image
from tests.process import DEADLINE_SECONDS
from tests.samples import JPEG
from tests.test_feed import draft, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable

    from tests.conftest import StartServer
    from tests.multipart import Connection
    from tests.process import Server

QUEUE_LIMIT = 10_000


class Log:
    """The log, held by another program's open transaction: whoever posts waits."""

    def __init__(self, holder: Connection, watcher: Connection) -> None:
        self._holder = holder
        self._watcher = watcher
        self._transaction = holder.transaction()

    async def hold(self) -> None:
        await self._transaction.start()
        await self._holder.execute("INSERT INTO chatts (name, message) VALUES ('holder', '')")

    async def release(self) -> None:
        await self._transaction.commit()

    async def waited_for(self) -> None:
        """Wait until somebody waits for the log."""
        waiting = (
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
        )
        with anyio.fail_after(DEADLINE_SECONDS):
            while not await self._watcher.fetchval(waiting):  # noqa: ASYNC110 - PostgreSQL has no event
                await asyncio.sleep(0.005)


@asynccontextmanager
async def held_log(url: str) -> AsyncIterator[Log]:
    """Hold the log until it is released, and at the end in any case."""
    async with connected(url) as holder, connected(url) as watcher:
        log = Log(holder, watcher)
        await log.hold()
        yield log


async def stored(db: Connection) -> Counter[str]:
    """How often each message is there."""
    records = await db.fetch("SELECT message FROM chatts WHERE name <> 'holder'")
    return Counter(record["message"] for record in records)


async def transactions(db: Connection) -> Counter[str]:
    """How many chatts each transaction has stored."""
    records = await db.fetch("SELECT xmin::text FROM chatts WHERE name <> 'holder'")
    return Counter(record["xmin"] for record in records)


async def post(server: Server, message: str) -> tuple[int, dict[str, object]]:
    async with connect(server.url) as wire:
        answer = await request(wire, "POST", "/postchatt", draft(message))
        return answer.status_code, json.loads(answer.content)


async def one_batch(
    server: Server, log: Log, posts: Iterable[Awaitable[tuple[int, dict[str, object]]]]
) -> list[tuple[int, dict[str, object]]]:
    """Have `posts` wait behind a first one for the log, so that they are stored together."""
    first = asyncio.create_task(post(server, "first"))
    await log.waited_for()
    others = [asyncio.ensure_future(waiting) for waiting in posts]
    await received(server, 1 + len(others))
    await log.release()
    assert await first == (200, {})
    return await asyncio.gather(*others)


async def received(server: Server, count: int) -> None:
    """Wait until so many requests have arrived, as far as the server's sockets can tell."""
    async with client_of(server) as client:
        # Each answer comes after a turn of the loop in which what had arrived was taken in.
        for _ in range(10 + count // 10):
            assert (await client.get("/nothing")).status_code == 404


async def test_concurrent_posts_share_a_few_transactions(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    messages = [f"number {number}" for number in range(64)]
    async with held_log(own_database) as log:
        answers = await one_batch(server, log, (post(server, message) for message in messages))
    assert answers == [(200, {})] * 64
    assert await stored(psql) == Counter(["first", *messages])
    assert len(await transactions(psql)) <= 4


async def test_a_post_that_comes_alone_waits_for_no_other(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with connect(server.url) as wire:
        for number in range(5):
            answer = await request(wire, "POST", "/postchatt", draft(f"number {number}"))
            assert answer.status_code == 200
            assert len(await transactions(psql)) == number + 1


@pytest.mark.parametrize("refused", [[0], [31], [0, 1, 2, 31], range(32)], ids=len)
async def test_a_row_that_the_database_refuses_fails_alone(
    own_database: str, psql: Connection, start_server: StartServer, refused: Iterable[int]
) -> None:
    await psql.execute("ALTER TABLE chatts ADD CONSTRAINT manners CHECK (message !~ 'bad')")
    server = start_server(DATABASE_URL=own_database)
    messages = [f"{'bad' if number in refused else 'good'} {number}" for number in range(32)]
    async with held_log(own_database) as log:
        answers = await one_batch(server, log, (post(server, message) for message in messages))
    for message, (status, document) in zip(messages, answers, strict=True):
        if message.startswith("good"):
            assert (status, document) == (200, {})
        else:
            assert (status, document["code"]) == (422, "chatt-refused")
            assert "manners" not in json.dumps(document)
    good = [message for message in messages if message.startswith("good")]
    assert await stored(psql) == Counter(["first", *good])
    assert "bad" not in server.log  # what people write is nobody's business
    await psql.execute("ALTER TABLE chatts DROP CONSTRAINT manners")
    assert await post(server, "bad again") == (200, {})


async def test_a_picture_of_a_refused_chatt_is_gone_after_the_next_sweep(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute("ALTER TABLE chatts ADD CONSTRAINT no_pictures CHECK (image IS NULL)")
    server = start_server(DATABASE_URL=own_database)
    form = encode(*fields("ann", "look"), image(JPEG))
    async with client_of(server) as client:
        response = await client.post("/postimages", content=form, headers=form_type())
    assert (response.status_code, response.json()["code"]) == (422, "chatt-refused")
    assert await stored(psql) == Counter()
    # Not before: another chatt may name the same picture at any moment.
    assert server.stop() == 0
    database = Database(make_url(own_database))
    try:
        await Sweep(database, server.media, 0, delete=True).run()
    finally:
        await database.aclose()
    assert files(server.media) == []


async def test_a_client_that_leaves_takes_nobody_with_it(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with held_log(own_database) as log:
        staying = [asyncio.create_task(post(server, f"stays {number}")) for number in range(8)]
        for number in range(8):
            async with connect(server.url) as wire:
                body = draft(f"leaves {number}")
                await wire.request("POST", "/postchatt", f"Content-Length: {len(body)}")
                await wire.send(body)
                await log.waited_for()
                await received(server, 1)
        await log.release()
        assert await asyncio.gather(*staying) == [(200, {})] * 8
    # Those who left had asked for it; nothing is there twice.
    found = await stored(psql)
    assert {f"stays {number}" for number in range(8)} <= found.keys()
    assert set(found.values()) == {1}
    assert await post(server, "after") == (200, {})
    assert "Traceback" not in server.log


async def test_what_waits_when_the_server_is_stopped_is_stored_and_answered(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    messages = [f"number {number}" for number in range(32)]
    async with held_log(own_database) as log:
        posts = [asyncio.create_task(post(server, message)) for message in messages]
        await log.waited_for()
        await received(server, len(posts))
        server.process.send_signal(signal.SIGTERM)
        await log.release()
        assert await asyncio.gather(*posts) == [(200, {})] * 32
    assert await asyncio.to_thread(server.wait) == 0
    assert await stored(psql) == Counter(messages)
    assert "Traceback" not in server.log


# The writer itself, on a real database


@asynccontextmanager
async def writer_on(url: str) -> AsyncIterator[Writer]:
    database = Database(make_url(url))
    writer = Writer(database)
    try:
        yield writer
    finally:
        await writer.aclose()
        await database.aclose()


async def test_the_queue_has_an_end(own_database: str, psql: Connection) -> None:
    async with writer_on(own_database) as writer, held_log(own_database) as log:
        first = asyncio.create_task(writer.post(Draft("ann", "first")))
        await log.waited_for()
        waiting = [
            asyncio.create_task(writer.post(Draft("ann", f"number {number}")))
            for number in range(QUEUE_LIMIT)
        ]
        await asyncio.sleep(0)  # each takes its place
        for _ in range(3):
            with pytest.raises(Problem) as refused:
                await writer.post(Draft("ann", "too many"))
            assert (refused.value.status, refused.value.code) == (503, "too-many-posts")
            assert refused.value.headers == {"Retry-After": "1"}
        await log.release()
        await asyncio.gather(first, *waiting)
        await writer.post(Draft("ann", "after"))
    found = await stored(psql)
    assert found.total() == QUEUE_LIMIT + 2
    assert set(found.values()) == {1}
    assert "too many" not in found
    # A thousand in each, and the two that came alone.
    assert len(await transactions(psql)) <= QUEUE_LIMIT // 1_000 + 2


async def test_posts_are_stored_in_the_order_of_their_coming(
    own_database: str, psql: Connection
) -> None:
    async with writer_on(own_database) as writer:
        await asyncio.gather(*(writer.post(Draft("ann", str(number))) for number in range(3_000)))
    records = await psql.fetch("SELECT message FROM chatts ORDER BY time, seq")
    assert [record["message"] for record in records] == [str(number) for number in range(3_000)]


async def test_a_cancelled_post_cancels_no_other(own_database: str, psql: Connection) -> None:
    async with writer_on(own_database) as writer, held_log(own_database) as log:
        posts = [
            asyncio.create_task(writer.post(Draft("ann", f"number {number}")))
            for number in range(20)
        ]
        await log.waited_for()
        for cancelled in posts[::2]:
            cancelled.cancel()
        await log.release()
        results = await asyncio.gather(*posts, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, Posted] * 10
    found = await stored(psql)
    assert {f"number {number}" for number in range(1, 20, 2)} <= found.keys()
    assert set(found.values()) == {1}


async def test_closing_stores_what_waits(own_database: str, psql: Connection) -> None:
    async with held_log(own_database) as log, writer_on(own_database) as writer:
        posts = [
            asyncio.create_task(writer.post(Draft("ann", str(number)))) for number in range(1_500)
        ]
        await log.waited_for()
        closing = asyncio.create_task(writer.aclose())
        await log.release()
        await closing
        assert all(post.done() for post in posts)
    await asyncio.gather(*posts)
    assert (await stored(psql)).total() == 1_500


async def test_every_post_is_told_when_the_connection_is_lost(
    own_database: str, psql: Connection
) -> None:
    async with writer_on(own_database) as writer, held_log(own_database) as log:
        posts = [asyncio.create_task(writer.post(Draft("ann", "lost"))) for _ in range(50)]
        await log.waited_for()
        await psql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'chatterd'"
        )
        results = await asyncio.gather(*posts, return_exceptions=True)
        assert {type(result) for result in results} == {DatabaseUnavailable}
        await log.release()
        await writer.post(Draft("ann", "after"))
    assert await stored(psql) == Counter(["after"])


async def test_texts_of_every_kind_arrive_as_they_were_sent(
    own_database: str, psql: Connection
) -> None:
    texts = [
        "",
        " ",
        "NULL",
        "{",
        '"',
        "\\",
        ",",
        "{a,b}",
        "\n\t\x01\x7f",
        "日本語 😀 \u2028",
        "x" * 4096,
    ]
    drafts = [Draft(text or "ann", text) for text in texts]
    keys = [None, "key.jpg", "NULL", ""]

    def files(key: str | None) -> dict[Slot, StoredFile]:
        return {} if key is None else {slot: StoredFile(key, 1, None, None) for slot in SLOTS}

    async with writer_on(own_database) as writer:
        await asyncio.gather(*(writer.post(draft, files(key)) for draft in drafts for key in keys))
    records = await psql.fetch("SELECT name, message, image, video FROM chatts ORDER BY seq")
    assert [tuple(record) for record in records] == [
        (*draft, key, key) for draft in drafts for key in keys
    ]


async def test_posts_of_any_number_are_one_statement(own_database: str, psql: Connection) -> None:
    """A statement of its own for each number would be prepared anew for each."""
    name = f"seen_{uuid.uuid4().hex}"
    # The session that stores is not ours to look into: each of its statements tells its text.
    await psql.execute(f"""
        CREATE TABLE {name} (statement text);
        CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO {name} VALUES (current_query()); RETURN NULL; END $$;
        CREATE TRIGGER {name} AFTER INSERT ON chatts FOR EACH STATEMENT EXECUTE FUNCTION {name}();
    """)
    sizes = (1, 2, 3, 10, 100, 500)
    async with writer_on(own_database) as writer:
        for size in sizes:
            await asyncio.gather(*(writer.post(Draft("ann", "hi")) for _ in range(size)))
    assert (await stored(psql))["hi"] == sum(sizes)
    statements = [record["statement"] for record in await psql.fetch(f"TABLE {name}")]
    assert len(set(statements)) == 1
    assert len(statements) < sum(sizes) / 10
