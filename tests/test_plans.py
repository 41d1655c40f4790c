"""Reading the feed costs what is read, however long the feed is: the plans show it.

Each statement is explained as the server executes it, prepared with parameters: with a plan for
their values, and with the one for any values that PostgreSQL may change to after a few uses.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest
from sqlalchemy import func, select
from sqlalchemy.engine import make_url

from chatterd.database import Database, Line, Statement
from chatterd.models import (
    chatt,
    chatts_page,
    deletable,
    delete_old_keys,
    feed_changes,
    feed_newest,
    feed_page,
    feed_page_back,
    feed_page_before,
    kept_answers,
    log_after,
    log_end,
    media_named,
    place_of,
    tombstone,
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
    """A database with many rows, a few of them at equal times, as autovacuum would leave it.

    Some chatts have a picture, some are tombstones.
    """
    with database_at_head(postgres_url) as url:

        async def fill() -> None:
            async with connected(url) as db:
                await db.execute(f"""
                    INSERT INTO chatts (name, message, time, deleted, image)
                    SELECT 'ann', repeat('x', number % 100), '2026-01-01'::timestamptz
                        + (number / 2) * interval '1 second',
                        number % 5 = 1, CASE number % 5 WHEN 2 THEN number || '.jpeg' END
                    FROM generate_series(1, {ROWS}) AS number;
                    INSERT INTO media (key, size) SELECT image, 1000 FROM chatts
                    WHERE image IS NOT NULL;
                    INSERT INTO idempotency_keys
                        (key_hash, fingerprint, salt, chatt_id, time, files, created)
                    SELECT sha256(number::text::bytea), '', '', gen_random_uuid(), now(), '{{}}',
                        now() - number * interval '1 second'
                    FROM generate_series(1, {ROWS}) AS number
                """)
                for name in ("chatts", "media", "idempotency_keys"):
                    await db.execute(f"VACUUM ANALYZE {name}")

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
        "newest page of objects": (chatts_page(None, None, 500), {}),
        "page of objects before": (chatts_page(at, None, 500), {}),
        "page of objects after": (chatts_page(None, at, 50), {}),
        "one chatt": (chatt(place.id), {}),  # type: ignore[arg-type] # as above
        "what it is deleted with": (deletable(place.id), {}),  # type: ignore[arg-type] # as above
        "deleting it": (tombstone(place.id), {}),  # type: ignore[arg-type] # as above
        "end of the log": (log_end(), {}),
        "what follows in the log": (log_after(500), {"seq": place.seq}),
        "who names files": (media_named(), {"keys": [f"{number}.jpeg" for number in range(100)]}),
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
            "SELECT time, seq, id FROM chatts WHERE NOT deleted"
            " ORDER BY time, seq OFFSET $1 LIMIT 1",
            int(where * (0.8 * ROWS - 1)),
        )
        assert place is not None
        document = await explained(db, *statements(Place(*place))[name])
    assert_reads_by_index(document, "chatts", sorts=False)


KEYS = [hashlib.sha256(b"%d" % number).digest() for number in (1, 2, ROWS, -1)]
KEY_STATEMENTS: dict[str, tuple[ClauseElement, dict[str, object]]] = {
    "keys asked for": (kept_answers(), {"key_hash": KEYS, "lock": [1, 2, 3, 4]}),
    "old keys": (delete_old_keys(500), {"seconds": float(ROWS - 100)}),
    "no old keys": (delete_old_keys(500), {"seconds": float(2 * ROWS)}),
}


@pytest.mark.parametrize("plan_cache_mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", KEY_STATEMENTS)
async def test_keys_are_found_by_index(table: str, name: str, plan_cache_mode: str) -> None:
    async with connected(table) as db:
        await db.execute(f"SET plan_cache_mode = {plan_cache_mode}")
        document = await explained(db, *KEY_STATEMENTS[name])
    assert_reads_by_index(document, "idempotency_keys", sorts=True)


async def explained(
    db: Connection, clause: ClauseElement, values: dict[str, object]
) -> dict[str, object]:
    """The plan of a statement, which is executed and taken back."""
    statement = Statement(clause)
    transaction = db.transaction()
    await transaction.start()
    sql = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.sql}"
    text = await db.fetchval(sql, *statement.arguments(values))
    await transaction.rollback()
    (document,) = json.loads(text)
    plan: dict[str, object] = document["Plan"]
    return plan


def assert_reads_by_index(plan: dict[str, object], relation: str, *, sorts: bool) -> None:
    used = list(nodes(plan))
    kinds = {str(node["Node Type"]) for node in used}
    assert sorts or not kinds & {"Sort", "Incremental Sort"}, plan
    assert relation in {node.get("Relation Name") for node in used}, plan
    for node in used:
        if node.get("Relation Name") not in {"chatts", "media", "idempotency_keys"}:
            continue
        if node["Node Type"] == "ModifyTable":
            continue
        assert node["Node Type"] in {"Index Scan", "Index Only Scan"}, plan
        # It reads what it returns; it does not look through the rest.
        assert not node.get("Rows Removed by Filter"), plan
        count, loops = node["Actual Rows"], node["Actual Loops"]
        assert isinstance(count, int | float)
        assert isinstance(loops, int)
        assert count * loops <= 2_000


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
