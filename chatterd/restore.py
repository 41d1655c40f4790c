"""Filling an empty place from a backup.

docs/decisions/0016-backup.md says why an interrupted restore leaves an empty place or a whole one.
"""

import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from alembic import command
from alembic.script import ScriptDirectory
from anyio import to_thread
from sqlalchemy import exc
from sqlalchemy.engine import URL

from chatterd.archive import ArchiveReader, BackupError, DamagedError, Manifest, quoted
from chatterd.backup import TABLES, Bar, Driver, connected, hold_media_alone, revision_of
from chatterd.database import alembic_config, migrate, trouble
from chatterd.media import sync_folder

RESTORING: Final = ".restoring"
"""The folder, below the media folder, of what is being restored; while it is there, what lies in
the media folder may be from a restore that was interrupted."""

_SERVERS: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'chatterd'
"""


async def restore(url: URL, root: Path, file: IO[bytes], bar: Bar) -> None:
    """Fill the empty database at `url` and the empty media folder `root` from an archive.

    Whoever calls it has verified the archive; here it is verified once more, before anything is
    committed. Raises `BackupError`, `SchemaError`, `StatementError`, and
    `alembic.util.CommandError` for a schema that cannot be made.
    """
    with ArchiveReader(file, bar.update) as archive:
        _require_known(archive.manifest)
        await to_thread.run_sync(_require_no_files, root)
        async with connected(url) as driver:
            await hold_media_alone(driver)
            await _require_no_servers(driver)
            await _require_no_rows(driver)
            await to_thread.run_sync(_begin_files, root)
            revision = await revision_of(driver)
            # alembic runs an event loop of its own.
            await to_thread.run_sync(_bring_schema, url, revision, archive.manifest.revision)
            async with driver.transaction():
                # From here on nobody else posts, until all is there.
                await driver.execute(f"LOCK TABLE {_names(archive.manifest)} IN EXCLUSIVE MODE")
                await _require_no_rows(driver)
                await _fill(driver, root, archive)
                await driver.execute("UPDATE feed SET epoch = gen_random_uuid()")
            await to_thread.run_sync(_end_files, root)
            await to_thread.run_sync(migrate, url)
            await driver.execute(f"ANALYZE {_names(archive.manifest)}")


async def _fill(driver: Driver, root: Path, archive: ArchiveReader) -> None:
    """Copy rows into the transaction, and files to where they are served from, durably."""
    columns = {table.name: table.columns for table in archive.manifest.tables}
    rows: Counter[str] = Counter()
    for member in archive.members():
        if member.table is not None:
            source = _source(member.pieces)
            done = await driver.copy_to_table(
                member.table, source=source, columns=columns[member.table]
            )
            rows[member.table] += int(done.removeprefix("COPY "))
        elif member.key is not None:
            await to_thread.run_sync(_put_file, root, member.key, member.pieces)
    for table in archive.manifest.tables:
        if rows[table.name] != table.rows:
            raise DamagedError(f"PostgreSQL finds {rows[table.name]} rows of {table.name} in it.")
    await to_thread.run_sync(sync_folder, root)


async def _source(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _names(manifest: Manifest) -> str:
    return ", ".join(table.name for table in manifest.tables)


def _require_known(manifest: Manifest) -> None:
    known = {table.name: set(table.columns.keys()) for table in TABLES}
    tables_are_known = all(
        known.get(table.name, set()).issuperset(table.columns) and table.columns
        for table in manifest.tables
    )
    if manifest.revision not in _revisions() or not tables_are_known:
        raise BackupError(
            f"The archive's schema, revision {quoted(manifest.revision)} of chatterd"
            f" {quoted(manifest.chatterd)}, is unknown to this version: restore it with that one."
        )


def _revisions() -> list[str]:
    """Return the revisions of the schema, oldest first."""
    script = ScriptDirectory.from_config(alembic_config(URL.create("postgresql")))
    return [step.revision for step in script.walk_revisions()][::-1]


def _bring_schema(url: URL, current: str | None, wanted: str) -> None:
    """Bring the schema of a database without rows to the revision of those that are coming."""
    order = _revisions()
    is_newer = current in order and order.index(current) > order.index(wanted)
    change = command.downgrade if is_newer else command.upgrade
    try:
        change(alembic_config(url), wanted)
    except (OSError, exc.DBAPIError) as error:
        raise trouble(error) from error


async def _require_no_servers(driver: Driver) -> None:
    if await driver.fetchval(_SERVERS):
        raise BackupError("A server uses the database: stop it, and restore then.")


async def _require_no_rows(driver: Driver) -> None:
    for table in TABLES:
        is_there = await driver.fetchval("SELECT to_regclass($1)", table.name) is not None
        if is_there and await driver.fetchval(f"SELECT EXISTS (SELECT FROM {table.name})"):  # noqa: S608 - ours
            raise BackupError(
                f"The database is not empty, {table.name} has rows: restore into a new one."
            )


def _require_no_files(root: Path) -> None:
    """Raise `BackupError` where files of another database may lie, which would be swept."""
    if (root / RESTORING).exists() or not root.exists():
        return
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    raise BackupError(
                        f"MEDIA_ROOT, {root}, is not empty, {quoted(entry.name)} is there:"
                        " restore into a new folder."
                    )
    except OSError as error:
        raise _unwritable(root, error) from error


def _begin_files(root: Path) -> None:
    try:
        (root / RESTORING).mkdir(parents=True, exist_ok=True)
        sync_folder(root)
    except OSError as error:
        raise _unwritable(root, error) from error


def _put_file(root: Path, key: str, pieces: Iterator[bytes]) -> None:
    arriving = root / RESTORING / "arriving"
    try:
        with arriving.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        arriving.replace(root / key)
    except OSError as error:
        raise _unwritable(root, error) from error


def _end_files(root: Path) -> None:
    with suppress(OSError):  # all is there; an empty folder harms nobody
        (root / RESTORING).rmdir()


def _unwritable(root: Path, error: OSError) -> BackupError:
    return BackupError(f"MEDIA_ROOT, {root}, cannot be written: {error.strerror}.")
