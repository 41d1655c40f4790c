"""The checks of what goes on in the database: `locks`, `tables`, `lag` and `clock`."""

import asyncio
import secrets
import statistics
import time
from datetime import UTC, datetime
from typing import Final

import asyncpg

from chatterd import settings
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.doctor.way import Way
from chatterd.models import Base

# The lock under which the log grows; the triggers take it.
_LOG_LOCK: Final = int.from_bytes(b"chatts", "big")
# A transaction that is open for so long keeps autovacuum from doing its work.
_LONG_SECONDS: Final = 300.0
_DEAD_ROWS: Final = 10_000
# At twice as many PostgreSQL stops; autovacuum begins to see to it at 200 million.
_OLD_TRANSACTIONS: Final = 2**30
_ROUNDS: Final = 10
_SLOW_MILLISECONDS: Final = 50.0
_CLOCK_SECONDS, _CLOCK_FAULT_SECONDS = 1.0, 60.0


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
        rows = await connection.fetch(_TABLES, list(Base.metadata.tables))
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
