import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import asyncpg
import pytest

from tests.conftest import connected, dsn

WRITERS, ROWS_EACH = 8, 1000


async def follow_while_writing(url: str) -> tuple[list[int], set[int]]:
    """Return the numbers that a follower of `seq > cursor` saw, and those that it missed."""
    seen: list[int] = []
    done = asyncio.Event()

    async def write(writer: int) -> None:
        async with connected(url) as db:
            for row in range(ROWS_EACH):
                async with db.transaction():
                    await db.execute(
                        "INSERT INTO chatts (name, message) VALUES ($1, $2)", f"{writer}", f"{row}"
                    )
                    # Transactions of many lengths: a later number is often committed first.
                    for _ in range((writer * 5 + row * 7) % 4):
                        await db.execute("SELECT")

    async def follow() -> None:
        async with connected(url) as db:
            last_round = False
            while not last_round:
                last_round = done.is_set()
                rows = await db.fetch(
                    "SELECT seq FROM chatts WHERE seq > $1 ORDER BY seq", seen[-1] if seen else 0
                )
                seen.extend(seq for (seq,) in rows)

    following = asyncio.create_task(follow())
    try:
        await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    finally:
        done.set()
        await following
    async with connected(url) as db:
        return seen, {seq for (seq,) in await db.fetch("SELECT seq FROM chatts")} - set(seen)


async def test_a_follower_of_eight_writers_sees_every_row_once_in_order(
    own_database: str,
) -> None:
    seen, missed = await follow_while_writing(own_database)
    assert missed == set()
    assert len(seen) == WRITERS * ROWS_EACH
    assert all(earlier < later for earlier, later in pairwise(seen))


async def test_concurrent_inserts_are_all_there_once_and_time_has_the_order_of_seq(
    own_database: str,
) -> None:
    async with asyncpg.create_pool(dsn(own_database), min_size=16, max_size=16) as pool:
        insert = "INSERT INTO chatts (name, message) VALUES ('n', $1) RETURNING seq"
        given = await asyncio.gather(*(pool.fetchval(insert, str(n)) for n in range(64)))
        rows = await pool.fetch("SELECT seq, message FROM chatts ORDER BY time, seq")
    assert [seq for seq, _ in rows] == list(range(1, 65))
    assert {message: seq for seq, message in rows} == {
        str(number): seq for number, seq in enumerate(given)
    }


INSERT = "INSERT INTO chatts (name, message) "


@pytest.mark.parametrize(
    "write",
    [
        lambda db: db.execute(INSERT + "VALUES ('n', 'm')"),
        lambda db: db.execute(INSERT + "SELECT * FROM unnest($1::text[], $1::text[])", ["a", "b"]),
        lambda db: db.execute("WITH new AS (SELECT 'n', 'm') " + INSERT + "TABLE new"),
        lambda db: db.copy_records_to_table(
            "chatts", records=[("n", "m")], columns=["name", "message"]
        ),
    ],
    ids=["values", "unnest", "with", "copy"],
)
async def test_time_is_taken_when_it_is_the_writers_turn(
    own_database: str, write: Callable[[Any], Awaitable[object]]
) -> None:
    async with connected(own_database) as first, connected(own_database) as second:
        turn = first.transaction()
        await turn.start()
        await first.execute(INSERT + "VALUES ('first', '')")
        writing = asyncio.ensure_future(write(second))
        async with asyncio.timeout(10):
            while not await first.fetchval(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
            ):
                assert not writing.done()
        end = await first.fetchval("SELECT clock_timestamp()")
        await turn.commit()
        await writing
        assert await first.fetchval("SELECT min(time) FROM chatts WHERE name <> 'first'") > end
