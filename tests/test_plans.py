"""Reading the feed costs what is read, however long the feed is: the plans show it.

Each statement is explained as the server executes it, prepared with parameters: with a plan for
their values, and with the one for any values that PostgreSQL may change to after a few uses.
"""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest
from sqlalchemy import func, select
from sqlalchemy.engine import make_url

from chatterd.database import Database, Line, Statement
from chatterd.models import (
    feed_changes,
    feed_newest,
    feed_page,
    feed_page_back,
    feed_page_before,
    place_of,
)
from tests.conftest import connected, database_at_head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import ClauseElement
    from sqlalchemy.engine import URL

    from tests.multipart import Connection

ROWS = 100_000
SIZE = 2**20


class Place(NamedTuple):
    """Where a row stands in the feed, and its id."""

    time: datetime
    seq: int
    id: str


@pytest.fixture(scope="module")
def table(postgres_url: URL) -> Iterator[str]:
    """A database with many rows, a few of them at equal times, as autovacuum would leave it."""
    with database_at_head(postgres_url) as url:

        async def fill() -> None:
            async with connected(url) as db:
                await db.execute(f"""
                    INSERT INTO chatts (name, message, time)
                    SELECT 'ann', repeat('x', number % 100), '2026-01-01'::timestamptz
                        + (number / 2) * interval '1 second'
                    FROM generate_series(1, {ROWS}) AS number
                """)
                await db.execute("VACUUM ANALYZE chatts")

        asyncio.run(fill())
        yield url


def statements(place: Place) -> dict[str, tuple[ClauseElement, dict[str, object]]]:
    """Every statement of a read, with its values for a row at `place`."""
    at = (place.time, place.seq)
    later = place.time + timedelta(days=1)
    return {
        "newest": (feed_newest(2_000, SIZE), {}),
        "changes": (feed_changes(1_000), {"seq": place.seq}),
        "page loaded": (feed_page_before(2_000, SIZE), {"time": place.time}),
        "first page": (feed_page(None, None, 50), {}),
        "first page before a time": (feed_page(None, later, 2_000, SIZE), {}),
        "page after": (feed_page(at, None, 50), {}),
        "page after, before a time": (feed_page(at, later, 2_000, SIZE), {}),
        "newest page": (feed_page_back(None, 500), {}),
        "page before": (feed_page_back(at, 500), {}),
        "place of a chatt": (place_of(place.id), {}),  # type: ignore[arg-type] # PostgreSQL casts it
    }


NAMES = list(statements(Place(datetime.fromisoformat("2026-01-01T00:00:00Z"), 0, "")))


def nodes(plan: dict[str, object]) -> Iterator[dict[str, object]]:
    yield plan
    children = plan.get("Plans", [])
    assert isinstance(children, list)
    for child in children:
        yield from nodes(child)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["oldest", "middle", "newest"])
@pytest.mark.parametrize("plan_cache_mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_read_follows_an_index_and_sorts_nothing(
    table: str, name: str, plan_cache_mode: str, where: float
) -> None:
    async with connected(table) as db:
        await db.execute(f"SET plan_cache_mode = {plan_cache_mode}")
        place = await db.fetchrow(
            "SELECT time, seq, id FROM chatts ORDER BY time, seq OFFSET $1 LIMIT 1",
            int(where * (ROWS - 1)),
        )
        assert place is not None
        select, values = statements(Place(*place))[name]
        statement = Statement(select)
        arguments = statement.arguments(values)
        explained = await db.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.sql}", *arguments)
    (document,) = json.loads(explained)
    used = list(nodes(document["Plan"]))
    kinds = {str(node["Node Type"]) for node in used}
    assert not kinds & {"Sort", "Incremental Sort"}, explained
    on_table = [node for node in used if node.get("Relation Name") == "chatts"]
    assert on_table, explained
    for node in on_table:
        assert node["Node Type"] in {"Index Scan", "Index Only Scan"}, explained
        # It reads what it returns; it does not look through the rest.
        assert not node.get("Rows Removed by Filter"), explained
        count = node["Actual Rows"]
        assert isinstance(count, int | float)
        assert count <= 2_000


async def test_a_plan_made_for_a_small_table_serves_a_large_one(
    own_database: str, psql: Connection
) -> None:
    """A process keeps its plans, and nothing but ANALYZE tells them that a table has grown."""
    database = Database(make_url(own_database))
    line = Line(database)
    changes, newest = Statement(feed_changes(1_000)), Statement(feed_newest(2_000, SIZE))
    try:
        await psql.execute("""
            ALTER TABLE chatts SET (autovacuum_enabled = false);
            INSERT INTO chatts (name, message) VALUES ('ann', '');
            ANALYZE chatts
        """)
        for _ in range(10):
            await line.fetch(changes, seq=0)
            await line.fetch(newest)
        await psql.execute(f"""
            INSERT INTO chatts (name, message) SELECT 'ann', '' FROM generate_series(1, {ROWS})
        """)
        for _ in range(10):
            await line.fetch(changes, seq=ROWS + 1)
            await line.fetch(newest)
        await line.fetch(Statement(select(func.pg_stat_force_next_flush())))
        scanned = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'chatts'"
        assert await psql.fetchval(scanned) == 0
    finally:
        await line.aclose()
        await database.aclose()
