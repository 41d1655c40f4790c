"""What lies in the media folder, a page at a time, and which of it chatts name."""

import os
import re
import stat
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from anyio import to_thread
from sqlalchemy.ext.asyncio import AsyncSession

from chatterd.database import Database, SchemaError
from chatterd.media import INCOMING, THUMBNAIL_SUFFIX, is_file, is_key
from chatterd.models import media_is_whole, media_named

T = TypeVar("T")
Entries: TypeAlias = Sequence[tuple[str, os.stat_result]]
"""Files and folders, as their paths from the media folder and their lstats."""

SWEPT: Final = ".swept"
"""The folder, below the media folder, of what a sweep has moved away."""
TEMPORARY: Final = (f"{INCOMING}/", f"{SWEPT}/")
"""What the paths of files begin with that are on their way in or out."""
PAGE: Final = 200
"""So many files or keys at a time: in memory, read before Ctrl-C is heard, moved away for some
milliseconds before it is known whether they stay."""
OWN: Final = re.compile(
    rf"(?P<digest>[0-9a-f]{{64}})\.(jpeg|png|gif|webp|heic|heif|mp4|mov|webm)"
    rf"(?P<thumbnail>{re.escape(THUMBNAIL_SUFFIX)})?"
)
"""The names that chatterd gives files: a key, or that of its thumbnail."""


@dataclass
class Tally:
    """How many there are, and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more, of `size` bytes."""
        self.count += 1
        self.bytes += size


async def find_named(database: Database, paths: Collection[str]) -> set[str]:
    """Return which of `paths` a chatt names, and which are thumbnails of what one names.

    Raises `DatabaseUnavailable`.
    """
    async with database.transaction() as session:
        return await find_named_in(session, paths)


async def find_named_in(session: AsyncSession, paths: Collection[str]) -> set[str]:
    """Return what `find_named` does, by a transaction that is under way."""
    pictures = {path: path.removesuffix(THUMBNAIL_SUFFIX) for path in paths}
    keys = list(filter(_can_be_named, {*pictures, *pictures.values()}))
    if not await session.scalar(media_is_whole()):
        raise SchemaError("It is being restored: chatts has no index yet, or feed no row.")
    named = set(await session.scalars(media_named(), {"keys": keys}))
    return {path for path, picture in pictures.items() if path in named or picture in named}


def without_file(root: Path, keys: Sequence[str]) -> list[str]:
    """Return the keys of which no file is there; each is looked at."""
    return [key for key in keys if not (_can_be_named(key) and is_file(root / key))]


def _can_be_named(path: str) -> bool:
    """Tell whether a chatt can name a file of this name, and the file be served."""
    if not is_key(path):
        return False
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, which PostgreSQL does not know
        return False
    return True


async def next_page(items: Iterator[T]) -> list[T]:
    """Take up to `PAGE` of `items` in a thread; none are left when it is empty."""
    return await to_thread.run_sync(list, islice(items, PAGE))


def walk(root: Path) -> Generator[tuple[str, os.stat_result], None, None]:
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


def files_in(folder: Path) -> Generator[tuple[Path, os.stat_result], None, None]:
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
