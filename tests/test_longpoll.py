"""GET /v1/chatts?since=: what has changed after a cursor, and waiting for it (contract §2)."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.conftest import client_of
from tests.multipart import DEADLINE_SECONDS, connect, encode, fields, form_type, image, problem
from tests.objects import TOMBSTONE, base_of, delete, objects, post
from tests.samples import JPEG
from tests.streams import has_place, place_is_free
from tests.test_feed import A_FEW, INSERT_MANY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    import httpx2

    from tests.conftest import StartServer
    from tests.multipart import Answer, Connection
    from tests.objects import Object
    from tests.process import Server


async def cursor_of(client: httpx2.AsyncClient) -> str:
    cursor: str = (await client.get("/v1/chatts?limit=1")).json()["cursor"]
    return cursor


async def changes(client: httpx2.AsyncClient, since: str, **query: int) -> Object:
    response = await client.get("/v1/chatts", params={"since": since, **query})
    assert response.status_code == 200, response.content
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert "etag" not in response.headers
    document: Object = response.json()
    assert list(document) == ["chatts", "deleted", "reset", "cursor"]
    compact = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    assert response.content == compact.encode()
    return document


# What is told


async def test_what_was_posted_after_the_cursor_is_told_once_in_order(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    since = await cursor_of(client)
    nothing = await changes(client, since)
    assert nothing == {"chatts": [], "deleted": [], "reset": False, "cursor": since}
    for number in range(3):
        await post(client, f"日本語 {number}")
    form = encode(*fields(), image(JPEG))
    assert (await client.post("/postimages", content=form, headers=form_type())).is_success
    news = await changes(client, since)
    assert news["chatts"] == (await objects(database, base_of(client), "seq"))[-4:]
    assert (news["deleted"], news["reset"]) == ([], False)
    assert (await changes(client, news["cursor"]))["chatts"] == []
    # The cursor of the list is the place after all that it shows.
    assert await cursor_of(client) == news["cursor"]
    assert (await changes(client, since)) == news


async def test_changes_come_in_the_order_of_their_commits_and_not_of_their_times(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    since = await cursor_of(client)
    await database.execute(
        "INSERT INTO chatts (name, message, time) VALUES ('n', '', '1999-01-01')"
    )
    await database.execute("UPDATE chatts SET message = 'changed' WHERE name = 'zoe'")
    await database.execute("UPDATE chatts SET message = 'changed' WHERE name = 'ann'")
    news = await changes(client, since)
    assert [chatt["name"] for chatt in news["chatts"]] == ["n", "zoe", "ann"]
    assert news["chatts"] == (await objects(database, base_of(client), "seq"))[-3:]


async def test_what_was_deleted_after_the_cursor_is_told_by_its_id(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    chatts = [await post(client, str(number)) for number in range(4)]
    since = await cursor_of(client)
    await delete(client, chatts[2])
    later = await post(client, "later")
    await delete(client, chatts[0])
    await database.execute("UPDATE chatts SET message = 'changed' WHERE id = $1", chatts[3]["id"])
    news = await changes(client, since)
    assert [chatt["message"] for chatt in news["chatts"]] == ["later", "changed"]
    assert news["deleted"] == [chatts[2]["id"], chatts[0]["id"]]
    # Whoever has not seen it need not be told that it was there; being told is no harm.
    await delete(client, later)
    news = await changes(client, since)
    assert [chatt["message"] for chatt in news["chatts"]] == ["changed"]
    assert news["deleted"] == [chatts[2]["id"], chatts[0]["id"], later["id"]]


@pytest.mark.parametrize("limit", [1, 3, 50, 500])
async def test_many_changes_come_in_parts_without_gap_or_double(
    client: httpx2.AsyncClient, database: Connection, limit: int
) -> None:
    since = await cursor_of(client)
    await database.execute(INSERT_MANY.format(13 * limit // 4))
    # One of them is longer than what goes out at once.
    await database.execute("UPDATE chatts SET message = repeat('😀', 4096) WHERE seq % 7 = 0")
    await database.execute(f"{TOMBSTONE} WHERE seq % 3 = 0")
    wanted = await database.fetch("SELECT id::text, deleted FROM chatts ORDER BY seq")
    told: list[str] = []
    deleted: list[str] = []
    for _ in range(len(wanted) + 1):
        news = await changes(client, since, limit=limit)
        assert len(news["chatts"]) + len(news["deleted"]) <= limit
        if news["cursor"] == since:
            break
        since = news["cursor"]
        told += [chatt["id"] for chatt in news["chatts"]]
        deleted += news["deleted"]
    assert told == [row["id"] for row in wanted if not row["deleted"]]
    assert deleted == [row["id"] for row in wanted if row["deleted"]]
    assert since == await cursor_of(client)


async def test_without_a_limit_no_more_than_fifty_come_at_once(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    since = await cursor_of(client)
    await database.execute(INSERT_MANY.format(60))
    assert len((await changes(client, since))["chatts"]) == 50
    assert len((await changes(client, since, wait=55))["chatts"]) == 50
    assert len((await changes(client, since, wait=55, limit=3))["chatts"]) == 3


async def test_addresses_are_of_the_host_that_the_reader_asked(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    since, scheme = await cursor_of(client), client.base_url.scheme
    await database.execute(A_FEW)
    for host in ("one.example", "other.example:8443"):
        response = await client.get(f"/v1/chatts?since={since}", headers={"Host": host})
        assert response.json()["chatts"] == await objects(database, f"{scheme}://{host}", "seq")


@pytest.mark.parametrize("path", ["/v1/chatts", "/v1/chatts/"])
async def test_head_has_no_body(client: httpx2.AsyncClient, path: str) -> None:
    since = await cursor_of(client)
    await post(client, "hi")
    response = await client.head(path, params={"since": since})
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["cache-control"] == "no-store"


# Cursors that cannot be resumed


def no_cursors(cursor: str) -> dict[str, str]:
    epoch, table, seq = cursor.split(".")
    return {
        "empty": "",
        "nonsense": "nonsense",
        "SQL": "'; --",
        "long": "9" * 4000,
        "another epoch": f"{'0' * 32}.{table}.{seq}",
        "another table": f"{epoch}.{int(table) + 1}.{seq}",
        "no table": f"{epoch}.{seq}",
        "ahead of the log": f"{epoch}.{table}.{int(seq) + 1000}",
        "far ahead of the log": f"{epoch}.{table}.{10**18 - 1}",
        "beyond all numbers": f"{epoch}.{table}.{2**64}",
        "negative": f"{epoch}.{table}.-1",
        "no number": f"{epoch}.{table}.x",
        "blank behind": f"{cursor} ",
        "line feed behind": f"{cursor}\n",
        "other digits": f"{epoch}.{table}.\u0661",
        "upper case": f"{'A' * 32}.{table}.{seq}",
        "an id": "7401355b-fc63-458a-bddc-f90d2da400d3",
    }


@pytest.mark.parametrize("kind", no_cursors("0.1.1"))
@pytest.mark.parametrize("wait", [0, 55])
async def test_a_cursor_that_cannot_be_resumed_is_answered_with_reset_at_once(
    client: httpx2.AsyncClient, database: Connection, kind: str, wait: int
) -> None:
    await database.execute(A_FEW)
    cursor = await cursor_of(client)
    news = await changes(client, no_cursors(cursor)[kind], wait=wait)
    assert news == {"chatts": [], "deleted": [], "reset": True, "cursor": cursor}
    await post(client, "after")
    (chatt,) = (await changes(client, news["cursor"]))["chatts"]
    assert chatt["message"] == "after"


@pytest.mark.parametrize("sql", ["TRUNCATE chatts", "DELETE FROM chatts WHERE name = 'zoe'"])
async def test_when_rows_are_removed_by_hand_cursors_are_reset(
    client: httpx2.AsyncClient, database: Connection, sql: str
) -> None:
    await database.execute(A_FEW)
    since = await cursor_of(client)
    await database.execute(sql)
    news = await changes(client, since)
    assert (news["chatts"], news["deleted"], news["reset"]) == ([], [], True)
    assert news["cursor"] == await cursor_of(client) != since
    assert not (await changes(client, news["cursor"]))["reset"]


# Waiting


@asynccontextmanager
async def waiting(
    server: Server, since: str, limit: int = 50
) -> AsyncIterator[asyncio.Task[Answer]]:
    """A client that waits for its answer: it has the only place among the server's subscribers."""
    async with connect(server.url) as wire, client_of(server) as client:
        while True:
            await wire.request("GET", f"/v1/chatts?since={since}&wait=55&limit={limit}")
            answer = asyncio.create_task(wire.answer())
            while not answer.done() and await has_place(client):
                pass
            if not answer.done():
                break
            assert (await answer).status_code == 503  # looking for the place took it
        yield answer
        answer.cancel()


@pytest.fixture
async def narrow(own_database: str, start_server: StartServer) -> Server:
    """A server for one subscriber, on a database of its own."""
    return start_server(DATABASE_URL=own_database, STREAM_MAX_SUBSCRIBERS="1")


async def test_whoever_waits_is_told_at_once_whoever_changes_what(
    narrow: Server, own_database: str, psql: Connection, start_server: StartServer
) -> None:
    other = start_server(DATABASE_URL=own_database)
    async with client_of(narrow) as here, client_of(other) as there:
        chatt = await post(here, "here")

        async def told(change: Awaitable[object]) -> Object:
            since = await cursor_of(here)
            async with waiting(narrow, since) as answer:
                await change
                document: Object = json.loads((await answer).content)
            assert document["cursor"] == await cursor_of(here) != since
            await place_is_free(here)
            return document

        began = time.monotonic()
        for client in (here, there):
            (news,) = (await told(post(client, "news")))["chatts"]
            assert news["message"] == "news"
        assert (await told(delete(there, chatt)))["deleted"] == [chatt["id"]]
        for sql in (
            "INSERT INTO chatts (name, message) VALUES ('psql', 'news')",
            "UPDATE chatts SET message = 'news' WHERE name = 'psql'",
        ):
            (news,) = (await told(psql.execute(sql)))["chatts"]
            assert (news["name"], news["message"]) == ("psql", "news")
        assert (await told(psql.execute("TRUNCATE chatts")))["reset"]
        # Nobody has waited for a periodic look at the table.
        assert time.monotonic() - began < 14


async def test_whoever_waits_for_nothing_is_answered_after_that_time(
    client: httpx2.AsyncClient,
) -> None:
    since = await cursor_of(client)
    began = time.monotonic()
    news = await changes(client, since, wait=1)
    assert 1 <= time.monotonic() - began < 10
    assert news == {"chatts": [], "deleted": [], "reset": False, "cursor": since}


async def test_what_is_there_already_is_not_waited_for(narrow: Server) -> None:
    """It takes no place, either."""
    async with client_of(narrow) as client:
        since = await cursor_of(client)
        await post(client, "news")
        end = await cursor_of(client)
        async with waiting(narrow, end) as answer:
            for wait in (0, 55):
                (chatt,) = (await changes(client, since, wait=wait))["chatts"]
                assert chatt["message"] == "news"
            assert (await changes(client, end))["chatts"] == []
            response = await client.get("/v1/chatts", params={"since": end, "wait": 1})
            problem(response, 503)
            assert response.json()["code"] == "too-many-subscribers"
            assert 1 <= int(response.headers["retry-after"]) <= 5
            await post(client, "more")
            assert (await answer).status_code == 200
        await place_is_free(client)


async def test_whoever_waits_gets_no_more_at_once_than_was_asked_for(
    narrow: Server, psql: Connection
) -> None:
    async with client_of(narrow) as client:
        async with waiting(narrow, await cursor_of(client), limit=3) as answer:
            await psql.execute(INSERT_MANY.format(10))
            news = json.loads((await answer).content)
        wanted = await objects(psql, base_of(client), "seq")
        assert news["chatts"] == wanted[:3]
        assert (await changes(client, news["cursor"]))["chatts"] == wanted[3:]


async def test_a_client_that_leaves_gives_its_place_back(narrow: Server) -> None:
    async with client_of(narrow) as client:
        since = await cursor_of(client)
        for _ in range(3):
            async with waiting(narrow, since):
                pass
            await place_is_free(client)


async def test_when_the_server_stops_whoever_waits_is_answered(narrow: Server) -> None:
    async with client_of(narrow) as client:
        since = await cursor_of(client)
    async with waiting(narrow, since) as answer:
        narrow.process.terminate()
        assert (await answer).status_code == 200
    assert json.loads(answer.result().content)["cursor"] == since
    assert narrow.wait() == 0
    assert "Traceback" not in narrow.log


async def test_many_that_wait_are_all_told(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    since = await cursor_of(client)
    asking = [asyncio.create_task(changes(client, since, wait=55)) for _ in range(80)]
    posted = await post(client, "news")
    for each in asking:
        (chatt,) = (await each)["chatts"]
        assert chatt["id"] == posted["id"]


async def test_posts_that_come_one_after_the_other_are_each_told_once(
    client: httpx2.AsyncClient,
) -> None:
    since = await cursor_of(client)
    posted: list[str] = []

    async def write() -> None:
        posted.extend([(await post(client, str(number)))["id"] for number in range(60)])

    told: list[str] = []
    async with anyio.create_task_group() as group:
        group.start_soon(write)
        with anyio.fail_after(DEADLINE_SECONDS):
            while len(told) < 60:
                news = await changes(client, since, wait=5, limit=7)
                told += [chatt["id"] for chatt in news["chatts"]]
                since = news["cursor"]
    assert told == posted
