"""chatterd media doctor and chatterd media sweep."""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import URL

from chatterd import database, media_doctor, settings
from chatterd.commands.database import database_beside_a_server
from chatterd.database import Database
from chatterd.errors import DatabaseUnavailable
from chatterd.media_folder import Tally
from chatterd.media_sweep import Sweep

T = TypeVar("T")


class MediaError(Exception):
    """The media folder cannot be read or written. The message is for the operator."""


def doctor(options: argparse.Namespace) -> None:
    """Print what is in the media folder; exits with 1 when something is missing or corrupt."""
    report = _with_media(media_doctor.doctor)
    if options.json:
        facts = asdict(report) | {"total": report.total, "healthy": report.is_healthy}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        for state, keys in ("corrupt", report.corrupt_keys), ("missing", report.missing_keys):
            # Quoted: a name may hold anything.
            sys.stdout.writelines(f"{state}: {json.dumps(key)}\n" for key in keys)
        states = ("missing", "referenced", "temporary", "orphaned", "corrupt", "folders")
        _print_tallies({state: getattr(report, state) for state in states})
        sys.stdout.write(f"{'total':<10} {'':>9} {report.total:>17} bytes\n")
    if not report.is_healthy:
        sys.exit(1)


def sweep(options: argparse.Namespace) -> None:
    """Remove what no chatt names, or say what would be removed."""
    result = _with_media(
        lambda database, root: Sweep(
            database, root, options.older_than, delete=options.delete
        ).run()
    )
    done = "removed" if options.delete else "would be removed; --delete does it"
    sys.stdout.write(f"{done}:\n")
    _print_tallies({"orphaned": result.orphaned, "temporary": result.temporary})
    sys.stdout.write(f"{'records':<10} {result.records:>9}\n")
    if result.restored.count:
        sys.stdout.write("put back:\n" if options.delete else "would be put back:\n")
        _print_tallies({"restored": result.restored})
    sys.stdout.write("left alone:\n")
    _print_tallies({"unknown": result.unknown})


def _print_tallies(tallies: Mapping[str, Tally]) -> None:
    for state, tally in tallies.items():
        sys.stdout.write(f"{state:<10} {tally.count:>9} {tally.bytes:>17} bytes\n")


def _with_media(work: Callable[[Database, Path], Coroutine[Any, Any, T]]) -> T:
    """Return what `work` makes of the database and the media folder, also beside a server.

    Raises `MediaError`, `SchemaError`, `StatementError`, `EmbeddedPostgresError`.
    """
    # What it logs is about requests; a command says it in its own words.
    logging.getLogger(database.__name__).setLevel(logging.CRITICAL)

    async def run(url: URL) -> T:
        opened = database.Database(url)
        try:
            return await work(opened, settings.MEDIA_ROOT)
        finally:
            await opened.aclose()

    with database_beside_a_server() as url:
        try:
            return asyncio.run(run(url))
        except DatabaseUnavailable as error:
            raise database.refusal(error) from error
        except OSError as error:
            raise MediaError(
                f"MEDIA_ROOT, {settings.MEDIA_ROOT}, cannot be used: {error.strerror}."
            ) from error
