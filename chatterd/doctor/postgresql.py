"""The checks of PostgreSQL: whether it can be used, and keeps what it is given.

Those of the database, here and in `schema` and `activity`, open a connection of their own each,
write nothing into a table, and ask for nothing that another role than the server's is needed for.
"""

import asyncio
import shlex
from collections.abc import Iterator
from typing import Final

import asyncpg

from chatterd import settings
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.doctor.way import Way, quoted, row_of

_OLDEST_VERSION: Final = 14

PRIVILEGES: Final = {
    "chatts": ("SELECT", "INSERT", "UPDATE"),
    "feed": ("SELECT",),
    "media": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "idempotency_keys": ("SELECT", "INSERT", "DELETE"),
    "alembic_version": ("SELECT",),
}
"""What the server's role must be allowed, by table."""


async def database_check(way: Way) -> list[Finding]:
    """See whether it can be reached, and is one that chatterd can use. A fault comes alone."""
    try:
        async with asyncio.timeout(settings.DATABASE_TIMEOUT), way.connected() as connection:
            row = await row_of(connection, _DATABASE)
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
        role, schema, is_superuser = await row_of(connection, _ROLE)
        if schema is None:
            return [
                fault(
                    f"The role {role} may not use the schema of the tables.",
                    "Allow it:",
                    way.as_admin(f"GRANT USAGE ON SCHEMA public TO {quoted(role)}"),
                )
            ]
        pairs = [(table, name) for table, names in PRIVILEGES.items() for name in names]
        missing = await connection.fetch(_MISSING, *map(list, zip(*pairs, strict=True)))
        owners = await connection.fetch(_OWNERS)
    findings = [
        fault(
            f"The role {role} may not {', '.join(row['names'])} on {row['name']}.",
            "Allow it:",
            way.as_admin(f"GRANT {', '.join(row['names'])} ON {row['name']} TO {quoted(role)}"),
        )
        for row in missing
    ]
    findings += [
        fault(
            f"{row['owner']}, who owns chatts' triggers, may not {row['privilege']} on"
            f" {row['name']}: no post can be stored.",
            "Allow it:",
            way.as_admin(f"GRANT {row['privilege']} ON {row['name']} TO {quoted(row['owner'])}"),
        )
        for row in owners
    ]
    if is_superuser and not way.is_embedded:
        findings.append(
            warning(
                f"The role {role} is a superuser: a hole in chatterd would be one in the whole"
                " PostgreSQL, and in its machine.",
                "The server needs no more than its tables:",
                way.as_admin(f"ALTER ROLE {quoted(role)} NOSUPERUSER"),
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
        row = await row_of(connection, _CONNECTIONS)
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


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"nothing came within {settings.DATABASE_TIMEOUT} s"
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
