"""A file that is read at any place with little memory, and the changes that clean it."""

import io
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Final, Literal, NamedTuple

WINDOW: Final = 256 * 1024
"""As many bytes of a file as are in memory at once."""
_FIRST_WINDOW: Final = 4 * 1024
_MATCH_MAX: Final = 20
_ZEROS: Final = memoryview(bytes(WINDOW))


class Uncleanable(Exception):  # noqa: N818 - what it says of the file, as Problem of a request
    """A file that cannot be cleaned with certainty.

    Its message says to the sender what is wrong, as a part of a sentence: "the file ends too
    early".
    """


class Edit(NamedTuple):
    """Bytes `start` to `stop` of a file give way to `replacement`."""

    start: int
    stop: int
    replacement: bytes | memoryview = b""


def zeros(start: int, stop: int) -> Iterator[Edit]:
    """Overwrite bytes `start` to `stop` with zeros, however many they are.

    All edits refer to the same zeros: they take no memory of their own.
    """
    for offset in range(start, stop, WINDOW):
        length = min(WINDOW, stop - offset)
        yield Edit(offset, offset + length, _ZEROS[:length])


class Source:
    """Random access to a file, which nobody changes meanwhile.

    Its size limits how often it is read, and so how long any walk through it takes: a file of a
    million tiny parts is refused.
    """

    def __init__(self, file: BinaryIO | bytes) -> None:
        self._file = io.BytesIO(file) if isinstance(file, bytes) else file
        self.size = self._file.seek(0, os.SEEK_END)
        # The parts of real files are larger than this on average, except in very small ones.
        self._steps_left = 10_000 + self.size // 64

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on, at most `WINDOW`.

        Raises `Uncleanable` when the file ends before, and when it has been read too often.
        """
        data = self.peek(offset, count)
        if len(data) < count:
            raise Uncleanable("the file ends too early")
        return data

    def integer(self, offset: int, count: int, order: Literal["big", "little"] = "big") -> int:
        """Return the unsigned number in `count` bytes at `offset`; raises as `read` does."""
        return int.from_bytes(self.read(offset, count), order)

    def peek(self, offset: int, count: int) -> bytes:
        """Return those of `count` bytes from `offset` on, at most `WINDOW`, that there are.

        Raises `Uncleanable` when the file has been read too often.
        """
        assert count <= WINDOW
        self.spend(1)
        return self._peek(offset, count)

    def spend(self, count: int) -> None:
        """Take `count` steps of the walk without reading. Raises `Uncleanable` as `peek` does."""
        self._steps_left -= count
        if self._steps_left < 0:
            raise Uncleanable("the file has too many parts")

    def find(self, pattern: re.Pattern[bytes], start: int, stop: int | None = None) -> int | None:
        """Return where `pattern`, of at most 20 bytes, first matches from `start` to `stop`.

        Without `stop` the file's end is meant.
        """
        end = self.size if stop is None else stop
        for offset, window in self.windows(start, end, overlap=_MATCH_MAX - 1):
            if match := pattern.search(window):
                return offset + match.start()
        return None

    def windows(self, start: int, stop: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield bytes `start` to `stop` by the piece, each with its offset.

        Each piece but the first begins with the last `overlap` bytes of the one before. The first
        is small: most of what is looked for is near.
        """
        length = _FIRST_WINDOW
        while start < stop and (window := self._peek(start, min(length, stop - start))):
            yield start, window
            if start + len(window) >= stop:
                return
            start += len(window) - overlap
            length = WINDOW

    def has(self, edit: Edit) -> bool:
        """Whether the bytes that `edit` would write are already there."""
        length = edit.stop - edit.start
        return length == len(edit.replacement) and (
            self._peek(edit.start, length) == edit.replacement
        )

    def _peek(self, offset: int, count: int) -> bytes:
        if offset >= self.size:  # also offsets larger than an operating system takes
            return b""
        self._file.seek(offset)
        return self._file.read(count)
