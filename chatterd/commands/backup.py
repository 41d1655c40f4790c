"""chatterd backup, chatterd backup verify and chatterd restore."""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn, TextIO

from tqdm import tqdm

from chatterd import backup, settings
from chatterd.archive import BackupError, DamagedError, quoted
from chatterd.backup import Contents, new_file
from chatterd.commands.database import database_beside_a_server, opened_database
from chatterd.restore import restore as restored


def back_up(path: str) -> None:
    """Write an archive to `path`, or to the standard output for -; raises `BackupError`."""
    if path == "-" and sys.stdout.isatty():
        raise BackupError("The standard output is a terminal: name a file, or a program behind |.")
    with database_beside_a_server() as url, _archive_to_write(path) as file, _bar(0) as bar:
        contents = asyncio.run(backup.back_up(url, settings.MEDIA_ROOT, file, bar))
    _print_contents(contents, sys.stderr if path == "-" else sys.stdout)


@contextmanager
def _archive_to_write(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as file:
            yield file
    else:
        with new_file(Path(path)) as file:
            yield file


def verify(path: str) -> None:
    """Read an archive from end to end; raises `BackupError` when it is damaged."""
    with _archive_to_read(path) as file, _bar(os.fstat(file.fileno()).st_size) as bar:
        contents = backup.verify(file, bar)
    _print_contents(contents, sys.stdout)


def restore(options: argparse.Namespace) -> None:
    """Fill an empty place; raises `BackupError`."""
    with _archive_to_read(options.file) as file:
        if not file.seekable():
            raise BackupError(f"{options.file} cannot be read twice: restore from a file.")
        with _bar(2 * os.fstat(file.fileno()).st_size) as bar:
            contents = backup.verify(file, bar)
            file.seek(0)
            with opened_database(migrated=False) as url:
                asyncio.run(restored(url, settings.MEDIA_ROOT, file, bar))
    _print_contents(contents, sys.stdout)


@contextmanager
def _archive_to_read(path: str | Path) -> Iterator[IO[bytes]]:
    try:
        with open(0 if path == "-" else path, "rb") as file:  # noqa: PTH123 - maybe a descriptor
            try:
                yield file
            except DamagedError as error:
                raise BackupError(f"{path}: {error}") from error
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error.strerror}.") from error


def _bar(size: int) -> "tqdm[NoReturn]":
    """Return a bar for so many bytes, which is shown on a terminal."""
    return tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False)


def _print_contents(contents: Contents, stream: TextIO) -> None:
    manifest = contents.manifest
    for state, keys in ("missing", manifest.missing_keys), ("corrupt", contents.corrupt_keys):
        sys.stderr.writelines(f"{state}: {quoted(key)}\n" for key in keys)
    made_by = (
        f"chatterd {manifest.chatterd}, schema {manifest.revision},"
        f" PostgreSQL {manifest.postgresql}"
    )
    lines = [f"created    {manifest.created.isoformat(timespec='seconds')} by {made_by}\n"]
    lines += [f"{table.name:<16} {table.rows:>9} rows\n" for table in manifest.tables]
    lines += [f"{'files':<16} {manifest.files:>9} {manifest.bytes:>17} bytes\n"]
    lines += [
        f"{'missing':<16} {manifest.missing:>9}\n",
        f"{'corrupt':<16} {contents.corrupt:>9}\n",
    ]
    stream.writelines(lines)
