"""The checks of `chatterd doctor`, in their order."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeVar, cast

import asyncpg

from chatterd import database
from chatterd.database import SchemaError, StatementError
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.doctor.activity import clock_check, lag_check, locks_check, tables_check
from chatterd.doctor.certificate import CertificateFiles, certificate_check
from chatterd.doctor.configuration import settings_check
from chatterd.doctor.files import disk_check, media_check
from chatterd.doctor.nginx import (
    DEFAULT_FILES,
    certificate_files,
    nginx_check,
    read_configuration,
)
from chatterd.doctor.postgresql import (
    connections_check,
    database_check,
    durability_check,
    privileges_check,
)
from chatterd.doctor.running import processes_here, server_check
from chatterd.doctor.schema import schema_check
from chatterd.doctor.way import Way
from chatterd.embedded_home import EmbeddedPostgresError

T = TypeVar("T")
_Check: TypeAlias = Callable[[], Awaitable[list[Finding]]]

logger = logging.getLogger(__name__)

# What may keep a check from its answer; what else does is a fault of the check's.
_EXPECTED: Final = (
    OSError,
    UnicodeDecodeError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    SchemaError,
    StatementError,
)


# Others make no sense where these have found a fault.
_NEEDED: Final = {"database", "schema"}


class Wishes(NamedTuple):
    """What is looked at, and for how long.

    nginx, certificate: files to look at in place of those that are found.
    url: the server's address, a URL or unix:PATH.
    processes: how many share the database; None: those of this machine.
    reads_all_media: whether every file is read, without a time limit.
    timeout_seconds: how long a check may take.
    """

    nginx: Path | None = None
    certificate: Path | None = None
    url: str | None = None
    processes: int | None = None
    reads_all_media: bool = False
    timeout_seconds: float = 10.0


async def examine(
    way: Way | EmbeddedPostgresError, data: Path | None, wishes: Wishes
) -> AsyncIterator[tuple[str, Finding | None]]:
    """Yield what each check has found, with the check's name, one after the other.

    None for a check that needs another, which has failed. `way` leads to the database, or says why
    there is none; `data` is the database's folder if that is ours.
    """
    # What they log is about requests.
    logging.getLogger(database.__name__).setLevel(logging.CRITICAL)
    failed: set[str] = set()
    for name, needs, check in _checks(way, data, wishes):
        if failed & needs:
            yield name, None
            continue
        is_endless = name == "media" and wishes.reads_all_media
        try:
            async with asyncio.timeout(None if is_endless else wishes.timeout_seconds):
                findings = await check()
        except Exception as error:  # noqa: BLE001 - what a check stumbles over is what is wrong
            findings = [_not_checked(name, error, wishes)]
            failed.add(name)
        if name in _NEEDED and any(finding.level == "fault" for finding in findings):
            failed.add(name)
        for finding in findings:
            yield name, finding


def _not_checked(name: str, error: Exception, wishes: Wishes) -> Finding:
    if isinstance(error, TimeoutError):
        return warning(
            f"not checked: it took longer than {wishes.timeout_seconds:g} s.",
            "Give it more time:",
            "chatterd doctor --timeout 60",
        )
    if not isinstance(error, _EXPECTED):
        logger.error("The check %s has failed", name, exc_info=error)
    words = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        words = f"{error.filename}: {error.strerror}"
    return warning(
        f"not checked: {words}.",
        "Mend that, and what other checks have found; then look again.",
    )


def _checks(
    way: Way | EmbeddedPostgresError, data: Path | None, wishes: Wishes
) -> Iterator[tuple[str, set[str], _Check]]:
    """Yield each check with its name and the names of those that it needs."""
    yield "settings", set(), _in_thread(settings_check)
    yield "server", set(), partial(server_check, wishes.url)
    if isinstance(way, EmbeddedPostgresError):
        yield "database", set(), partial(_no_database, way)
    else:
        yield "database", set(), partial(database_check, way)
        for name, check in _DATABASE_CHECKS.items():
            yield name, {"database"}, partial(check, way)
        processes = partial(connections_check, way, wishes.processes or processes_here())
        yield "connections", {"database"}, processes
    yield "disk", set(), _in_thread(partial(disk_check, data))
    if isinstance(way, Way):
        # On a disk that does not answer, it could not be ended.
        media = partial(media_check, way.url, is_whole=wishes.reads_all_media)
        yield "media", {"database", "schema", "disk"}, media
    yield "nginx", set(), _in_thread(partial(_nginx, wishes.nginx))
    yield "certificate", set(), _in_thread(partial(_certificate, wishes))


_DATABASE_CHECKS: Final[Mapping[str, Callable[[Way], Awaitable[list[Finding]]]]] = {
    "privileges": privileges_check,
    "schema": schema_check,
    "durability": durability_check,
    "locks": locks_check,
    "tables": tables_check,
    "lag": lag_check,
    "clock": clock_check,
}


async def _no_database(error: EmbeddedPostgresError) -> list[Finding]:
    found, _, mend = str(error).rpartition(": ")
    return [fault(f"{found[:1].upper()}{found[1:]}.", f"{mend[:1].upper()}{mend[1:]}.")]


def _nginx(given: Path | None) -> list[Finding]:
    path = given or _found()
    if path is None:
        return [ok("none found in /etc/nginx; --nginx FILE names one")]
    return nginx_check(path, read_configuration(path))


def _certificate(wishes: Wishes) -> list[Finding]:
    files = None
    if (path := wishes.nginx or _found()) is not None:
        files = certificate_files(read_configuration(path))
    if wishes.certificate is not None and (
        files is None or files.certificate != wishes.certificate
    ):
        files = CertificateFiles(wishes.certificate)
    return certificate_check(files)


def _found() -> Path | None:
    return next((path for path in DEFAULT_FILES if path.exists()), None)


def _in_thread(work: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    """Return what does `work` in a thread, which nobody waits for when the deadline has passed.

    asyncio's own threads would keep the program from ending, should a disk not answer.
    """

    async def run() -> T:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: Exception | None) -> None:
            if not done.cancelled():
                done.set_exception(error) if error else done.set_result(cast("T", result))

        def target() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as caught:  # noqa: BLE001 - raised where it is waited for
                error = caught
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(finish, result, error)

        threading.Thread(target=target, daemon=True).start()
        return await done

    return run
