import asyncio
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import select
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from chatterd import database
from chatterd.models import Base, Chatt, feed_page
from tests.check_migrations import alembic_config
from tests.conftest import connected
from tests.objects import TOMBSTONE

ROOT = Path(__file__).parent.parent
TUTORIAL = "username text, message text, id uuid, time timestamptz"
A, B, C = (UUID(int=number) for number in (1, 2, 3))


async def migrate(url: str, revision: str = "head") -> list[str]:
    """Migrate up, or down to base or a revision behind a minus; return the lines it printed."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # alembic asks for the encoding
    config = alembic_config(url, printed)
    down = revision == "base" or revision.startswith("-")
    run: Callable[..., None] = command.downgrade if down else command.upgrade
    await asyncio.to_thread(run, config, revision.removeprefix("-"))
    printed.seek(0)
    return printed.read().splitlines()


async def what_is_there(db: asyncpg.Connection) -> list[str]:
    names = await db.fetch("""
        SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
        UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        ORDER BY 1
    """)
    return [name for (name,) in names if not name.startswith("alembic_version")]


async def set_time_zone(db: asyncpg.Connection, zone: str) -> None:
    """Set it for the connections to come."""
    name = await db.fetchval("SELECT current_database()")
    await db.execute(f"ALTER DATABASE {name} SET TimeZone = '{zone}'")


async def tutorial(db: asyncpg.Connection, columns: str, rows: list[tuple[Any, ...]]) -> None:
    await db.execute(f"CREATE TABLE chatts ({columns})")
    for row in rows:
        places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
        await db.execute(f"INSERT INTO chatts VALUES ({places})", *row)


@pytest.fixture
async def db(empty_database: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(empty_database) as connection:
        yield connection


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )


# The schema


async def test_the_alembic_command_takes_the_database_from_the_environment(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await tutorial(db, TUTORIAL, [("ann", "hi", None, None)])
    done = await asyncio.to_thread(alembic, empty_database, "upgrade", "head")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("chatts: adopted 1 rows, 1 repaired\n")
    assert await db.fetchval("SELECT name FROM chatts") == "ann"


async def test_the_alembic_command_says_in_one_line_why_it_adopts_nothing(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await tutorial(db, TUTORIAL + ", audio text", [])
    done = await asyncio.to_thread(alembic, empty_database, "upgrade", "head")
    assert done.returncode != 0
    assert "ALTER TABLE chatts DROP COLUMN audio;" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


async def test_models_and_migrations_agree(own_database: str) -> None:
    await asyncio.to_thread(command.check, alembic_config(own_database, io.StringIO()))


def test_the_head_is_what_alembic_says() -> None:
    config = database.alembic_config(URL.create("postgresql"))
    assert database.head_revision() == ScriptDirectory.from_config(config).get_current_head()


async def test_every_constraint_and_index_has_the_name_that_the_convention_gives(
    psql: asyncpg.Connection,
) -> None:
    ours = {constraint.name for t in Base.metadata.tables.values() for constraint in t.constraints}
    ours |= {index.name for table in Base.metadata.tables.values() for index in table.indexes}
    found = await psql.fetch(
        """
        SELECT conname FROM pg_constraint
        WHERE conrelid = ANY(CAST($1::text[] AS regclass[])) AND contype <> 'n'
        UNION SELECT relname FROM pg_class JOIN pg_index ON indexrelid = pg_class.oid
        WHERE indrelid = ANY(CAST($1::text[] AS regclass[]))
        """,
        list(Base.metadata.tables),
    )
    assert {name for (name,) in found} == ours


async def test_two_upgrades_at_once_make_one_schema(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await tutorial(db, TUTORIAL, [("ann", "hi", A, datetime.now(UTC))])
    # In processes of their own: alembic's context is global.
    both = [asyncio.to_thread(alembic, empty_database, "upgrade", "head") for _ in range(2)]
    done = await asyncio.gather(*both)
    assert [run.returncode for run in done] == [0, 0]
    assert sorted(run.stdout for run in done) == ["", "chatts: adopted 1 rows, 0 repaired\n"]
    assert await db.fetchval("SELECT count(*) FROM feed") == 1


async def test_the_sql_of_offline_mode_builds_a_fresh_database(
    empty_database: str, db: asyncpg.Connection
) -> None:
    sql = await asyncio.to_thread(alembic, empty_database, "upgrade", "head", "--sql")
    await db.execute(sql.stdout)
    await asyncio.to_thread(command.check, alembic_config(empty_database, io.StringIO()))
    sql = await asyncio.to_thread(alembic, empty_database, "downgrade", "head:base", "--sql")
    await db.execute(sql.stdout)
    assert await what_is_there(db) == []


async def test_a_feed_page_begins_behind_its_keyset(own_database: str) -> None:
    engine = create_async_engine(own_database)
    async with AsyncSession(engine) as session:
        time = datetime(2026, 1, 1, tzinfo=UTC)
        session.add_all(Chatt(name="n", message=str(number), time=time) for number in range(5))
        await session.commit()
        first = (await session.execute(feed_page(None, None, 2))).all()
        rest = (await session.execute(feed_page((time, first[-1].seq), None, 9))).all()
        assert [row.message for row in [*first, *rest]] == ["0", "1", "2", "3", "4"]
    await engine.dispose()


async def test_the_orm_follows_a_chatt_through_its_numbers(own_database: str) -> None:
    engine = create_async_engine(own_database)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        chatt = Chatt(name="ann", message="hi")
        session.add(chatt)
        await session.commit()
        assert chatt.seq == 1
        for seq in (2, 3):
            chatt.message += "!"
            await session.commit()
            await session.refresh(chatt)
            assert (chatt.seq, chatt.message) == (seq, "hi" + "!" * (seq - 1))
        assert await session.get(Chatt, chatt.id) is chatt
        assert len((await session.scalars(select(Chatt))).all()) == 1
    await engine.dispose()


# Downgrade


async def test_a_downgrade_without_chatts_leaves_nothing(
    own_database: str, psql: asyncpg.Connection
) -> None:
    await migrate(own_database, "base")
    assert await what_is_there(psql) == []


async def test_a_downgrade_leaves_a_tutorials_table_and_the_upgrade_adopts_every_row(
    own_database: str, psql: asyncpg.Connection
) -> None:
    key = "a%41?#日本 .jpg"
    await psql.execute(
        "INSERT INTO chatts (name, message, time, image)"
        " SELECT 'n', g::text, timestamptz '2026-01-01 00:00Z' + g / 3 * interval '1 s', $1"
        " FROM generate_series(1, 1000) AS g".replace("$1", f"'{key}'")
    )
    # Equal times whose order on disk is not their order in the feed.
    await psql.execute("UPDATE chatts SET video = 'v.mp4' WHERE seq % 5 = 0")
    await psql.execute("VACUUM chatts")
    await psql.execute("UPDATE chatts SET video = 'w.mp4' WHERE seq % 7 = 0")
    feed = "SELECT id, name, message, time, image, video FROM chatts ORDER BY time, seq"
    before = await psql.fetch(feed)

    await migrate(own_database, "base")
    assert await what_is_there(psql) == ["chatts"]
    columns = await psql.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'chatts'::regclass"
        " AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    names = ["name", "message", "id", "time", "imageurl", "videourl"]
    assert [name for (name,) in columns] == names
    assert await psql.fetchval("SELECT DISTINCT imageurl FROM chatts") == (
        "/media/a%2541%3F%23日本 .jpg"
    )

    assert await migrate(own_database) == ["chatts: adopted 1000 rows, 0 repaired"]
    assert await psql.fetch(feed) == before


# Deleting and keys, 0003

KNOWN = "SELECT seq, name, message, id, time, image, video FROM chatts ORDER BY seq"
LOG = "SELECT epoch, 'chatts'::regclass::oid FROM feed"


async def with_chatts(db: asyncpg.Connection) -> None:
    await db.execute(
        "INSERT INTO chatts (name, message, time, image)"
        " SELECT 'n', g::text, timestamptz '2026-01-01 00:00Z' + g / 3 * interval '1 s',"
        " CASE g % 4 WHEN 0 THEN g || '.jpeg' END FROM generate_series(1, 100) AS g"
    )
    await db.execute("UPDATE chatts SET video = 'v.mp4' WHERE seq % 5 = 0")


async def test_chatts_of_the_version_before_stay_with_their_numbers_and_cursors(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await migrate(empty_database, "0002")
    await with_chatts(db)
    before, log = await db.fetch(KNOWN), await db.fetch(LOG)
    assert await migrate(empty_database) == []
    assert await db.fetch(KNOWN) == before
    assert await db.fetch(LOG) == log
    # None of them is deleted, and nobody has what would delete one.
    rows = await db.fetch("SELECT DISTINCT deleted, delete_token_hash FROM chatts")
    assert [tuple(row) for row in rows] == [(False, None)]
    assert await db.fetchval("SELECT count(*) FROM idempotency_keys") == 0
    await db.execute("INSERT INTO chatts (name, message) VALUES ('psql', 'as before')")
    assert await db.fetchval("SELECT max(seq) FROM chatts") == before[-1]["seq"] + 1
    assert not await db.fetchval("SELECT deleted FROM chatts ORDER BY seq DESC LIMIT 1")


@pytest.mark.parametrize("target", ["-0002", "base"])
async def test_a_downgrade_takes_away_what_was_deleted_and_keeps_the_rest(
    own_database: str, psql: asyncpg.Connection, target: str
) -> None:
    await with_chatts(psql)
    await psql.execute(f"{TOMBSTONE} WHERE seq % 3 = 0")
    await psql.execute(
        "INSERT INTO idempotency_keys (key_hash, fingerprint, salt, chatt_id, time, files)"
        " SELECT 'k', 'f', 's', id, time, '{}' FROM chatts LIMIT 1"
    )
    feed = "SELECT id, name, message, time, image, video FROM chatts ORDER BY time, seq"
    left = await psql.fetch(feed.replace("ORDER", "WHERE NOT deleted ORDER"))
    assert 0 < len(left) < 100
    epoch = await psql.fetchval("SELECT epoch FROM feed")
    await migrate(own_database, target)
    if target == "base":
        assert await what_is_there(psql) == ["chatts"]
        assert await psql.fetchval("SELECT count(*) FROM chatts") == len(left)
    else:
        assert await psql.fetch(feed) == left
        assert "idempotency_keys" not in await what_is_there(psql)
        # Whoever was away when the chatts were deleted learns of it by a reset.
        assert await psql.fetchval("SELECT epoch FROM feed") != epoch
    await migrate(own_database)
    assert await psql.fetch(feed) == left
    await asyncio.to_thread(command.check, alembic_config(own_database, io.StringIO()))


async def test_a_downgrade_without_deleted_chatts_keeps_cursors(
    own_database: str, psql: asyncpg.Connection
) -> None:
    await with_chatts(psql)
    before, log = await psql.fetch(KNOWN), await psql.fetch(LOG)
    for target in ("-0002", "head"):
        await migrate(own_database, target)
        assert await psql.fetch(KNOWN) == before
        assert await psql.fetch(LOG) == log


# Adoption


@pytest.mark.parametrize("author", ["name text", "username varchar(255)", "name char(8)"])
@pytest.mark.parametrize("time", ["timestamp DEFAULT now()", "timestamptz"])
@pytest.mark.parametrize("urls", ["", ", imageurl text, videourl varchar(255)"])
async def test_a_tutorials_table_is_adopted(
    empty_database: str, db: asyncpg.Connection, author: str, time: str, urls: str
) -> None:
    await set_time_zone(db, "America/Detroit")
    await db.execute("SET TimeZone = 'America/Detroit'")
    await db.execute(f"CREATE TABLE chatts ({author}, message text, id uuid, time {time}{urls})")
    await db.execute(
        "INSERT INTO chatts VALUES ('ann', 'b', $1, '2026-07-01 12:00'),"
        " ('bob', 'a', $2, '2026-01-01 12:00')",
        B,
        A,
    )
    if urls:
        await db.execute("UPDATE chatts SET imageurl = 'https://a.example/media/i.jpg'")
    assert await migrate(empty_database) == ["chatts: adopted 2 rows, 0 repaired"]
    image = "i.jpg" if urls else None
    rows = await db.fetch("SELECT seq, name, message, id, time, image, video FROM chatts")
    assert [tuple(row) for row in rows] == [
        (1, "bob", "a", A, datetime(2026, 1, 1, 17, tzinfo=UTC), image, None),
        (2, "ann", "b", B, datetime(2026, 7, 1, 16, tzinfo=UTC), image, None),
    ]
    new = "INSERT INTO chatts (name, message) VALUES ('n', 'm') RETURNING seq"
    assert await db.fetchval(new) == 3


async def test_an_empty_table_is_adopted(empty_database: str, db: asyncpg.Connection) -> None:
    await tutorial(db, TUTORIAL, [])
    assert await migrate(empty_database) == ["chatts: adopted 0 rows, 0 repaired"]
    new = "INSERT INTO chatts (name, message) VALUES ('n', 'm') RETURNING seq"
    assert await db.fetchval(new) == 1


async def test_equal_times_stay_in_the_order_they_came(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await db.execute(f"CREATE TABLE chatts ({TUTORIAL})")
    await db.execute(
        "INSERT INTO chatts SELECT 'n', g::text, gen_random_uuid(),"
        " timestamptz '2026-01-01 00:00Z' + g % 3 * interval '1 s'"
        " FROM generate_series(0, 9999) AS g"
    )
    await migrate(empty_database)
    rows = await db.fetch("SELECT message FROM chatts ORDER BY time, seq")
    expected = [str(number) for rest in range(3) for number in range(rest, 10_000, 3)]
    assert [message for (message,) in rows] == expected
    assert await db.fetchval(
        "SELECT bool_and(seq = place) FROM"
        " (SELECT seq, row_number() OVER (ORDER BY time, seq) AS place FROM chatts) AS _"
    )


async def test_a_local_time_that_never_was_does_not_change_the_order(
    empty_database: str, db: asyncpg.Connection
) -> None:
    # The clock jumped from 02:00 to 03:00; 02:30 is read as 03:30.
    await set_time_zone(db, "America/Detroit")
    await db.execute("""
        CREATE TABLE chatts (name text, message text, id uuid, time timestamp);
        INSERT INTO chatts VALUES ('n', '1', gen_random_uuid(), '2026-03-08 02:30'),
            ('n', '2', gen_random_uuid(), '2026-03-08 03:15');
    """)
    assert (await migrate(empty_database))[-1] == "chatts: adopted 2 rows, 1 repaired"
    rows = await db.fetch("SELECT message FROM chatts ORDER BY time, seq")
    assert [message for (message,) in rows] == ["1", "2"]


async def test_keys_constraints_indexes_and_defaults_of_its_own_make_way(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await db.execute("""
        CREATE TABLE chatts (
            name varchar(20) NOT NULL CHECK (name <> 'x'), message text DEFAULT 'none',
            id uuid CONSTRAINT pk_chatts PRIMARY KEY, time timestamptz NOT NULL UNIQUE
        );
        CREATE INDEX ix_chatts_time_seq ON chatts (message);
        INSERT INTO chatts VALUES ('ann', 'hi', gen_random_uuid(), now());
    """)
    assert await migrate(empty_database) == ["chatts: adopted 1 rows, 0 repaired"]
    await asyncio.to_thread(command.check, alembic_config(empty_database, io.StringIO()))
    await db.execute("INSERT INTO chatts (name, message) VALUES ('x', 'longer than that')")


async def test_what_cannot_be_kept_is_repaired_and_printed(
    empty_database: str, db: asyncpg.Connection
) -> None:
    first, last = (datetime(year, 1, 1, tzinfo=UTC) for year in (2025, 2026))
    await db.execute(f"CREATE TABLE chatts ({TUTORIAL}, imageurl text)")
    await db.execute(
        "INSERT INTO chatts VALUES ('l', 'NULL', $1, NULL, NULL), ('k', '∞', $2, 'infinity', ''),"
        " ('j', '-∞', gen_random_uuid(), '-infinity', NULL),"
        " ('a', 'one', $3, '2025-01-01Z', NULL), ('b', 'two', $3, '2026-01-01Z', NULL),"
        " (NULL, NULL, NULL, '2026-01-01Z', E'https://b.example/\\nx'),"
        " ('c', 'far', gen_random_uuid(), '10000-01-01Z', NULL)",
        A,
        B,
        C,
    )
    printed = await migrate(empty_database)
    rows = await db.fetch("SELECT id, name, message, time FROM chatts ORDER BY time, seq")
    ids = [row[0] for row in rows]
    assert len(set(ids)) == 7
    assert [tuple(row)[1:] for row in rows] == [
        ("j", "-∞", first),
        ("a", "one", first),
        ("b", "two", last),
        ("anonymous", "", last),
        ("c", "far", last),
        ("k", "∞", last),
        ("l", "NULL", last),
    ]
    assert (ids[1], ids[5], ids[6]) == (C, B, A)
    assert printed == [
        f"chatts: {ids[0]}: time was '-infinity', is '2025-01-01 00:00:00+00'",
        f"chatts: {ids[2]}: id was '{C}', is '{ids[2]}'",
        f"chatts: {ids[3]}: id was NULL, is '{ids[3]}'",
        f"chatts: {ids[3]}: name was NULL, is 'anonymous'",
        f"chatts: {ids[3]}: message was NULL, is ''",
        f"chatts: {ids[3]}: imageurl was 'https://b.example/\\nx', is NULL",
        f"chatts: {ids[4]}: time was '10000-01-01 00:00:00+00', is '2026-01-01 00:00:00+00'",
        f"chatts: {B}: time was 'infinity', is '2026-01-01 00:00:00+00'",
        f"chatts: {A}: time was NULL, is '2026-01-01 00:00:00+00'",
        "chatts: adopted 7 rows, 6 repaired",
    ]


@pytest.mark.parametrize("time", ["timestamp", "timestamptz"])
@pytest.mark.parametrize("value", ["294276-12-31 23:59:59", "4713-01-01 BC", "infinity", "NULL"])
@pytest.mark.parametrize("zone", ["Etc/GMT+12", "Etc/GMT-14"])
async def test_a_table_without_any_possible_time_is_adopted_as_of_now(
    empty_database: str, db: asyncpg.Connection, time: str, value: str, zone: str
) -> None:
    await set_time_zone(db, zone)
    await db.execute(f"CREATE TABLE chatts (name text, message text, id uuid, time {time})")
    literal = "NULL" if value == "NULL" else f"'{value}'"
    await db.execute("SET TimeZone = 'UTC'")
    await db.execute(f"INSERT INTO chatts VALUES ('n', 'm', gen_random_uuid(), {literal})")
    assert (await migrate(empty_database))[-1] == "chatts: adopted 1 rows, 1 repaired"
    assert await db.fetchval("SELECT now() - time < '1 min' FROM chatts")


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://h.example/media/ann-1.jpg", "ann-1.jpg"),
        ("http://10.0.0.1:8000/x/media/1.jpg", "1.jpg"),
        ("/media/1.jpg", "1.jpg"),
        ("//h.example/media/1.jpg", "1.jpg"),
        ("HTTPS://h/media/1.jpg?v=/media/2#/media/3", "1.jpg"),
        ("/media/%E6%97%A5%20a%2b+%.jpg", "日 a++%.jpg"),
        ("/media/日本.jpg", "日本.jpg"),
        ("/media/" + "a" * 255, "a" * 255),
        ("/media/" + "a" * 256, None),
        ("/media/" + "日" * 86, None),
        ("http://media/1.jpg", None),
        ("https://h.example/1.jpg", None),
        ("https://h.example/media/", None),
        ("https://h.example/media/a/b", None),
        ("https://h.example/mymedia/b", None),
        ("https://h.example/?u=/media/b", None),
        ("/media/..", None),
        ("/media/.hidden", None),
        ("/media/%2e%2e", None),
        ("/media/a%2Fb", None),
        ("/media/a%00b", None),
        ("/media/a%ff", None),
        ("javascript:alert(1)", None),
    ],
)
async def test_a_media_url_becomes_its_key(
    empty_database: str, db: asyncpg.Connection, url: str, key: str | None
) -> None:
    await db.execute(f"CREATE TABLE chatts ({TUTORIAL}, imageurl text, videourl text)")
    await db.execute("INSERT INTO chatts VALUES ('n', 'm', $1, now(), $2, $2)", A, url)
    printed = await migrate(empty_database)
    rows = await db.fetch("SELECT image, video FROM chatts")
    assert [tuple(row) for row in rows] == [(key, key)]
    if key is None:
        assert printed == [
            f"chatts: {A}: imageurl was {url!r}, is NULL",
            f"chatts: {A}: videourl was {url!r}, is NULL",
            "chatts: adopted 1 rows, 1 repaired",
        ]
    else:
        assert printed == ["chatts: adopted 1 rows, 0 repaired"]


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        (f"CREATE TABLE chatts ({TUTORIAL}, audio text)", "DROP COLUMN audio;"),
        (f'CREATE TABLE chatts ({TUTORIAL}, "x y" text)', 'DROP COLUMN "x y";'),
        (f"CREATE TABLE chatts ({TUTORIAL}, name text)", "name and username are both there"),
        ("CREATE TABLE chatts (name text, id uuid, time timestamp)", "ADD COLUMN message text;"),
        ("CREATE TABLE chatts (message text, id uuid, time timestamp)", "ADD COLUMN name text;"),
        (
            "CREATE TABLE chatts (name text, message text, id text, time text)",
            "ALTER COLUMN id TYPE uuid USING id::uuid;), column time is text",
        ),
        (f"CREATE TABLE t ({TUTORIAL}); CREATE VIEW chatts AS SELECT * FROM t", "ordinary table"),
        (
            f"CREATE TABLE chatts ({TUTORIAL}); CREATE RULE r AS ON DELETE TO chatts DO NOTHING",
            "DROP RULE r ON chatts;",
        ),
        (
            (
                f"CREATE TABLE chatts ({TUTORIAL}); CREATE TRIGGER t BEFORE UPDATE ON chatts"
                " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
            ),
            "DROP TRIGGER t ON chatts;",
        ),
        (
            f"CREATE TABLE chatts ({TUTORIAL}); CREATE POLICY p ON chatts",
            "DROP POLICY p ON chatts;",
        ),
        (
            f"CREATE TABLE chatts ({TUTORIAL}); CREATE VIEW v AS SELECT * FROM chatts",
            "DROP VIEW v;",
        ),
        (
            (
                f"CREATE TABLE chatts ({TUTORIAL}, UNIQUE (id));"
                " CREATE TABLE likes (chatt uuid REFERENCES chatts (id))"
            ),
            "ALTER TABLE likes DROP CONSTRAINT likes_chatt_fkey;",
        ),
    ],
)
async def test_a_table_that_is_not_a_tutorials_is_refused_and_left_alone(
    empty_database: str, db: asyncpg.Connection, sql: str, reason: str
) -> None:
    await db.execute(sql)
    if "VIEW chatts" not in sql:
        await db.execute("INSERT INTO chatts (id) VALUES (NULL)")
    before = await what_is_there(db), await db.fetch("SELECT * FROM chatts")
    with pytest.raises(CommandError) as refused:
        await migrate(empty_database)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (await what_is_there(db), await db.fetch("SELECT * FROM chatts")) == before


async def test_a_table_in_use_is_not_waited_for_long(
    empty_database: str, db: asyncpg.Connection
) -> None:
    await tutorial(db, TUTORIAL, [("ann", "hi", A, datetime.now(UTC))])
    async with connected(empty_database) as other, other.transaction():
        await other.execute("SELECT FROM chatts")
        with pytest.raises(Exception, match="lock timeout"):
            await migrate(empty_database)
    assert await what_is_there(db) == ["chatts"]


async def test_who_could_use_the_table_still_can_with_no_rights_on_anything_else(
    empty_database: str, db: asyncpg.Connection
) -> None:
    role = f"test_{uuid4().hex}"
    await tutorial(db, TUTORIAL, [])
    await db.execute(f"CREATE ROLE {role}; GRANT ALL ON chatts TO {role}")
    try:
        await migrate(empty_database)
        await db.execute(f"SET ROLE {role}; SET search_path = pg_catalog")
        await db.execute("INSERT INTO public.chatts (name, message) VALUES ('n', 'm')")
        await db.execute("DELETE FROM public.chatts")
        await db.execute("RESET ROLE; RESET search_path")
        assert await db.fetchval("SELECT last_value FROM chatts_seq") == 1
    finally:
        await db.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


# Triggers: these speak SQL as anybody may in psql


INSERT = "INSERT INTO chatts (name, message) SELECT 'n', 'm' FROM generate_series(1, 3)"


async def test_insert_and_update_give_new_numbers_whatever_the_statement_says(
    psql: asyncpg.Connection,
) -> None:
    await psql.execute(INSERT)
    await psql.execute("INSERT INTO chatts (seq, name, message) VALUES (1, 'n', 'm')")
    await psql.execute("UPDATE chatts SET seq = 2, message = 'new' WHERE seq = 1")
    rows = await psql.fetch("SELECT seq, message FROM chatts ORDER BY seq")
    assert [tuple(row) for row in rows] == [(2, "m"), (3, "m"), (4, "m"), (5, "new")]


@pytest.mark.parametrize(
    ("sql", "changes"),
    [
        (INSERT, False),
        ("UPDATE chatts SET name = 'x'", False),
        ("DELETE FROM chatts WHERE false", False),
        ("DELETE FROM chatts WHERE seq = 1", True),
        ("TRUNCATE chatts", True),
    ],
)
async def test_the_epoch_changes_when_rows_are_removed(
    psql: asyncpg.Connection,
    sql: str,
    changes: bool,  # noqa: FBT001 a column of the table above
) -> None:
    await psql.execute(INSERT)
    before = await psql.fetchval("SELECT epoch FROM feed")
    await psql.execute(sql)
    assert (await psql.fetchval("SELECT epoch FROM feed") != before) is changes


@pytest.mark.parametrize(
    "sql", [INSERT, "UPDATE chatts SET name = 'x'", "DELETE FROM chatts", "TRUNCATE chatts"]
)
async def test_every_change_notifies(own_database: str, psql: asyncpg.Connection, sql: str) -> None:
    await psql.execute(INSERT)
    heard: asyncio.Queue[object] = asyncio.Queue()
    async with connected(own_database) as listener, asyncio.timeout(10):
        await listener.add_listener("chatts", lambda *event: heard.put_nowait(event[2:]))
        await psql.execute(sql)
        assert await heard.get() == ("chatts", "")


@pytest.mark.parametrize(
    "time", ["infinity", "-infinity", "10000-01-01 00:00Z", "0001-12-31 23:59Z BC", None]
)
async def test_a_time_that_rfc_3339_cannot_say_is_refused(
    psql: asyncpg.Connection, time: str | None
) -> None:
    literal = "NULL" if time is None else f"'{time}'"
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await psql.execute(f"INSERT INTO chatts (name, message, time) VALUES ('n', 'm', {literal})")


async def test_the_first_and_the_last_time_can_be_stored(psql: asyncpg.Connection) -> None:
    # As literals: asyncpg sends datetime's own bounds as infinity.
    await psql.execute(
        "INSERT INTO chatts (name, message, time)"
        " VALUES ('n', 'm', '0001-01-01 00:00Z'), ('n', 'm', '9999-12-31 23:59:59.999999Z')"
    )
    rows = await psql.fetch("SELECT time FROM chatts ORDER BY time")
    bounds = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
    assert [time for (time,) in rows] == bounds


async def test_feed_keeps_one_row(psql: asyncpg.Connection) -> None:
    for value in ("true", "false"):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await psql.execute(f"INSERT INTO feed (singleton) VALUES ({value})")
