"""Removing what no chatt names any more, and what uploads that were cut off have left.

docs/media.md says why that is safe beside uploads, on any node that shares the folder.
"""

import asyncio
import logging
import os
import random
import re
import stat
import time
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import anyio
from anyio import to_thread
from sqlalchemy.ext.asyncio import AsyncSession

from chatterd import metrics, settings
from chatterd.database import Database
from chatterd.errors import DatabaseUnavailable
from chatterd.media import INCOMING, THUMBNAIL_SUFFIX, sync_folder
from chatterd.media_folder import (
    OWN,
    PAGE,
    SWEPT,
    TEMPORARY,
    Entries,
    Tally,
    files_in,
    find_named,
    find_named_in,
    next_page,
    walk,
    without_file,
)
from chatterd.models import delete_stale_media, hold_media, stale_media_after

logger = logging.getLogger(__name__)

# No upload takes as long: what is older and not named by then will not be.
_OLDER_THAN_SECONDS: Final = 3600
_INTERVAL_SECONDS: Final = 3600.0
# After the rush of a start; at random, so that the processes of a server take turns.
_FIRST_SECONDS: Final = (60.0, 300.0)

# From being in place to being named by a chatt, a file takes no longer.
_SETTLED_SECONDS: Final = 60.0
_REMOVALS_MAX: Final = 1_000

# Each sweep moves a file to a name of its own: what one has moved, no other overwrites.
_MOVED: Final = re.compile(rf"(?P<name>{OWN.pattern})(\.[0-9a-f]{{32}})?")


@dataclass
class Swept:
    """What a sweep has removed, or would remove.

    restored: files that an interrupted sweep had moved away and a chatt names.
    unknown: files that are not ours to remove.
    records: rows of the table media.
    """

    orphaned: Tally = field(default_factory=Tally)
    temporary: Tally = field(default_factory=Tally)
    restored: Tally = field(default_factory=Tally)
    unknown: Tally = field(default_factory=Tally)
    records: int = 0


class Moved(NamedTuple):
    """A file that a sweep has moved away: what it was called, and where it lies."""

    name: str
    place: Path


class Sweep:
    """One sweep of the media folder for what has been there for `older_than` seconds, unnamed.

    Without `delete` it only counts.
    """

    def __init__(
        self, database: Database, root: Path, older_than: float, *, delete: bool = False
    ) -> None:
        self.result = Swept()
        self._database = database
        self._root = root
        self._older_than = older_than
        self._before = time.time() - older_than
        self._delete = delete

    async def run(self) -> Swept:
        """Sweep; return what was removed.

        Raises `DatabaseUnavailable`, before anything is removed if the database is away at the
        start; `OSError` when the folder cannot be read or written.
        """
        await find_named(self._database, [])
        await self._sweep_moved()
        await to_thread.run_sync(self._sweep_incoming)
        with closing(walk(self._root)) as entries:
            while page := await next_page(entries):
                await self.sweep_page(page)
        await self._sweep_records()
        return self.result

    async def sweep_page(self, page: Entries) -> None:
        """Remove of `page` what is to go, pictures with their thumbnails."""
        gone = await self._remove(await self.candidates(page))
        await self._remove([f"{name}{THUMBNAIL_SUFFIX}" for name in gone])

    async def candidates(self, page: Entries) -> list[str]:
        """Return which files of `page` are old enough, unnamed, and ours to remove.

        A thumbnail whose picture is there is none: it goes after its picture.
        """
        files = {
            path: status
            for path, status in page
            if not stat.S_ISDIR(status.st_mode) and not path.startswith(TEMPORARY)
        }
        named = await find_named(self._database, files)
        unnamed = {path: status for path, status in files.items() if path not in named}
        return await to_thread.run_sync(self._own_and_old, unnamed)

    def _own_and_old(self, files: Mapping[str, os.stat_result]) -> list[str]:
        found = []
        for path, status in files.items():
            if not OWN.fullmatch(path) or not stat.S_ISREG(status.st_mode):
                self.result.unknown.add(status.st_size)
            elif status.st_mtime < self._before and not self._has_picture(path):
                found.append(path)
        return found

    async def _remove(self, names: Sequence[str]) -> list[str]:
        """Remove files unless somebody needs them by now; return the names of those removed."""
        if not names:
            return []
        if not self._delete:
            return await to_thread.run_sync(self._count, names)
        gone: list[str] = []
        async with self._database.transaction() as session:
            # A backup may have to read them yet: a chatt that has gone since named them.
            if await session.scalar(hold_media()):
                # Whoever ends the sweep waits until what has been moved is settled.
                with anyio.CancelScope(shield=True):
                    gone = await self.settle(await to_thread.run_sync(self.move, names), session)
        return gone

    def _count(self, names: Sequence[str]) -> list[str]:
        counted = []
        for name in names:
            if (status := self._old(self._root / name)) is not None:
                self.result.orphaned.add(status.st_size)
                counted.append(name)
        return counted

    def move(self, names: Sequence[str]) -> list[Moved]:
        """Move files, as far as they are old, to where no upload replaces them."""
        (self._root / SWEPT).mkdir(exist_ok=True)
        moved = []
        for name in names:
            place = self._root / SWEPT / f"{name}.{uuid.uuid4().hex}"
            if self._old(self._root / name) is not None:
                with suppress(FileNotFoundError):
                    (self._root / name).rename(place)
                    moved.append(Moved(name, place))
        return moved

    async def settle(
        self, moved: Sequence[Moved], session: AsyncSession | None = None
    ) -> list[str]:
        """Remove what has been moved, or put it back; return the names of what was removed.

        It is put back when a chatt names it by now, and when it is not the file that was looked
        at: an upload has replaced that one, and its chatt may be about to come. The database is
        asked by `session`, if there is one.
        """
        names = [name for name, _ in moved]
        try:
            if session is None:
                named = await find_named(self._database, names)
            else:
                named = await find_named_in(session, names)
        except BaseException:
            # Must finish although the sweep may be being cancelled.
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self._settle, moved, names)
            raise
        return await to_thread.run_sync(self._settle, moved, named)

    def _settle(self, moved: Sequence[Moved], named: Collection[str]) -> list[str]:
        gone, kept = [], []
        for name, place in moved:
            old = self._old(place)
            if old is None or name in named or self._has_picture(name):
                kept.append(Moved(name, place))
            else:
                place.unlink(missing_ok=True)
                self.result.orphaned.add(old.st_size)
                gone.append(name)
        self._put_back(kept)
        return gone

    def _has_picture(self, name: str) -> bool:
        return name.endswith(THUMBNAIL_SUFFIX) and os.path.lexists(
            self._root / name.removesuffix(THUMBNAIL_SUFFIX)
        )

    def _put_back(self, moved: Sequence[Moved]) -> None:
        """Put files back where they were; what has come there meanwhile has the same content."""
        if not moved:
            return
        for name, place in moved:
            # Gone: another sweep has put it back.
            with suppress(FileExistsError, FileNotFoundError):
                (self._root / name).hardlink_to(place)
        sync_folder(self._root)
        for _, place in moved:
            place.unlink(missing_ok=True)

    async def _sweep_moved(self) -> None:
        """Finish what a sweep has left that was killed, or is under way."""
        with closing(files_in(self._root / SWEPT)) as files:
            while page := await next_page(files):
                own = {path: _MOVED.fullmatch(path.name) for path, _ in page}
                names = {path: match["name"] for path, match in own.items() if match}
                named = await find_named(self._database, names.values())
                back = {path: name for path, name in names.items() if name in named}
                await to_thread.run_sync(self._finish, page, back)

    def _finish(
        self, page: Sequence[tuple[Path, os.stat_result]], named: Mapping[Path, str]
    ) -> None:
        back = []
        for path, status in page:
            if path in named and not os.path.lexists(self._root / named[path]):
                self.result.restored.add(status.st_size)
                back.append(Moved(named[path], path))
            else:
                self._remove_temporary(path, status)
        if self._delete:
            self._put_back(back)

    def _sweep_incoming(self) -> None:
        with closing(files_in(self._root / INCOMING)) as files:
            for path, status in files:
                self._remove_temporary(path, status)

    def _remove_temporary(self, path: Path, status: os.stat_result) -> None:
        if status.st_mtime < self._before:
            if self._delete:
                path.unlink(missing_ok=True)
            self.result.temporary.add(status.st_size)

    async def _sweep_records(self) -> None:
        """Remove what the table media knows of files that are neither there nor named."""
        after = ""
        while True:
            async with self._database.transaction() as session:
                values = {"after": after, "older_than": self._older_than}
                keys = list(await session.scalars(stale_media_after(PAGE), values))
            named = await find_named(self._database, keys)
            unnamed = [key for key in keys if key not in named]
            stale = await to_thread.run_sync(without_file, self._root, unnamed)
            if self._delete and stale:
                async with self._database.transaction() as session:
                    deletion = {"keys": stale, "older_than": self._older_than}
                    await session.execute(delete_stale_media(), deletion)
            self.result.records += len(stale)
            if len(keys) < PAGE:
                return
            after = keys[-1]

    def _old(self, path: Path) -> os.stat_result | None:
        """Return what a file is, if it is there, a file, and old."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        is_old = stat.S_ISREG(status.st_mode) and status.st_mtime < self._before
        return status if is_old else None


class Leavings:
    """The files of chatts that have just been deleted; those that nobody else names go.

    A file that was uploaded a moment ago may be about to be named by another chatt: it goes when
    it is `settled_seconds` old. What is not gone at the end is the sweep's.
    """

    def __init__(
        self, database: Database, root: Path, settled_seconds: float = _SETTLED_SECONDS
    ) -> None:
        self._database = database
        self._root = root
        self._settled_seconds = settled_seconds
        self._removals: dict[asyncio.Task[None], anyio.CancelScope] = {}

    def remove_soon(self, keys: Sequence[str]) -> None:
        """Remove the files of `keys` in the background."""
        for key in keys:
            if len(self._removals) < _REMOVALS_MAX:
                scope = anyio.CancelScope()
                task = asyncio.create_task(self._remove(key, scope))
                self._removals[task] = scope
                task.add_done_callback(self._removals.pop)

    async def _remove(self, key: str, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                changed = await to_thread.run_sync(self._changed, key)
                await asyncio.sleep(max(0.0, changed + self._settled_seconds - time.time()))
                sweep = Sweep(self._database, self._root, self._settled_seconds, delete=True)
                await sweep.sweep_page([(key, await to_thread.run_sync((self._root / key).lstat))])
                _count(sweep.result)
            except (FileNotFoundError, DatabaseUnavailable):
                pass  # somebody else has removed it, or the sweep will
            except Exception:
                logger.exception("The file of a deleted chatt cannot be removed")

    def _changed(self, key: str) -> float:
        """Return when a file, or the thumbnail that goes with it, came into the folder."""
        changed = (self._root / key).lstat().st_mtime
        with suppress(FileNotFoundError):
            changed = max(changed, (self._root / f"{key}{THUMBNAIL_SUFFIX}").lstat().st_mtime)
        return changed

    async def aclose(self) -> None:
        """End the removals; none is left half done."""
        removals = list(self._removals)
        for scope in self._removals.values():
            scope.cancel()  # unlike the task's own cancel(), it heeds shields
        await asyncio.gather(*removals)


@asynccontextmanager
async def swept(
    database: Database,
    root: Path,
    *,
    older_than: float | None = None,
    first_seconds: float | None = None,
    interval_seconds: float = _INTERVAL_SECONDS,
) -> AsyncIterator[None]:
    """Sweep in the background while the context lasts: after `first_seconds`, then again and again.

    Left out, `older_than` is longer than any upload takes, and `first_seconds` some minutes.
    """
    if older_than is None:
        older_than = max(_OLDER_THAN_SECONDS, settings.UPLOAD_TIMEOUT + 60)
    if first_seconds is None:
        first_seconds = random.uniform(*_FIRST_SECONDS)  # noqa: S311 - no secret

    scope = anyio.CancelScope()

    async def sweep_again_and_again() -> None:
        with scope:
            await asyncio.sleep(first_seconds)
            while True:
                await _sweep_and_log(Sweep(database, root, older_than, delete=True))
                await asyncio.sleep(interval_seconds)

    task = asyncio.create_task(sweep_again_and_again())
    try:
        yield
    finally:
        scope.cancel()  # unlike the task's own cancel(), it heeds shields
        await task


async def _sweep_and_log(sweep: Sweep) -> None:
    try:
        await sweep.run()
        metrics.LAST_SWEEP.set(time.time())
        metrics.UNKNOWN_FILES.set(sweep.result.unknown.count)
        metrics.UNKNOWN_BYTES.set(sweep.result.unknown.bytes)
    except DatabaseUnavailable:
        pass  # has been logged; what is left will be there next time
    except OSError as error:
        logger.error("The media folder cannot be swept: %s", error.strerror)  # noqa: TRY400 - says all
    except Exception:  # whatever it is, the server goes on
        logger.exception("The media folder cannot be swept")
    result = sweep.result
    _count(result)
    if result.orphaned.count or result.temporary.count or result.restored.count or result.records:
        logger.info(
            "Swept the media folder: removed %d orphaned files of %d bytes, %d temporary of %d"
            " bytes, %d records; put back %d files",
            result.orphaned.count,
            result.orphaned.bytes,
            result.temporary.count,
            result.temporary.bytes,
            result.records,
            result.restored.count,
        )


def _count(result: Swept) -> None:
    for state in metrics.SWEPT_STATES:
        tally: Tally = getattr(result, state)
        metrics.SWEPT_FILES.labels(state).inc(tally.count)
        metrics.SWEPT_BYTES.labels(state).inc(tally.bytes)
    metrics.SWEPT_RECORDS.inc(result.records)
