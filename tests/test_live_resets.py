"""A log that is not the one a cursor came from: those who follow are told, and then follow on."""

from __future__ import annotations

from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.conftest import dsn
from tests.live import FOLLOWS, Change, connect, post, shown, timelines
from tests.multipart import until
from tests.test_feed import postgres_tool, run_tool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import TypeAlias

    from tests.conftest import StartServer
    from tests.live import Timeline
    from tests.multipart import Connection

    Way: TypeAlias = Callable[[str, Connection], Awaitable[None]]


async def truncated(_url: str, psql: Connection) -> None:
    await psql.execute("TRUNCATE chatts")


async def deleted_by_hand(_url: str, psql: Connection) -> None:
    await psql.execute("DELETE FROM chatts WHERE message = '1'")


async def given_a_new_epoch(_url: str, psql: Connection) -> None:
    await psql.execute("UPDATE feed SET epoch = gen_random_uuid()")


async def restored(url: str, psql: Connection) -> None:
    dump = await run_tool("pg_dump", "--clean", "--if-exists", dsn(url))
    # pg_dump speaks to its own version; PostgreSQL before 17 does not know this setting.
    dump = dump.replace(b"SET transaction_timeout = 0;\n", b"")
    await psql.execute("INSERT INTO chatts (name, message) VALUES ('ann', 'lost by the restore')")
    await run_tool("psql", "--quiet", "--set=ON_ERROR_STOP=1", dsn(url), stdin=dump)


async def made_anew_from_a_copy(_url: str, psql: Connection) -> None:
    # The copy has the epoch and the numbers of the original, and another text.
    triggers = await psql.fetch(
        "SELECT pg_get_triggerdef(oid) AS definition FROM pg_trigger"
        " WHERE tgrelid = 'chatts'::regclass AND NOT tgisinternal"
    )
    await psql.execute("""
        BEGIN;
        CREATE TABLE copy (LIKE chatts INCLUDING ALL);
        INSERT INTO copy SELECT * FROM chatts;
        UPDATE copy SET message = 'restored';
        ALTER SEQUENCE chatts_seq OWNED BY copy.seq;
        DROP TABLE chatts;
        ALTER TABLE copy RENAME TO chatts;
    """)
    for trigger in triggers:
        await psql.execute(trigger["definition"])
    await psql.execute("COMMIT")


needs_tools = pytest.mark.skipif(
    postgres_tool("pg_dump") is None or postgres_tool("psql") is None,
    reason="needs pg_dump and psql",
)
WAYS = [
    truncated,
    deleted_by_hand,
    given_a_new_epoch,
    pytest.param(restored, marks=needs_tools),
    made_anew_from_a_copy,
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_log_that_is_another_one_is_a_reset_and_then_followed(
    own_database: str, psql: Connection, start_server: StartServer, way: Way
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        line = await enter(connect(server.url))
        screens = {kind: (await enter(timelines(server.url, kind)))[0] for kind in FOLLOWS}
        for number in range(3):
            await post(line, str(number))
        await up_to_date(screens, psql)
        assert [screen.resets for screen in screens.values()] == [0, 0, 0]
        cursors = {kind: screen.cursor for kind, screen in screens.items()}
        await way(own_database, psql)
        # One change of the new log tells those who are there; some are told before.
        await post(line, "after")
        await up_to_date(screens, psql)
        assert all(screen.resets > 0 for screen in screens.values())
        await post(line, "and after")
        await up_to_date(screens, psql)
    for kind, cursor in cursors.items():
        assert cursor is not None
        await assert_reset(server.url, kind, cursor)


async def test_a_cursor_from_what_a_restore_has_undone_is_a_reset(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with connect(server.url) as line:
        await post(line, "the last that is left")
        page = await line.ask("GET", "/v1/chatts")
    log, dot, seq = page.json["cursor"].rpartition(".")
    for kind in FOLLOWS:
        await assert_reset(server.url, kind, f"{log}{dot}{int(seq) + 5}")


async def up_to_date(screens: Mapping[str, Timeline], psql: Connection) -> None:
    """Wait until everybody sees what there is."""
    left = await shown(psql)
    await until(lambda: all(screen.shown == left for screen in screens.values()))


async def assert_reset(url: str, kind: str, cursor: str) -> None:
    """Check that who comes with this cursor is told, and then gets what comes, and only that."""
    with anyio.fail_after(20):
        async with (
            connect(url) as reading,
            connect(url) as writing,
            aclosing(FOLLOWS[kind](reading, cursor)) as batches,
        ):
            changes = (change async for batch in batches for change in batch.changes)
            assert await anext(changes) == Change("reset", {})
            chatt_id, _ = await post(writing, "new")
            assert (await anext(changes)).data["id"] == chatt_id
