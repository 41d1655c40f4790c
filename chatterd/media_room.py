"""How much more may be written into the media folder."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from chatterd.errors import Problem

# Other processes write there, too; and what was taken may have been removed since.
_COUNT_SECONDS: Final = 10.0
_RECOUNT_SECONDS: Final = 1.0


class Room:
    """The folder `root`, which may hold `total_size` bytes and must leave `free_floor` of its disk.

    Its methods may be called in any thread.
    """

    def __init__(self, root: Path, total_size: int | None, free_floor: int) -> None:
        self._root = root
        self._total_size = total_size
        self._free_floor = free_floor
        self._lock = threading.Lock()
        self._used = 0
        self._being_written = 0
        self._counted_at = float("-inf")

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Take room for `count` bytes, which are written while the context lasts.

        Raises `Problem` 507 when there is not so much.
        """
        self.require_free(count)
        if self._total_size is None:
            yield
            return
        with self._lock:
            self._require_total(count, self._total_size)
            self._used += count
            self._being_written += count
        try:
            yield
        finally:
            with self._lock:
                self._being_written -= count

    def require_free(self, count: int) -> None:
        """Raise `Problem` 507 unless the disk has room for `count` bytes that do not stay."""
        disk = os.statvfs(self._root)
        if disk.f_bavail * disk.f_frsize - count < self._free_floor:
            raise Problem(
                "storage-full",
                f"The server's disk has no room: {self._free_floor} bytes of it are to stay free.",
            )

    def _require_total(self, count: int, total_size: int) -> None:
        age = time.monotonic() - self._counted_at
        if age > _COUNT_SECONDS or (self._used + count > total_size and age > _RECOUNT_SECONDS):
            # Some of what is being written is counted twice, none is left out.
            self._used = bytes_in(self._root) + self._being_written
            self._counted_at = time.monotonic()
        if self._used + count > total_size:
            raise Problem(
                "storage-full",
                f"All pictures and videos together may have {total_size} bytes, and that is used.",
            )


def bytes_in(folder: Path) -> int:
    """Return how many bytes the files in `folder`, and below it, have together."""
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    size += bytes_in(Path(entry.path))
                else:
                    size += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # moved or removed meanwhile
                continue
    return size
