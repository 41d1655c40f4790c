"""The feed in memory, and its pages, without the chatts that were deleted, wherever they stood."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.conftest import client_of
from tests.objects import TOMBSTONE, base_of, delete, objects, post
from tests.test_feed import A_FEW, FORMS, INSERT_MANY, LEAST, TIE, assert_exact, get

if TYPE_CHECKING:
    import httpx2

    from tests.conftest import StartServer
    from tests.multipart import Connection
    from tests.objects import Object

WHICH = {
    "newest": "name = 'zoe'",
    "oldest": "name = 'ann'",
    "first of equal times": "name = 'bob'",
    "amid equal times": "name = 'eve'",
    "last of equal times": "name = 'joe'",
    "all of equal times": "time = '2026-01-02'",
    "all but the newest": "name <> 'zoe'",
    "all but the oldest": "name <> 'ann'",
    "all": "true",
    "one by an older one": "name IN ('zoe', 'ann')",
}


@pytest.mark.parametrize("where", WHICH.values(), ids=WHICH)
async def test_a_deleted_chatt_is_in_no_form_of_the_feed(
    client: httpx2.AsyncClient, database: Connection, where: str
) -> None:
    await database.execute(A_FEW)
    before = {form: (await get(client, form)).headers["etag"] for form in FORMS}
    await database.execute(f"{TOMBSTONE} WHERE {where}")
    for form in FORMS:
        response = await get(client, form, **{"If-None-Match": before[form]})
        assert response.status_code == 200
        assert response.headers["etag"] != before[form]
        await assert_exact(client, database, form)
    # What comes next stands where it should.
    await database.execute(
        "INSERT INTO chatts (name, message, time) VALUES ('n', '', '2026-01-02')"
    )
    await post(client, "after")
    await database.execute("UPDATE chatts SET message = 'back', deleted = false WHERE name = ''")
    for form in FORMS:
        await assert_exact(client, database, form)
    pages = (await client.get("/v1/chatts")).json()["chatts"]
    assert pages == await objects(database, base_of(client))


async def test_posts_and_deletes_in_any_order_leave_the_feed_exact(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    chance = random.Random(5)  # noqa: S311 - the same each time
    chatts: list[Object] = []
    for step in range(60):
        if chatts and chance.random() < 0.45:
            await delete(client, chatts.pop(chance.randrange(len(chatts))))
        else:
            chatts.append(await post(client, str(step)))
        await assert_exact(client, database, FORMS[step % len(FORMS)])
    rows = (await client.get("/getchatts")).json()
    assert [row[2] for row in rows] == [chatt["id"] for chatt in chatts]
    for chatt in chance.sample(chatts, len(chatts)):
        await delete(client, chatt)
    for form in FORMS:
        assert (await get(client, form)).content == b"[]"


@pytest.mark.parametrize("at_once", [20, 300])
async def test_a_whole_block_of_the_memory_can_be_deleted(
    own_database: str, psql: Connection, start_server: StartServer, at_once: int
) -> None:
    await psql.execute(INSERT_MANY.format(1_200))
    await psql.execute("UPDATE chatts SET message = repeat('x', 4096) || message")
    ids = [row["id"] for row in await psql.fetch("SELECT id FROM chatts ORDER BY time")]
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        await assert_exact(client, psql, FORMS[0])
        # A block has about 250 of them. The second goes, then the newest.
        for start in (200, 900):
            for first in range(start, start + 300, at_once):
                which = ids[first : first + at_once]
                await psql.execute(f"{TOMBSTONE} WHERE id = ANY($1)", which)
                await assert_exact(client, psql, FORMS[first // 20 % 3])
        await post(client, "after")
        for form in FORMS:
            await assert_exact(client, psql, form)


@pytest.mark.parametrize("count", [499, 500, 501, 2_500])
async def test_many_deleted_at_once_are_gone_at_once(
    client: httpx2.AsyncClient, database: Connection, count: int
) -> None:
    await database.execute(INSERT_MANY.format(3_000))
    await assert_exact(client, database, FORMS[0])
    await database.execute(
        f"{TOMBSTONE} WHERE id IN (SELECT id FROM chatts ORDER BY md5(message) LIMIT {count})"
    )
    await post(client, "after")
    for form in FORMS:
        await assert_exact(client, database, form)
    assert len((await client.get("/getchatts")).json()) == 3_001 - count


async def test_what_is_deleted_where_the_memory_ends_is_gone(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    """Some rows are in memory, the older ones in the database alone."""
    await psql.execute(TIE.format("2026-01-01", 30))
    await psql.execute(INSERT_MANY.format(12_000))
    await psql.execute("UPDATE chatts SET message = message || repeat('x', 200)")
    server = start_server(DATABASE_URL=own_database, FEED_CACHE_BYTES=LEAST)
    async with client_of(server) as client:
        response = await get(client, FORMS[0])
        assert "content-length" not in response.headers  # not all of it is in memory
        await assert_exact(client, psql, FORMS[0])
        for where in (
            "time < '2026-01-01 00:10:00+00'",
            "extract(epoch FROM time)::bigint % 31 = 0",
            "time > '2026-01-01 02:00:00+00' AND time < '2026-01-01 02:07:00+00'",
            "time > '2026-01-01 03:15:00+00'",
            "time > '2026-01-01 01:00:00+00'",  # all that is in memory, and more
        ):
            await psql.execute(f"{TOMBSTONE} WHERE NOT deleted AND {where}")
            await assert_exact(client, psql, FORMS[0])
            await post(client, where)
            await assert_exact(client, psql, FORMS[2])
        await psql.execute(f"{TOMBSTONE} WHERE NOT deleted")
        assert (await get(client, FORMS[0])).content == b"[]"


async def test_a_server_that_starts_among_tombstones_shows_what_is_left(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(INSERT_MANY.format(9_000))
    await psql.execute(f"{TOMBSTONE} WHERE seq % 100 <> 0")
    async with client_of(start_server(DATABASE_URL=own_database)) as client:
        for form in FORMS:
            await assert_exact(client, psql, form)
        assert len((await client.get("/getchatts")).json()) == 90
        pages = (await client.get("/v1/chatts?limit=500")).json()["chatts"]
        assert pages == await objects(psql, base_of(client))


@pytest.mark.parametrize("path", ["/getchatts", "/getimages"])
async def test_a_reader_of_pages_goes_on_from_a_chatt_that_was_deleted(
    client: httpx2.AsyncClient, path: str
) -> None:
    chatts = [await post(client, str(number)) for number in range(5)]
    await delete(client, chatts[2])
    bound = chatts[2]["id"]
    before = (await client.get(path, params={"before": bound})).json()
    after = (await client.get(path, params={"after": bound})).json()
    assert [[row[1] for row in rows] for rows in (before, after)] == [["0", "1"], ["3", "4"]]
