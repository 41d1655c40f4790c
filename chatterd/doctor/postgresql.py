"""The checks of the database: whether it can be used, and whether it keeps what it is given.

Each opens a connection of its own, writes nothing into a table, and asks for nothing that another
role than the server's is needed for.
"""

import asyncio
import secrets
import shlex
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

import asyncpg
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine import URL

from chatterd import settings
from chatterd.database import alembic_config, head_revision
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.models import Base

if TYPE_CHECKING:
    from typing import TypeAlias

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_HERE: Final = ("localhost", "127.0.0.1", "::1")
_SOCKETS: Final = ("/run/postgresql", "/var/run/postgresql")
"""Where psql looks by itself on Debian."""
_CLOSE_SECONDS: Final = 1.0
_OLDEST_VERSION: Final = 14

PRIVILEGES: Final = {
    "chatts": ("SELECT", "INSERT", "UPDATE"),
    "feed": ("SELECT",),
    "media": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "idempotency_keys": ("SELECT", "INSERT", "DELETE"),
    "alembic_version": ("SELECT",),
}
"""What the server's role must be allowed, by table."""

TRIGGERS: Final = (
    "chatts_lock",
    "chatts_number",
    "chatts_notify",
    "chatts_new_epoch",
    "chatts_new_epoch_after_truncate",
    "chatts_new_epoch_after_move",
)
"""Those that make of the table chatts a log; alembic/versions/0001_chatts.py has them."""

# The lock under which the log grows; the triggers take it.
_LOG_LOCK: Final = int.from_bytes(b"chatts", "big")
# A transaction that is open for so long keeps autovacuum from doing its work.
_LONG_SECONDS: Final = 300.0
_DEAD_ROWS: Final = 10_000
# PostgreSQL itself stops at 2**31; autovacuum has been at it since 2**28 * 0.75.
_OLD_TRANSACTIONS: Final = 2**30
_ROUNDS: Final = 10
_SLOW_MILLISECONDS: Final = 50.0
_CLOCK_SECONDS, _CLOCK_FAULT_SECONDS = 1.0, 60.0


class Way(NamedTuple):
    """The way to the database at `url`, which chatterd itself runs if it `is_embedded`."""

    url: URL
    is_embedded: bool

    @property
    def name(self) -> str:
        """Where it is, for people."""
        host, port = self._place()
        return f"{self.url.database} at {host or 'localhost'}:{port}"

    def as_admin(self, *statements: str) -> str:
        """Return the command that executes the statements as who may do everything."""
        host, port = self._place()
        if self.is_embedded:
            words = ["psql", "-h", str(host), "-U", str(self.url.username)]
        elif host is None or host in _HERE or host.startswith("/"):
            words = ["sudo", "-u", "postgres", "psql"]
            if host is not None and host.startswith("/") and host not in _SOCKETS:
                words += ["-h", host]
            if port != 5432:
                words += ["-p", str(port)]
        else:
            words = ["psql", "-h", str(host), "-p", str(port), "-U", "postgres"]
        words += ["-d", str(self.url.database)]
        return " ".join(
            [*map(shlex.quote, words), *(f"-c {shlex.quote(each)}" for each in statements)]
        )

    def configured(self, name: str, value: str) -> str:
        """Return the command that gives a setting of PostgreSQL another value."""
        return self.as_admin(f"ALTER SYSTEM SET {name} = {value}", "SELECT pg_reload_conf()")

    def _place(self) -> tuple[str | None, int]:
        _, options = dialect().create_connect_args(self.url)  # type: ignore[no-untyped-call] # SQLAlchemy's
        return options.get("host"), options.get("port", 5432)

    @asynccontextmanager
    async def connected(self) -> "AsyncIterator[Connection]":
        """Open a connection; raises what asyncpg does."""
        _, options = dialect().create_connect_args(self.url)  # type: ignore[no-untyped-call] # SQLAlchemy's
        connection = await asyncpg.connect(
            **options, server_settings={"application_name": "chatterd doctor"}
        )
        try:
            yield connection
        finally:
            with suppress(OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError):
                await connection.close(timeout=_CLOSE_SECONDS)


async def database_check(way: Way) -> list[Finding]:
    """See whether it can be reached, and is one that chatterd can use. A fault comes alone."""
    try:
        async with asyncio.timeout(settings.DATABASE_TIMEOUT), way.connected() as connection:
            row = await _row(connection, _DATABASE)
    except asyncpg.InvalidAuthorizationSpecificationError as error:
        return [
            fault(
                f"{way.name}: {_words(error)}.",
                "Give the role the password that stands in DATABASE_URL:",
                way.as_admin(f"\\password {way.url.username}"),
            )
        ]
    except asyncpg.InvalidCatalogNameError as error:
        words = ["createdb", "--owner", way.url.username or "chatter", str(way.url.database)]
        return [
            fault(
                f"{way.name}: {_words(error)}.",
                "Name the right one in DATABASE_URL, or make it:",
                f"sudo -u postgres {shlex.join(words)}",
            )
        ]
    except asyncpg.TooManyConnectionsError as error:
        return [
            fault(
                f"{way.name}: {_words(error)}.",
                "Allow more connections and start PostgreSQL anew, or make DATABASE_POOL_SIZE"
                " smaller:",
                way.as_admin("ALTER SYSTEM SET max_connections = 200"),
                "sudo systemctl restart postgresql",
            )
        ]
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return [
            fault(
                f"{way.name} does not answer: {_words(error)}.",
                "See whether PostgreSQL runs, and whether DATABASE_URL names the right place:",
                "systemctl status 'postgresql*'",
            )
        ]
    return list(_database(way, row)) or [
        ok(f"PostgreSQL {row['version']}; {row['name']} as {row['role']}, {row['size']}")
    ]


_DATABASE: Final = """
    SELECT current_setting('server_version_num')::int AS number,
        split_part(current_setting('server_version'), ' ', 1) AS version,
        current_database() AS name, current_user AS role,
        pg_size_pretty(pg_database_size(current_database())) AS size,
        current_setting('server_encoding') AS encoding,
        pg_is_in_recovery() AS is_standby,
        current_setting('default_transaction_read_only')::bool AS is_read_only
"""


def _database(way: Way, row: asyncpg.Record) -> Iterator[Finding]:
    yield from version_findings(row["number"], row["version"])
    if row["encoding"] != "UTF8":
        yield fault(
            f"The database {row['name']} has the encoding {row['encoding']}, which cannot hold"
            " every text.",
            "Make one with UTF8, name it in DATABASE_URL, and move the chatts there with pg_dump:",
            f"sudo -u postgres createdb --encoding UTF8 --template template0 {row['name']}_utf8",
        )
    if row["is_standby"]:
        yield fault(
            f"{way.name} is a standby, which takes no posts.",
            "Name the primary in DATABASE_URL. If that is lost, make this one the primary:",
            way.as_admin("SELECT pg_promote()"),
        )
    elif row["is_read_only"]:
        yield fault(
            "Transactions are read-only: no post can be stored.",
            "Let them write again; look also for ALTER ROLE or ALTER DATABASE that set it:",
            way.configured("default_transaction_read_only", "off"),
        )


def version_findings(number: int, version: str) -> Iterator[Finding]:
    """Look at PostgreSQL's version, `number` as `server_version_num` has it."""
    if number // 10_000 < _OLDEST_VERSION:
        yield warning(
            f"PostgreSQL {version} is older than {_OLDEST_VERSION}, the oldest that chatterd is"
            " tested with.",
            "Upgrade it; Debian's way is:",
            "man pg_upgradecluster",
        )


async def privileges_check(way: Way) -> list[Finding]:
    """See whether the role may do what the server does, and not everything."""
    async with way.connected() as connection:
        role, schema, is_superuser = await _row(connection, _ROLE)
        if schema is None:
            return [
                fault(
                    f"The role {role} may not use the schema of the tables.",
                    "Allow it:",
                    way.as_admin(f"GRANT USAGE ON SCHEMA public TO {_quoted(role)}"),
                )
            ]
        pairs = [(table, name) for table, names in PRIVILEGES.items() for name in names]
        missing = await connection.fetch(_MISSING, *map(list, zip(*pairs, strict=True)))
        owners = await connection.fetch(_OWNERS)
    findings = [
        fault(
            f"The role {role} may not {', '.join(row['names'])} on {row['name']}.",
            "Allow it:",
            way.as_admin(f"GRANT {', '.join(row['names'])} ON {row['name']} TO {_quoted(role)}"),
        )
        for row in missing
    ]
    findings += [
        fault(
            f"{row['owner']}, who owns chatts' triggers, may not {row['privilege']} on"
            f" {row['name']}: no post can be stored.",
            "Allow it:",
            way.as_admin(f"GRANT {row['privilege']} ON {row['name']} TO {_quoted(row['owner'])}"),
        )
        for row in owners
    ]
    if is_superuser and not way.is_embedded:
        findings.append(
            warning(
                f"The role {role} is a superuser: a hole in chatterd would be one in the whole"
                " PostgreSQL, and in its machine.",
                "The server needs no more than its tables:",
                way.as_admin(f"ALTER ROLE {_quoted(role)} NOSUPERUSER"),
            )
        )
    return findings or [ok(f"the role {role} may do what the server does")]


_ROLE: Final = """
    SELECT current_user, current_schema(), rolsuper FROM pg_roles WHERE rolname = current_user
"""
_MISSING: Final = """
    SELECT name, array_agg(privilege ORDER BY place) AS names
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS needed (name, privilege, place)
    WHERE to_regclass(name) IS NOT NULL AND NOT has_table_privilege(to_regclass(name), privilege)
    GROUP BY name ORDER BY min(place)
"""
# Triggers run as their owner.
_OWNERS: Final = """
    SELECT DISTINCT pg_get_userbyid(proowner) AS owner, privilege,
        CASE WHEN is_sequence THEN 'SEQUENCE ' ELSE '' END || name AS name
    FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid,
        (VALUES ('chatts_number', 'chatts_seq', 'USAGE', true),
            ('chatts_new_epoch', 'feed', 'UPDATE', false))
            AS needed (function, name, privilege, is_sequence)
    WHERE tgrelid = to_regclass('chatts') AND proname = function
        AND to_regclass(name) IS NOT NULL
        AND NOT CASE WHEN is_sequence
            THEN has_sequence_privilege(proowner, to_regclass(name), privilege)
            ELSE has_table_privilege(proowner, to_regclass(name), privilege) END
"""


async def schema_check(way: Way) -> list[Finding]:
    """See whether the tables are those of this version, with all that belongs to them."""
    head = head_revision()
    async with way.connected() as connection:
        revision = None
        if await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL"):
            revision = await connection.fetchval("SELECT version_num FROM alembic_version")
        if revision != head:
            return [_not_at_head(way, revision, head)]
        names = [name for table in Base.metadata.tables.values() for name in _named(table.name)]
        findings = [
            *_indexes(way, await connection.fetch(_INDEXES, names)),
            *_triggers(way, await connection.fetch(_TRIGGERS, list(TRIGGERS))),
        ]
        if await connection.fetchval("SELECT count(*) FROM feed") != 1:
            findings.append(
                fault(
                    "The table feed has no row: no feed can be read.",
                    "If a restore is under way, wait. Else put the row back:",
                    way.as_admin("INSERT INTO feed DEFAULT VALUES"),
                )
            )
        if await connection.fetchval("SHOW session_replication_role") != "origin":
            findings.append(
                fault(
                    "session_replication_role keeps the triggers from running: followers miss"
                    " posts.",
                    "Let them run:",
                    way.as_admin(
                        f"ALTER ROLE {_quoted(way.url.username or '')} RESET"
                        " session_replication_role"
                    ),
                )
            )
    return findings or [ok(f"at revision {head}, with {len(TRIGGERS)} triggers")]


def _named(table: str) -> Iterator[str]:
    """Yield the names of the indexes that a table has by our models."""
    found = Base.metadata.tables[table]
    yield from (str(index.name) for index in found.indexes)
    for constraint in found.constraints:
        if not isinstance(constraint, CheckConstraint):
            yield str(constraint.name)


def _not_at_head(way: Way, revision: str | None, head: str | None) -> Finding:
    known = ScriptDirectory.from_config(alembic_config(way.url)).walk_revisions()
    if revision is not None and revision not in {script.revision for script in known}:
        return fault(
            f"The schema is at revision {revision}, which a newer chatterd has made; this one"
            f" works on {head}.",
            "Install that version again, or restore the backup made before it.",
        )
    then = "starts and mends it" if way.is_embedded else "does not start"
    return fault(
        f"The schema is at revision {revision or 'none'}; this version works on {head}: the server"
        f" {then}.",
        "Make a backup, and bring it up to date:",
        "chatterd migrate",
    )


_INDEXES: Final = """
    SELECT name, indisvalid AS is_valid FROM unnest($1::text[]) AS name
    LEFT JOIN pg_index ON indexrelid = to_regclass(name)
    WHERE indisvalid IS NOT TRUE
"""
_TRIGGERS: Final = """
    SELECT name, tgenabled::text AS enabled FROM unnest($1::text[]) AS name
    LEFT JOIN pg_trigger ON tgname = name AND tgrelid = to_regclass('chatts')
    WHERE tgenabled IS NULL OR tgenabled NOT IN ('O', 'A')
"""


def _indexes(way: Way, rows: list[asyncpg.Record]) -> Iterator[Finding]:
    for row in rows:
        name = row["name"]
        if row["is_valid"] is None:
            yield fault(
                f"The index {name} is missing: requests are slow, or files take the server for"
                " one that is being restored.",
                "If a restore is under way, wait. Else restore the schema from a backup made with"
                " pg_dump; this prints the statement that makes the index:",
                f"pg_restore --schema-only --index={name} BACKUP",
            )
        else:
            yield warning(
                f"The index {name} is invalid: it is not used.",
                "Make it anew:",
                way.as_admin(f"REINDEX INDEX {name}"),
            )


def _triggers(way: Way, rows: list[asyncpg.Record]) -> Iterator[Finding]:
    for row in rows:
        name = row["name"]
        if row["enabled"] is None:
            yield fault(
                f"The trigger {name} is missing: followers miss posts.",
                "Restore the database from a backup; alembic/versions/0001_chatts.py has the"
                " trigger for who wants to put it back by hand.",
            )
        else:
            yield fault(
                f"The trigger {name} is off: followers miss posts.",
                "Switch it on:",
                way.as_admin(f"ALTER TABLE chatts ENABLE TRIGGER {name}"),
            )


async def durability_check(way: Way) -> list[Finding]:
    """See whether what was answered survives a power cut, and the disk keeps what it was given."""
    async with way.connected() as connection:
        values = await connection.fetch(
            "SELECT name, current_setting(name) AS value"
            " FROM unnest(ARRAY['fsync', 'full_page_writes', 'synchronous_commit']) AS name"
        )
        failures = await connection.fetchval(
            "SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()"
        )
    harms = {
        "fsync": "a power cut can destroy the whole database",
        "full_page_writes": "a power cut can destroy parts of tables",
        "synchronous_commit": "a crash loses posts that were answered",
    }
    findings = [
        fault(
            f"{row['name']} is off: {harms[row['name']]}.",
            "Switch it on; look also for ALTER ROLE or ALTER DATABASE that switch it off:",
            way.configured(row["name"], "on"),
        )
        for row in values
        if row["value"] == "off"
    ]
    if failures:
        findings.append(
            fault(
                f"{failures} blocks of the database were found damaged: the disk is failing.",
                "Make a backup at once, move to another disk, and look at the kernel's log:",
                "sudo dmesg --level err",
            )
        )
    return findings or [ok("what was answered survives a power cut")]


async def connections_check(way: Way, processes: int) -> list[Finding]:
    """See whether `processes` servers get the connections that they may open."""
    async with way.connected() as connection:
        row = await _row(connection, _CONNECTIONS)
    limits = [limit for limit in (row["role_limit"], row["database_limit"]) if limit >= 0]
    room = min([row["most"] - row["reserved"], *limits])
    need = processes * settings.DATABASE_POOL_SIZE
    servers = f"{processes} process{'es' if processes > 1 else ''}"
    asked = f"{servers}, {settings.DATABASE_POOL_SIZE} connections each, make {need}"
    others = row["others"] if need <= room else 0
    if need + others <= room:
        return [ok(f"{asked} of {room}; {row['ours']} are open")]
    judge = warning if others else fault
    also = f", and other programs have {others} now" if others else ""
    return [
        judge(
            f"{asked}. PostgreSQL allows {room}{also}: requests will get 503.",
            f"Set DATABASE_POOL_SIZE to {max(5, (room - others) // processes)} or less, or allow"
            " more and start PostgreSQL anew:",
            way.as_admin(f"ALTER SYSTEM SET max_connections = {need + row['others'] + 20}"),
            "sudo systemctl restart postgresql",
        )
    ]


# What other roles' connections are for is not told to every role, but how many there are.
_CONNECTIONS: Final = """
    WITH visible AS (
        SELECT count(*) FILTER (WHERE application_name = 'chatterd') AS ours,
            count(*) FILTER (WHERE application_name = 'chatterd doctor') AS doctors
        FROM pg_stat_activity WHERE datname = current_database()
    )
    SELECT current_setting('max_connections')::int AS most,
        current_setting('superuser_reserved_connections')::int
            + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
        (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_limit,
        (SELECT datconnlimit FROM pg_database WHERE datname = current_database())
            AS database_limit,
        ours,
        (SELECT sum(numbackends) FROM pg_stat_database)::int - ours - doctors AS others
    FROM visible
"""


async def locks_check(
    way: Way,
    blocked_seconds: float = settings.DATABASE_TIMEOUT,
    long_seconds: float = _LONG_SECONDS,
) -> list[Finding]:
    """See who has kept others from writing, or autovacuum from its work, for so many seconds."""
    async with way.connected() as connection:
        blockers = await connection.fetch(
            _BLOCKERS, _LOG_LOCK >> 32, _LOG_LOCK & 0xFFFFFFFF, blocked_seconds
        )
        old = await connection.fetch(_OLD, long_seconds)
    findings = [
        fault(
            f"{_who(row)} has held a lock for {row['seconds']:.0f} s that"
            f" {row['waiting']} others wait for: posts get 503.",
            "End it, if it is not a migration that should finish:",
            way.as_admin(f"SELECT pg_terminate_backend({row['pid']})"),
        )
        for row in blockers
    ]
    blocking = {row["pid"] for row in blockers}
    findings += [
        warning(
            f"{_who(row)} has had a transaction open for {row['seconds']:.0f} s: tables grow"
            " meanwhile.",
            "See what it is; end it if nobody needs it:",
            way.as_admin(f"SELECT pg_terminate_backend({row['pid']})"),
        )
        for row in old
        if row["pid"] not in blocking
    ]
    return findings or [ok("nobody keeps others from writing")]


# Who holds the log's lock, or one on a table that keeps others from writing to it. When that began
# is seen from the transaction, if its role lets us, and from those who wait.
_BLOCKERS: Final = """
    WITH held AS (
        SELECT lock.pid,
            greatest(
                clock_timestamp() - activity.xact_start,
                (SELECT clock_timestamp() - min(waiter.waitstart) FROM pg_locks AS waiter
                WHERE NOT waiter.granted AND lock.pid = ANY (pg_blocking_pids(waiter.pid)))
            ) AS age,
            (SELECT count(*) FROM pg_locks AS waiter
            WHERE NOT waiter.granted AND lock.pid = ANY (pg_blocking_pids(waiter.pid))) AS waiting
        FROM pg_locks AS lock LEFT JOIN pg_stat_activity AS activity USING (pid)
        WHERE lock.granted AND lock.pid <> pg_backend_pid()
            AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (lock.locktype = 'advisory' AND lock.classid::bigint = $1
                    AND lock.objid::bigint = $2 AND lock.objsubid = 1
                OR lock.locktype = 'relation' AND lock.relation = to_regclass('chatts')
                    AND lock.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                        'AccessExclusiveLock'))
    )
    SELECT DISTINCT ON (held.pid) held.pid, extract(epoch FROM age)::float AS seconds, waiting,
        usename, application_name
    FROM held LEFT JOIN pg_stat_activity USING (pid)
    WHERE age > make_interval(secs => $3)
    ORDER BY held.pid, waiting DESC
"""
_OLD: Final = """
    SELECT pid, extract(epoch FROM clock_timestamp() - xact_start)::float AS seconds,
        usename, application_name
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend'
        AND xact_start < clock_timestamp() - make_interval(secs => $1)
    ORDER BY xact_start LIMIT 3
"""


def _who(row: asyncpg.Record) -> str:
    program = row["application_name"] or "a program"
    return f"{program} (process {row['pid']}, role {row['usename']})"


async def tables_check(way: Way) -> list[Finding]:
    """See whether the tables are kept small and searchable."""
    async with way.connected() as connection:
        is_on = await connection.fetchval(
            "SELECT current_setting('autovacuum')::bool AND current_setting('track_counts')::bool"
        )
        rows = await connection.fetch(_TABLES, list(PRIVILEGES))
        age = await connection.fetchval(
            "SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()"
        )
    findings = []
    if not is_on:
        findings.append(
            warning(
                "autovacuum is off: tables grow, and their plans become slow ones.",
                "Switch it on:",
                way.configured("autovacuum", "on"),
                way.configured("track_counts", "on"),
            )
        )
    findings += [
        warning(
            f"Of {row['name']}, {row['dead']} rows are dead beside {row['live']}: it is larger than"
            " it needs to be.",
            "See with this check `locks` who keeps them, and clean up:",
            way.as_admin(f"VACUUM (ANALYZE) {row['name']}"),
        )
        for row in rows
        if row["dead"] > max(_DEAD_ROWS, row["live"])
    ]
    if age > _OLD_TRANSACTIONS:
        findings.append(
            fault(
                f"The oldest transaction is {age} ago: at 2 147 483 648 PostgreSQL takes no more"
                " writes.",
                "Vacuum the whole database; see also the check `locks`:",
                way.as_admin("VACUUM (FREEZE)"),
            )
        )
    live = {row["name"]: row["live"] for row in rows}
    dead = sum(row["dead"] for row in rows)
    return findings or [ok(f"about {live.get('chatts', 0)} rows in chatts, {dead} of all are dead")]


_TABLES: Final = """
    SELECT name, n_live_tup AS live, n_dead_tup AS dead
    FROM unnest($1::text[]) AS name JOIN pg_stat_user_tables ON relid = to_regclass(name)
"""


async def lag_check(way: Way, notice_seconds: float = settings.DATABASE_TIMEOUT) -> list[Finding]:
    """Measure how long a commit takes, and from there until a listener reads of it.

    What is committed is a record in PostgreSQL's write-ahead log that nobody reads.
    """
    channel = f"chatterd_doctor_{secrets.token_hex(8)}"
    heard = asyncio.Event()
    commits, reads = [], []
    async with way.connected() as listener, way.connected() as writer:
        await listener.add_listener(channel, lambda *_: heard.set())
        for _ in range(_ROUNDS):
            heard.clear()
            begin = time.perf_counter()
            await writer.execute(
                "SELECT pg_logical_emit_message(true, 'chatterd', ''), pg_notify($1, '')", channel
            )
            committed = time.perf_counter()
            try:
                async with asyncio.timeout(notice_seconds):
                    await heard.wait()
            except TimeoutError:
                return [_deaf(way, notice_seconds)]
            await listener.fetchval("SELECT 1")
            commits.append(committed - begin)
            reads.append(time.perf_counter() - committed)
    commit, read = (1000 * statistics.median(times) for times in (commits, reads))
    found = f"commit {commit:.1f} ms, a follower has read it {read:.1f} ms later"
    if commit > _SLOW_MILLISECONDS:
        return [
            warning(
                f"{found}: every post waits for it.",
                "Put PostgreSQL's write-ahead log on a faster disk, or take other load from this"
                " one; docs/tuning.md has more. What a sync takes there:",
                "sudo -u postgres sh -c '/usr/lib/postgresql/*/bin/pg_test_fsync -s 1"
                " -f /var/lib/postgresql/sync.test'",
            )
        ]
    if read > _SLOW_MILLISECONDS:
        return [
            warning(
                f"{found}: streams are late.",
                "See what keeps the database's processors busy:",
                way.as_admin("SELECT pid, state, query FROM pg_stat_activity"),
            )
        ]
    return [ok(found)]


def _deaf(way: Way, seconds: float) -> Finding:
    return fault(
        f"No notification came within {seconds:g} s: streams and waiting requests"
        " learn of posts late.",
        "If DATABASE_URL leads to a pooler such as PgBouncer, let it lead to PostgreSQL itself: a"
        " pooler that gives connections to each transaction passes no notifications on. Else see"
        " whether the queue is full:",
        way.as_admin("SELECT pg_notification_queue_usage()"),
    )


async def clock_check(way: Way) -> list[Finding]:
    """Compare the database's clock with this machine's."""
    async with way.connected() as connection:
        await connection.fetchval("SELECT 1")
        before = datetime.now(UTC)
        theirs = await connection.fetchval("SELECT clock_timestamp()")
        after = datetime.now(UTC)
    # It was read somewhen between: what lies within is no difference.
    seconds = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    way_off = "behind" if theirs < before else "ahead of"
    found = f"The database's clock is {seconds:.1f} s {way_off} this machine's"
    mend = (
        "Chatts have the database's time. Let both machines keep time, and look at each:",
        "timedatectl status",
        "sudo apt-get install systemd-timesyncd",
    )
    if seconds > _CLOCK_FAULT_SECONDS:
        return [fault(f"{found}.", *mend)]
    if seconds > _CLOCK_SECONDS:
        return [warning(f"{found}.", *mend)]
    return [ok(f"{seconds:.1f} s between the database's and this machine's")]


async def _row(connection: "Connection", statement: str) -> asyncpg.Record:
    row = await connection.fetchrow(statement)
    assert row is not None
    return row


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"nothing came within {settings.DATABASE_TIMEOUT} s"
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
