"""The checks of `chatterd doctor` that ask the database: each fails for real, and is mended."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
import threading
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from uuid import uuid4

import pytest
from alembic import command
from sqlalchemy.engine import URL, make_url

from chatterd.database import alembic_config, head_revision, migrate
from chatterd.doctor.activity import clock_check, lag_check, locks_check, tables_check
from chatterd.doctor.postgresql import (
    connections_check,
    database_check,
    durability_check,
    privileges_check,
    version_findings,
)
from chatterd.doctor.schema import TRIGGERS, schema_check
from chatterd.doctor.way import Way
from chatterd.embedded import postgres
from chatterd.embedded_home import find_binaries, place, spawn, within_reach
from tests.conftest import connected
from tests.process import DEADLINE_SECONDS, open_folder, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from chatterd.doctor import Finding
    from tests.multipart import Connection

    Check: TypeAlias = Callable[[Way], Awaitable[list[Finding]]]

CHECKS: dict[str, Check] = {
    "database": database_check,
    "privileges": privileges_check,
    "schema": schema_check,
    "durability": durability_check,
    "locks": partial(locks_check, blocked_seconds=0.0, long_seconds=0.0),
    "tables": tables_check,
    "lag": lag_check,
    "clock": clock_check,
}


@pytest.fixture(scope="module")
def admin_url() -> Iterator[URL]:
    """A PostgreSQL that may be spoilt, as who may do everything; it syncs, as a real one does."""
    with open_folder() as folder, postgres(folder, options=["max_connections=60"]) as url:
        admin = make_url(url)
        asyncio.run(execute(admin, "CREATE ROLE chatter LOGIN"))
        yield admin


@pytest.fixture(scope="module")
def url(admin_url: URL) -> URL:
    """A database at head, as the role that owns it."""
    return new_database(admin_url)


def new_database(admin_url: URL) -> URL:
    name = f"test_{uuid4().hex}"
    asyncio.run(execute(admin_url, f"CREATE DATABASE {name} OWNER chatter"))
    url = admin_url.set(username="chatter", database=name)
    migrate(url)
    return url


@pytest.fixture
def way(admin_url: URL, url: URL) -> Iterator[Way]:
    """The way to `url`; what a test does to roles and settings is undone, the rest it mends."""
    try:
        yield Way(url, is_embedded=False)
    finally:
        asyncio.run(
            execute(
                admin_url,
                "ALTER SYSTEM RESET ALL",
                "SELECT pg_reload_conf()",
                "ALTER ROLE chatter RESET ALL",
                "ALTER ROLE chatter NOSUPERUSER CONNECTION LIMIT -1",
                f"ALTER DATABASE {url.database} CONNECTION LIMIT -1",
            )
        )


@pytest.fixture
def own_way(admin_url: URL) -> Way:
    """The way to a database of the test's own."""
    return Way(new_database(admin_url), is_embedded=False)


@pytest.fixture
async def admin(admin_url: URL, way: Way) -> AsyncIterator[Connection]:
    """A connection that may do everything in the database of `way`."""
    async with connected(admin_url.set(database=way.url.database)) as connection:
        yield connection


async def execute(url: URL, *statements: str) -> None:
    async with connected(url) as connection:
        for statement in statements:
            await connection.execute(statement)


async def until(
    check: Callable[[], Awaitable[list[Finding]]], level: str, words: str = ""
) -> list[Finding]:
    """What it finds when it comes to this: some of it takes PostgreSQL a moment."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            findings = await check()
            if any(finding.level == level and words in finding.found for finding in findings):
                return findings
            await asyncio.sleep(0.01)


async def mend(admin: Connection, findings: list[Finding]) -> None:
    """Execute what the findings say to give to psql."""
    for finding in findings:
        for line in finding.commands:
            words = shlex.split(line)
            if "psql" not in words:
                continue
            assert words[:4] == ["sudo", "-u", "postgres", "psql"]
            for word, statement in pairwise(words):
                if word == "-c":
                    await admin.execute(statement)


async def test_all_is_well_with_a_database_at_head(way: Way) -> None:
    for name, check in CHECKS.items():
        (finding,) = await check(way)
        assert finding.level == "ok", (name, finding)
        assert not finding.mend
        assert not finding.commands
    (finding,) = await connections_check(way, 2)
    assert finding.level == "ok"
    assert "make 20 of 57" in finding.found


class Case(NamedTuple):
    """What is done to the database, and the check that finds it, with these words."""

    check: str
    level: str
    words: str
    spoil: tuple[str, ...]


INVALID = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_chatts_image'::regclass"
NO_SCHEMA = "REVOKE ALL ON SCHEMA public FROM PUBLIC, pg_database_owner"
NO_INSERT = "REVOKE INSERT, UPDATE ON chatts FROM chatter"
NO_TRIGGERS = "ALTER ROLE chatter SET session_replication_role = replica"
DEAD_ROWS = (
    "ALTER TABLE media SET (autovacuum_enabled = off)",
    "INSERT INTO media (key, size) SELECT n, 1 FROM generate_series(1, 20001) AS n",
    "DELETE FROM media",
    "SELECT pg_stat_force_next_flush()",
)


def configured(name: str, value: str) -> tuple[str, ...]:
    return f"ALTER SYSTEM SET {name} = {value}", "SELECT pg_reload_conf()"


CASES = (
    Case("database", "fault", "read-only", configured("default_transaction_read_only", "on")),
    Case("privileges", "fault", "chatter may not INSERT, UPDATE on chatts", (NO_INSERT,)),
    Case(
        "privileges", "fault", "SELECT on alembic", ("REVOKE ALL ON alembic_version FROM chatter",)
    ),
    Case("privileges", "fault", "SEQUENCE chatts_seq", ("REVOKE ALL ON chatts_seq FROM chatter",)),
    Case("privileges", "fault", "may not UPDATE on feed", ("REVOKE UPDATE ON feed FROM chatter",)),
    Case("privileges", "fault", "may not use the schema", (NO_SCHEMA,)),
    Case("privileges", "warning", "superuser", ("ALTER ROLE chatter SUPERUSER",)),
    Case("schema", "fault", "is off", ("ALTER TABLE chatts DISABLE TRIGGER chatts_number",)),
    Case("schema", "fault", "feed has no row", ("DELETE FROM feed",)),
    Case("schema", "fault", "keeps the triggers", (NO_TRIGGERS,)),
    Case("schema", "warning", "ix_chatts_image is invalid", (INVALID,)),
    Case("durability", "fault", "fsync is off", configured("fsync", "off")),
    Case("durability", "fault", "full_page_writes", configured("full_page_writes", "off")),
    Case("durability", "fault", "were answered", configured("synchronous_commit", "off")),
    Case("tables", "warning", "autovacuum is off", configured("autovacuum", "off")),
    Case("tables", "warning", "20001 rows are dead", DEAD_ROWS),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.check}: {case.words}")
async def test_what_is_wrong_is_found_and_the_command_that_is_named_mends_it(
    way: Way, admin: Connection, case: Case
) -> None:
    for statement in case.spoil:
        await admin.execute(statement)
    check = partial(CHECKS[case.check], way)
    (finding,) = findings = await until(check, case.level)
    assert case.words in finding.found
    assert finding.mend
    assert finding.commands
    await mend(admin, findings)
    await until(check, "ok")


async def test_a_schema_that_is_behind_is_brought_to_head_by_the_command_that_is_named(
    own_way: Way, tmp_path: Path
) -> None:
    config = alembic_config(own_way.url)
    await asyncio.to_thread(command.downgrade, config, "0002")
    (finding,) = await schema_check(own_way)
    assert finding.level == "fault"
    assert "revision 0002" in finding.found
    (line,) = finding.commands
    program, *arguments = line.split()
    assert program == "chatterd"
    url = own_way.url.render_as_string(hide_password=False)
    await asyncio.to_thread(run, tmp_path, *arguments, DATABASE_URL=url)
    (finding,) = await schema_check(own_way)
    assert finding.level == "ok"
    assert str(head_revision()) in finding.found

    await execute(own_way.url, "UPDATE alembic_version SET version_num = '9999'")
    (finding,) = await schema_check(own_way)
    assert finding.level == "fault"
    assert "newer" in finding.found
    assert not finding.commands


async def test_a_database_without_tables_has_no_schema(admin_url: URL) -> None:
    way = Way(admin_url, is_embedded=True)
    (finding,) = await schema_check(way)
    assert finding.level == "fault"
    assert "revision none" in finding.found
    for check in (database_check, privileges_check, tables_check, locks_check, lag_check):
        assert [finding.level for finding in await check(way)] == ["ok"]


async def test_each_trigger_and_index_that_is_missing_is_named(own_way: Way) -> None:
    async with connected(own_way.url) as db:
        there = await db.fetch(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'chatts'::regclass AND NOT tgisinternal"
        )
        assert {name for (name,) in there} == set(TRIGGERS)
        indexes = await db.fetch(
            "SELECT indexrelid::regclass::text AS name, indrelid::regclass::text AS tablename,"
            " conname FROM pg_index LEFT JOIN pg_constraint ON conindid = indexrelid"
            " WHERE indrelid::regclass::text IN ('chatts', 'feed', 'media', 'idempotency_keys')"
        )
        assert len(indexes) >= 8
        for trigger in TRIGGERS:
            await db.execute(f"DROP TRIGGER {trigger} ON chatts")
        for name, table, constraint in indexes:
            if constraint is None:
                await db.execute(f"DROP INDEX {name}")
            else:
                await db.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    found = [finding.found for finding in await schema_check(own_way)]
    assert len(found) == len(TRIGGERS) + len(indexes)
    for name in (*TRIGGERS, *(name for name, _, _ in indexes)):
        assert [words for words in found if f" {name} is missing" in words], name


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO chatts (name, message) VALUES ('ann', '')",
        "LOCK TABLE chatts IN SHARE MODE",
        "SELECT pg_advisory_lock(" + str(int.from_bytes(b"chatts", "big")) + ")",
    ],
)
async def test_who_keeps_others_from_writing_is_named_and_ended_by_the_command(
    way: Way, admin: Connection, statement: str
) -> None:
    async with connected(way.url) as holder, connected(way.url) as waiter:
        holder_pid = holder.get_server_pid()
        await holder.execute("BEGIN")
        await holder.execute(statement)
        post = "INSERT INTO chatts (name, message) VALUES ('bob', '')"
        waiting = asyncio.create_task(waiter.execute(post))
        check = partial(locks_check, way, 0.0, 300.0)
        (finding,) = findings = await until(check, "fault", "1 others wait")
        assert finding.level == "fault"
        assert f"process {holder_pid}" in finding.found
        assert [finding.level for finding in await locks_check(way, 60.0, 300.0)] == ["ok"]
        await mend(admin, findings)
        await waiting
        (finding,) = await locks_check(way, 0.0, 300.0)
        assert finding.level == "ok"


async def test_a_transaction_that_is_left_open_is_named_and_ended_by_the_command(
    way: Way, admin: Connection
) -> None:
    async with connected(way.url) as forgotten:
        await forgotten.execute("BEGIN")
        await forgotten.execute("SELECT 1")
        (finding,) = findings = await locks_check(way, 60.0, 0.0)
        assert finding.level == "warning"
        assert f"process {forgotten.get_server_pid()}" in finding.found
        await mend(admin, findings)
        (finding,) = await locks_check(way, 60.0, 0.0)
        assert finding.level == "ok"


async def test_processes_that_want_more_connections_than_there_are_are_a_fault(way: Way) -> None:
    (finding,) = await connections_check(way, 6)
    assert finding.level == "fault"
    assert "6 processes" in finding.found
    assert "make 60. PostgreSQL allows 57" in finding.found
    assert "DATABASE_POOL_SIZE to 9" in finding.mend


async def test_other_programs_connections_and_the_roles_own_limit_count(
    way: Way, admin: Connection
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(connected(way.url))
        (finding,) = await connections_check(way, 5)
        assert finding.level == "warning"
        assert "other programs have 9 now" in finding.found  # those, and `admin`
    await admin.execute("ALTER ROLE chatter CONNECTION LIMIT 15")
    (finding,) = await connections_check(way, 2)
    assert finding.level == "fault"
    assert "allows 15" in finding.found


async def test_a_slow_commit_is_a_warning(way: Way, admin: Connection) -> None:
    await admin.execute("ALTER SYSTEM SET commit_delay = 60000")  # microseconds
    await admin.execute("ALTER SYSTEM SET commit_siblings = 0")
    await admin.execute("SELECT pg_reload_conf()")
    (finding,) = await until(partial(lag_check, way), "warning")
    assert "every post waits" in finding.found


async def test_a_pooler_that_passes_no_notifications_on_is_a_fault(way: Way) -> None:
    with without_notifications(f"{way.url.query['host']}/.s.PGSQL.5432") as port:
        pooled = Way(way.url.set(host="127.0.0.1", port=port, query={}), is_embedded=False)
        (finding,) = await lag_check(pooled, 0.5)
        assert finding.level == "fault"
        assert "PgBouncer" in finding.mend
        assert [each.level for each in await clock_check(pooled)] == ["ok"]


@contextmanager
def without_notifications(path: str) -> Iterator[int]:
    """What stands between at this port: all that goes by but NotificationResponse (A)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(path)
                    for target in (upward, downward):
                        threading.Thread(target=target, args=(client, server)).start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def upward(client: socket.socket, server: socket.socket) -> None:
    with suppress(OSError):
        while data := client.recv(65536):
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)


def downward(client: socket.socket, server: socket.socket) -> None:
    with server, client, server.makefile("rb") as answers, suppress(OSError):
        # asyncpg asks for TLS first; the refusal is one byte, without a length.
        client.sendall(answers.read(1))
        while head := answers.read(5):
            body = answers.read(int.from_bytes(head[1:], "big") - 4)
            if head[:1] != b"A":
                client.sendall(head + body)
        client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("shift", "level", "words"),
    [
        ("- interval '5 s'", "warning", "behind"),
        ("+ interval '5 s'", "warning", "ahead of"),
        ("- interval '2 min'", "fault", "behind"),
        ("+ interval '2 min'", "fault", "ahead of"),
    ],
)
async def test_a_database_whose_clock_is_off_is_found(
    way: Way, admin: Connection, shift: str, level: str, words: str
) -> None:
    """It is PostgreSQL that says another time: the machine's own cannot be changed for a test."""
    await admin.execute("DROP SCHEMA IF EXISTS shifted CASCADE")
    await admin.execute("CREATE SCHEMA shifted")
    await admin.execute("GRANT USAGE ON SCHEMA shifted TO chatter")
    await admin.execute(
        "CREATE FUNCTION shifted.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE"
        f" RETURN pg_catalog.clock_timestamp() {shift}"
    )
    await admin.execute("ALTER ROLE chatter SET search_path = shifted, pg_catalog, public")
    (finding,) = await clock_check(way)
    assert finding.level == level
    assert f"s {words} this machine's" in finding.found


@pytest.mark.parametrize(
    ("change", "words", "line"),
    [
        ({"database": "not_there"}, "not_there", "createdb --owner chatter not_there"),
        ({"username": "nobody_such"}, "nobody_such", "\\password nobody_such"),
        ({"host": "127.0.0.1", "port": 1, "query": {}}, "does not answer", "systemctl status"),
        ({"host": "chatterd.invalid", "port": 1, "query": {}}, "chatterd.invalid", "systemctl"),
    ],
    ids=["database", "role", "port", "host"],
)
async def test_a_database_that_cannot_be_reached_is_one_fault_that_says_why(
    way: Way, change: dict[str, object], words: str, line: str
) -> None:
    away = Way(way.url.set(**change), is_embedded=False)  # type: ignore[arg-type] # as one goes
    (finding,) = await database_check(away)
    assert finding.level == "fault"
    assert words in finding.found
    assert line in finding.commands[0]


async def test_a_database_that_takes_no_more_connections_says_so(
    way: Way, admin: Connection
) -> None:
    await admin.execute(f"ALTER DATABASE {way.url.database} CONNECTION LIMIT 0")
    (finding,) = await database_check(way)
    assert finding.level == "fault"
    assert "too many connections" in finding.found
    assert "max_connections" in finding.commands[0]


async def test_an_encoding_that_cannot_hold_every_text_is_a_fault(
    way: Way, admin: Connection
) -> None:
    name = f"{way.url.database}_ascii"
    template = "TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C' ENCODING 'SQL_ASCII'"
    await admin.execute(f"CREATE DATABASE {name} {template}")
    (finding,) = await database_check(Way(way.url.set(database=name), is_embedded=False))
    assert finding.level == "fault"
    assert "SQL_ASCII" in finding.found


def test_an_old_version_is_a_warning() -> None:
    (finding,) = version_findings(130022, "13.22")
    assert finding.level == "warning"
    assert "13.22" in finding.found
    assert not list(version_findings(140000, "14.0"))


async def test_a_standby_is_a_fault_and_promoting_it_mends_that() -> None:
    with open_folder() as folder:
        with postgres(folder, options=["fsync=off"]):
            pass
        data, account = place(folder)
        (data / "standby.signal").touch()
        if account.uid is not None:
            os.chown(data / "standby.signal", account.uid, account.gid or -1)
        binaries = within_reach(find_binaries(None), account, may_copy=True)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={data}"]
        command_line: list[str | Path] = [
            binaries / "postgres",
            "-D",
            data,
            "-c",
            "fsync=off",
            *options,
        ]
        server = spawn(command_line, account, subprocess.DEVNULL)
        try:
            url = URL.create(
                "postgresql+asyncpg",
                username="chatterd",
                database="chatterd",
                query={"host": str(data)},
            )
            way = Way(url, is_embedded=False)
            findings = await until(partial(database_check, way), "fault", "standby")
            async with connected(url) as admin:
                await mend(admin, findings)
            await until(partial(database_check, way), "ok")
        finally:
            server.terminate()
            server.wait(DEADLINE_SECONDS)
