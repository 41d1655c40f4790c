"""Taking a backup: the rows of one moment and the files they name, also while servers write.

docs/decisions/0016-backup.md says why it is consistent.
"""

import fcntl
import os
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Final, NoReturn, TypeAlias

import asyncpg
from anyio import to_thread
from sqlalchemy import NullPool
from sqlalchemy import Table as SchemaTable
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine

from chatterd import __version__, settings
from chatterd.archive import (
    FORMAT,
    ArchiveReader,
    ArchiveWriter,
    BackupError,
    Manifest,
    Table,
    pieces_of,
    quoted,
)
from chatterd.database import DRIVER_TROUBLE, SchemaError, Statement, require_head, trouble
from chatterd.media import digest_of_key, sync_folder
from chatterd.media_folder import PAGE, without_file
from chatterd.models import MEDIA_LOCK, Base, Chatt, Feed, named_media_after

if TYPE_CHECKING:
    from tqdm import tqdm

Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Bar: TypeAlias = "tqdm[NoReturn]"

TABLES: Final[Sequence[SchemaTable]] = [
    table for table in Base.metadata.sorted_tables if table is not Feed.__table__
]
"""What is in a backup. A restored feed is another: it gets an epoch of its own."""

_MEMBER_SIZE: Final = 4 << 20
_SPOOL_MAX: Final = 1 << 20
_KEYS_LISTED: Final = 100
# Longer than any that works, for one that has come to a stop.
_STATEMENT_SECONDS: Final = 24 * 3600.0
_NAMED_AFTER: Final = Statement(named_media_after(PAGE))
# What a value's text depends on, and the limits that the role or the database may have.
_SESSION: Final = (
    """
    SET statement_timeout = 0;
    SET lock_timeout = '5s';
    SET datestyle = 'ISO, YMD';
    SET timezone = 'UTC';
    SET bytea_output = 'hex';
    """,
    """
    SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN
        ('transaction_timeout', 'idle_session_timeout', 'idle_in_transaction_session_timeout')
    """,
)


@dataclass
class Contents:
    """What an archive holds.

    corrupt: how many of its files were not what their keys are the digests of when it was made,
        and so are not now; corrupt_keys: the first of them.
    """

    manifest: Manifest
    corrupt: int = 0
    corrupt_keys: list[str] = field(default_factory=list)

    def add_file(self, key: str, digest: str) -> None:
        """Take note of a file and its digest."""
        if digest_of_key(key) not in {None, digest}:
            self.corrupt += 1
            self.corrupt_keys += [key][: _KEYS_LISTED - len(self.corrupt_keys)]


async def back_up(url: URL, root: Path, file: IO[bytes], bar: Bar) -> Contents:
    """Write the database at `url` and the files in `root` that its chatts name to `file`.

    A file that is not there is left out, and counted. Raises `BackupError`, `SchemaError`,
    `StatementError`.
    """
    with SpooledTemporaryFile(_SPOOL_MAX) as keys, ArchiveWriter(file, bar.update) as writer:
        async with connected(url) as driver:
            await hold_media_alone(driver)
            async with driver.transaction(isolation="repeatable_read", readonly=True):
                contents = Contents(await _survey(driver, root, keys))
                manifest = contents.manifest
                bar.reset(manifest.bytes)
                writer.add_manifest(manifest)
                for table in manifest.tables:
                    await _add_rows(driver, table, writer, bar)
            # The snapshot is not needed any more; the files are, which the lock keeps in place.
            keys.seek(0)
            written = 0
            for line in keys:
                key = line.decode().removesuffix("\n")
                size, digest = await to_thread.run_sync(_add_file, writer, root, key)
                written += size
                contents.add_file(key, digest)
            if written != manifest.bytes:
                raise BackupError("Files in MEDIA_ROOT were changed meanwhile: try again.")
        writer.finish()
    return contents


def verify(file: IO[bytes], bar: Bar) -> Contents:
    """Read a whole archive; return what it holds.

    Raises `DamagedError` where it is not as it was written, `BackupError` where it cannot be read.
    """
    with ArchiveReader(file, bar.update) as archive:
        contents = Contents(archive.manifest)
        for member in archive.members():
            for _ in member.pieces:
                pass
            if member.key is not None:
                contents.add_file(member.key, member.digest)
        return contents


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that is there, as `path`, when the context ends without an error.

    Until then it is `path`.partial. Raises `BackupError` where there is a file already, or none
    can be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        _require_absent(path)
        # Whoever could read it could read what was posted, and when by whom with which key.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(partial, flags, 0o600), "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                os.fchmod(file.fileno(), 0o600)
                file.truncate(0)
                yield file
                os.fsync(file.fileno())
                _require_absent(path)
                partial.rename(path)
                sync_folder(path.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except BlockingIOError:
        raise BackupError(f"{partial} is being written by another process.") from None
    except OSError as error:
        raise BackupError(f"{path} cannot be written: {error.strerror}.") from error


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise BackupError(f"{path} is there already, and is not written over: name another file.")


@asynccontextmanager
async def connected(url: URL) -> AsyncIterator[Driver]:
    """Connect to the database at `url` without limits of time for what is done there.

    Raises `SchemaError` or `StatementError` for what PostgreSQL or the driver has to say.
    """
    engine = create_async_engine(
        url,
        poolclass=NullPool,
        connect_args={
            "timeout": settings.DATABASE_TIMEOUT,
            "command_timeout": _STATEMENT_SECONDS,
            "server_settings": {"application_name": "chatterd backup"},
        },
    )
    try:
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            for statement in _SESSION:
                await driver.execute(statement)
            yield driver
    except SchemaError:
        raise
    except DRIVER_TROUBLE as error:
        raise trouble(error) from error
    finally:
        await engine.dispose()


async def hold_media_alone(driver: Driver) -> None:
    """Keep everybody from removing files that no chatt names, as long as the connection lasts."""
    try:
        await driver.execute(f"SELECT pg_advisory_lock({MEDIA_LOCK})")
    except asyncpg.LockNotAvailableError:
        raise BackupError("Another backup, or a restore, is under way: try again later.") from None


async def revision_of(driver: Driver) -> str | None:
    """Return the revision of the database's schema; None where there is none."""
    if await driver.fetchval("SELECT to_regclass('alembic_version')") is None:
        return None
    revision: str | None = await driver.fetchval("SELECT version_num FROM alembic_version")
    return revision


async def _survey(driver: Driver, root: Path, keys: IO[bytes]) -> Manifest:
    """Return what there is; write the key of each file that is there to `keys`."""
    revision = await revision_of(driver)
    require_head(revision)
    assert revision is not None
    tables = [
        Table(
            str(table.name),
            # It is given anew, in the order of the rows.
            [str(column.name) for column in table.columns if column is not Chatt.__table__.c.seq],
            await driver.fetchval(f"SELECT count(*) FROM {table.name}"),  # noqa: S608 - ours
        )
        for table in TABLES
    ]
    files = size_of_files = missing = 0
    missing_keys: list[str] = []
    after = ""
    while True:
        page = await driver.fetch(_NAMED_AFTER.sql, *_NAMED_AFTER.arguments({"after": after}))
        named = [key for (key,) in page]
        gone = await to_thread.run_sync(without_file, root, named)
        there = [key for key in named if key not in set(gone)]
        size_of_files += await to_thread.run_sync(_size, root, there)
        keys.writelines(f"{key}\n".encode() for key in there)
        files += len(there)
        missing += len(gone)
        missing_keys += gone[: _KEYS_LISTED - len(missing_keys)]
        if len(named) < PAGE:
            break
        after = named[-1]
    if missing and not await to_thread.run_sync(root.is_dir):  # a wrong setting, most likely
        raise BackupError(f"MEDIA_ROOT, {root}, is not there, and chatts name files in it.")
    return Manifest(
        format=FORMAT,
        chatterd=__version__,
        postgresql=await driver.fetchval("SHOW server_version"),
        revision=revision,
        created=await driver.fetchval("SELECT now()"),
        tables=tables,
        files=files,
        bytes=size_of_files,
        missing=missing,
        missing_keys=missing_keys,
    )


def _size(root: Path, keys: Sequence[str]) -> int:
    try:
        return sum((root / key).lstat().st_size for key in keys)
    except OSError as error:
        raise BackupError(f"MEDIA_ROOT, {root}, cannot be read: {error.strerror}.") from error


async def _add_rows(driver: Driver, table: Table, writer: ArchiveWriter, bar: Bar) -> None:
    order = ", ".join(column.name for column in Base.metadata.tables[table.name].primary_key)
    query = f"SELECT {', '.join(table.columns)} FROM {table.name} ORDER BY {order}"  # noqa: S608 - ours
    buffer = bytearray()
    number = 0

    def flush(size: int) -> None:
        nonlocal number
        number += 1
        bar.total = (bar.total or 0) + size
        writer.add_rows(table.name, number, bytes(buffer[:size]))
        del buffer[:size]

    async def take(data: bytes) -> None:
        buffer.extend(data)
        if len(buffer) >= _MEMBER_SIZE:
            flush(buffer.rindex(b"\n") + 1)

    await driver.copy_from_query(query, output=take)
    if buffer:
        flush(len(buffer))


def _add_file(writer: ArchiveWriter, root: Path, key: str) -> tuple[int, str]:
    """Add a file; return its size and its digest."""
    try:
        # Neither a link nor a pipe is waited for, should one have come into its place.
        descriptor = os.open(root / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BackupError(f"{quoted(key)} in MEDIA_ROOT is no file any more: try again.")
            size = status.st_size
            return size, writer.add_file(key, size, pieces_of(file, size))
    except OSError as error:
        raise BackupError(
            f"{quoted(key)} in MEDIA_ROOT, {root}, cannot be read: {error.strerror}."
        ) from error
