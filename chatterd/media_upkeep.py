"""Looking after the media folder: what is in it, and removing what nobody names any more.

docs/media.md says why removing is safe beside uploads, on any node that shares the folder.
"""

import asyncio
import hashlib
import logging
import os
import random
import re
import stat
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeVar

import anyio
from anyio import to_thread

from chatterd import settings
from chatterd.database import Database, SchemaError
from chatterd.errors import DatabaseUnavailable
from chatterd.media import INCOMING, THUMBNAIL_SUFFIX, is_key, sync_folder
from chatterd.models import (
    delete_stale_media,
    media_is_whole,
    media_named,
    media_size,
    named_media_after,
    stale_media_after,
)

T = TypeVar("T")
_Entries: TypeAlias = Sequence[tuple[str, os.stat_result]]

logger = logging.getLogger(__name__)

OLDER_THAN_SECONDS: Final = 3600
"""No upload takes as long: what is older and not named by then will not be."""

_SWEPT: Final = ".swept"
_TEMPORARY: Final = (f"{INCOMING}/", f"{_SWEPT}/")
# So many at a time: in memory, read before Ctrl-C is heard, moved away for some milliseconds
# before it is known whether they stay.
_PAGE: Final = 200
_KEYS_LISTED: Final = 100

_OWN: Final = re.compile(
    rf"(?P<key>(?P<digest>[0-9a-f]{{64}})\.(jpeg|png|gif|webp|heic|heif|mp4|mov|webm))"
    rf"(?P<thumbnail>{re.escape(THUMBNAIL_SUFFIX)})?"
)
# Each sweep moves a file to a name of its own: what one has moved, no other overwrites.
_MOVED: Final = re.compile(rf"(?P<name>{_OWN.pattern})(\.[0-9a-f]{{32}})?")

_INTERVAL_SECONDS: Final = 3600.0
# After the rush of a start; at random, so that the processes of a server take turns.
_FIRST_SECONDS: Final = (60.0, 300.0)


class MediaError(Exception):
    """The media folder cannot be read or written. The message is for the operator."""


@dataclass
class Tally:
    """How many there are, and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more, of `size` bytes."""
        self.count += 1
        self.bytes += size


@dataclass
class Report:
    """What is in the media folder, each file in one state; and what should be there.

    referenced: named by a chatt, or the thumbnail of what is.
    temporary: on its way in or out.
    orphaned: everything else.
    corrupt: not what its key is the digest of, or not to be read, whoever names it.
    missing: keys that chatts name and that are no file; bytes as far as they are known.
    corrupt_keys, missing_keys: the first of them.
    """

    referenced: Tally = field(default_factory=Tally)
    temporary: Tally = field(default_factory=Tally)
    orphaned: Tally = field(default_factory=Tally)
    corrupt: Tally = field(default_factory=Tally)
    folders: Tally = field(default_factory=Tally)
    missing: Tally = field(default_factory=Tally)
    corrupt_keys: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The bytes of everything in the folder, as `du --apparent-size` counts them."""
        here = (self.referenced, self.temporary, self.orphaned, self.corrupt, self.folders)
        return sum(tally.bytes for tally in here)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is missing or corrupt."""
        return not self.missing.count and not self.corrupt.count


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


async def doctor(database: Database, root: Path) -> Report:
    """Look at every file under `root`, reading those whose name is their digest.

    Raises `DatabaseUnavailable`, and `OSError` when a folder cannot be read.
    """
    report = Report()
    linked: set[tuple[int, int]] = set()
    with closing(_walk(root)) as walk:
        while page := await _page(walk):
            named = await _named(database, [path for path, _ in page])
            corrupt = await to_thread.run_sync(_corrupt, root, page)
            for path, status in page:
                size = status.st_size
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    size = 0 if identity in linked else size
                    linked.add(identity)
                if stat.S_ISDIR(status.st_mode):
                    report.folders.add(size)
                elif path.startswith(_TEMPORARY):
                    report.temporary.add(size)
                elif path in corrupt:
                    report.corrupt.add(size)
                elif path in named and stat.S_ISREG(status.st_mode):
                    report.referenced.add(size)
                else:
                    report.orphaned.add(size)
            _list(report.corrupt_keys, corrupt)
    await _find_missing(database, root, report)
    return report


async def _find_missing(database: Database, root: Path, report: Report) -> None:
    after = ""
    while True:
        async with database.transaction() as session:
            page = named_media_after(_PAGE)
            keys = list(await session.scalars(page, {"after": after}))
        missing = await to_thread.run_sync(_without_file, root, keys)
        if missing:
            await _count_missing(database, root, report, missing)
        if len(keys) < _PAGE:
            return
        after = keys[-1]


async def _count_missing(database: Database, root: Path, report: Report, keys: list[str]) -> None:
    # Asked once more: a chatt may have gone meanwhile, a file may just have been put back.
    async with database.transaction() as session:
        keys = list(await session.scalars(media_named(), {"keys": keys}))
    missing = await to_thread.run_sync(_without_file, root, keys)
    async with database.transaction() as session:
        size = await session.scalar(media_size(), {"keys": missing})
    report.missing.count += len(missing)
    report.missing.bytes += size or 0
    _list(report.missing_keys, missing)


def _list(listed: list[str], keys: Iterable[str]) -> None:
    listed.extend(islice(keys, _KEYS_LISTED - len(listed)))


def _without_file(root: Path, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if not (_can_be_named(key) and _is_file(root / key))]


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # not there, a name too long for the file system
        return False


def _corrupt(root: Path, page: _Entries) -> list[str]:
    """Return the files of `page` that are not what their names say."""
    return [
        path
        for path, status in page
        if stat.S_ISREG(status.st_mode)
        and (own := _OWN.fullmatch(path))
        and not own["thumbnail"]
        and not _is_digest(root / path, own["digest"])
    ]


def _is_digest(path: Path, digest: str) -> bool:
    try:
        # Neither a link nor a pipe is waited for, should one have come into its place.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:  # it has gone meanwhile
        return True
    except OSError:  # a bad disk, or another user's file: nobody is served it
        return False


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
        await _named(self._database, [])
        await self._sweep_moved()
        await to_thread.run_sync(self._sweep_incoming)
        with closing(_walk(self._root)) as walk:
            while page := await _page(walk):
                gone = await self._remove(await self.candidates(page))
                await self._remove([f"{name}{THUMBNAIL_SUFFIX}" for name in gone])
        await self._sweep_records()
        return self.result

    async def candidates(self, page: _Entries) -> list[str]:
        """Return which files of `page` are old enough, unnamed, and ours to remove.

        A thumbnail whose picture is there is none: it goes after its picture.
        """
        files = {
            path: status
            for path, status in page
            if not stat.S_ISDIR(status.st_mode) and not path.startswith(_TEMPORARY)
        }
        named = await _named(self._database, files)
        unnamed = {path: status for path, status in files.items() if path not in named}
        return await to_thread.run_sync(self._own_and_old, unnamed)

    def _own_and_old(self, files: Mapping[str, os.stat_result]) -> list[str]:
        found = []
        for path, status in files.items():
            if not _OWN.fullmatch(path) or not stat.S_ISREG(status.st_mode):
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
        # Whoever ends the sweep waits until what has been moved is settled.
        with anyio.CancelScope(shield=True):
            gone = await self.settle(await to_thread.run_sync(self.move, names))
        return gone  # noqa: RET504 - mypy takes the scope for one that swallows errors

    def _count(self, names: Sequence[str]) -> list[str]:
        counted = []
        for name in names:
            if (status := self._old(self._root / name)) is not None:
                self.result.orphaned.add(status.st_size)
                counted.append(name)
        return counted

    def move(self, names: Sequence[str]) -> list[Moved]:
        """Move files, as far as they are old, to where no upload replaces them."""
        (self._root / _SWEPT).mkdir(exist_ok=True)
        moved = []
        for name in names:
            place = self._root / _SWEPT / f"{name}.{uuid.uuid4().hex}"
            if self._old(self._root / name) is not None:
                with suppress(FileNotFoundError):
                    (self._root / name).rename(place)
                    moved.append(Moved(name, place))
        return moved

    async def settle(self, moved: Sequence[Moved]) -> list[str]:
        """Remove what has been moved, or put it back; return the names of what was removed.

        It is put back when a chatt names it by now, and when it is not the file that was looked
        at: an upload has replaced that one, and its chatt may be about to come.
        """
        names = [name for name, _ in moved]
        try:
            named = await _named(self._database, names)
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
        with closing(_files(self._root / _SWEPT)) as files:
            while page := await _page(files):
                own = {path: _MOVED.fullmatch(path.name) for path, _ in page}
                names = {path: match["name"] for path, match in own.items() if match}
                named = await _named(self._database, names.values())
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
        with closing(_files(self._root / INCOMING)) as files:
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
                keys = list(await session.scalars(stale_media_after(_PAGE), values))
            named = await _named(self._database, keys)
            unnamed = [key for key in keys if key not in named]
            stale = await to_thread.run_sync(_without_file, self._root, unnamed)
            if self._delete and stale:
                async with self._database.transaction() as session:
                    deletion = {"keys": stale, "older_than": self._older_than}
                    await session.execute(delete_stale_media(), deletion)
            self.result.records += len(stale)
            if len(keys) < _PAGE:
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
        older_than = max(OLDER_THAN_SECONDS, settings.UPLOAD_TIMEOUT + 60)
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
    except DatabaseUnavailable:
        pass  # has been logged; what is left will be there next time
    except OSError as error:
        logger.error("The media folder cannot be swept: %s", error.strerror)  # noqa: TRY400 - says all
    except Exception:  # whatever it is, the server goes on
        logger.exception("The media folder cannot be swept")
    result = sweep.result
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


async def _named(database: Database, paths: Collection[str]) -> set[str]:
    """Return which of `paths` a chatt names, and which are thumbnails of what one names.

    Raises `DatabaseUnavailable`.
    """
    pictures = {path: path.removesuffix(THUMBNAIL_SUFFIX) for path in paths}
    keys = list(filter(_can_be_named, {*pictures, *pictures.values()}))
    async with database.transaction() as session:
        if not await session.scalar(media_is_whole()):
            raise SchemaError("It is being restored: chatts has no index yet, or feed no row.")
        named = set(await session.scalars(media_named(), {"keys": keys}))
    return {path for path, picture in pictures.items() if path in named or picture in named}


def _can_be_named(path: str) -> bool:
    """Tell whether a chatt can name a file of this name, and the file be served."""
    if not is_key(path):
        return False
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, which PostgreSQL does not know
        return False
    return True


async def _page(items: Iterator[T]) -> list[T]:
    return await to_thread.run_sync(list, islice(items, _PAGE))


def _walk(root: Path) -> Generator[tuple[str, os.stat_result], None, None]:
    """Yield every file and folder from `root` down, as its path from there and its lstat."""
    yield "", root.stat()
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, status in _entries(root / folder):
            path = f"{folder}/{name}" if folder else name
            if stat.S_ISDIR(status.st_mode):
                folders.append(path)
            yield path, status


def _files(folder: Path) -> Generator[tuple[Path, os.stat_result], None, None]:
    """Yield what lies in `folder` and is no folder; nothing where that is a link elsewhere."""
    if not folder.is_symlink():
        for name, status in _entries(folder):
            if not stat.S_ISDIR(status.st_mode):
                yield folder / name, status


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    # What vanishes meanwhile is no error.
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat(follow_symlinks=False)
