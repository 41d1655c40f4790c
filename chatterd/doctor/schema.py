"""The check `schema`: whether the tables are those of this version, with all that they need."""

from collections.abc import Iterator
from typing import Final

import asyncpg
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint

from chatterd.database import alembic_config, head_revision
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.doctor.way import Way, quoted
from chatterd.models import Base

TRIGGERS: Final = (
    "chatts_lock",
    "chatts_number",
    "chatts_notify",
    "chatts_new_epoch",
    "chatts_new_epoch_after_truncate",
    "chatts_new_epoch_after_move",
)
"""Those that make of the table chatts a log; alembic/versions/0001_chatts.py has them."""


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
                        f"ALTER ROLE {quoted(way.url.username or '')} RESET"
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
