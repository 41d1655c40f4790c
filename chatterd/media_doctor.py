"""What is in the media folder, counted by state, and what is missing there."""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from anyio import to_thread

from chatterd.database import Database
from chatterd.media_folder import (
    OWN,
    PAGE,
    TEMPORARY,
    Entries,
    Tally,
    find_named,
    next_page,
    walk,
    without_file,
)
from chatterd.models import media_named, media_size, named_media_after

_KEYS_LISTED: Final = 100


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


async def doctor(database: Database, root: Path) -> Report:
    """Look at every file under `root`, reading those whose name is their digest.

    Raises `DatabaseUnavailable`, and `OSError` when a folder cannot be read.
    """
    report = Report()
    linked: set[tuple[int, int]] = set()
    with closing(walk(root)) as entries:
        while page := await next_page(entries):
            named = await find_named(database, [path for path, _ in page])
            corrupt = await to_thread.run_sync(_corrupt, root, page)
            for path, status in page:
                size = status.st_size
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    size = 0 if identity in linked else size
                    linked.add(identity)
                if stat.S_ISDIR(status.st_mode):
                    report.folders.add(size)
                elif path.startswith(TEMPORARY):
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


async def sample(database: Database, root: Path, most_bytes: int) -> Report:
    """Look at some of the files that chatts name, and read them up to `most_bytes` in all.

    Their keys are digests: what comes behind any point among them is as good as chosen by lot.
    Raises as `doctor` does.
    """
    report = Report()
    keys: list[str] = []
    for after in (secrets.token_hex(8), ""):
        if len(keys) < PAGE:
            async with database.transaction() as session:
                keys += await session.scalars(named_media_after(PAGE), {"after": after})
    keys = list(dict.fromkeys(keys))[:PAGE]
    missing = await to_thread.run_sync(without_file, root, keys)
    if missing:
        await _count_missing(database, root, report, missing)
    here = await to_thread.run_sync(_entries, root, set(keys) - set(missing), most_bytes)
    corrupt = await to_thread.run_sync(_corrupt, root, here)
    for path, status in here:
        (report.corrupt if path in corrupt else report.referenced).add(status.st_size)
    _list(report.corrupt_keys, corrupt)
    return report


def _entries(root: Path, keys: Iterable[str], most_bytes: int) -> Entries:
    """Return the files of `keys`, of which one alone may have more than `most_bytes`."""
    entries: list[tuple[str, os.stat_result]] = []
    for key in keys:
        with suppress(FileNotFoundError):
            status = (root / key).lstat()
            if entries and status.st_size > most_bytes:
                break
            most_bytes -= status.st_size
            entries.append((key, status))
    return entries


async def _find_missing(database: Database, root: Path, report: Report) -> None:
    after = ""
    while True:
        async with database.transaction() as session:
            page = named_media_after(PAGE)
            keys = list(await session.scalars(page, {"after": after}))
        missing = await to_thread.run_sync(without_file, root, keys)
        if missing:
            await _count_missing(database, root, report, missing)
        if len(keys) < PAGE:
            return
        after = keys[-1]


async def _count_missing(database: Database, root: Path, report: Report, keys: list[str]) -> None:
    # Asked once more: a chatt may have gone meanwhile, a file may just have been put back.
    async with database.transaction() as session:
        keys = list(await session.scalars(media_named(), {"keys": keys}))
    missing = await to_thread.run_sync(without_file, root, keys)
    async with database.transaction() as session:
        size = await session.scalar(media_size(), {"keys": missing})
    report.missing.count += len(missing)
    report.missing.bytes += size or 0
    _list(report.missing_keys, missing)


def _list(listed: list[str], keys: Iterable[str]) -> None:
    listed.extend(islice(keys, _KEYS_LISTED - len(listed)))


def _corrupt(root: Path, page: Entries) -> list[str]:
    """Return the files of `page` that are not what their names say."""
    return [
        path
        for path, status in page
        if stat.S_ISREG(status.st_mode)
        and (own := OWN.fullmatch(path))
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
