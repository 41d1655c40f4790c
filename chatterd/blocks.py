"""The feed as bytes: rows that have been serialised once, kept in blocks.

A block never changes; a changed feed has other blocks. So an answer that is being sent needs no
copy and no lock, and what was made of a block, such as its compressed form, is made once.
"""

import asyncio
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Final, NamedTuple
from urllib.parse import quote

import msgspec
from anyio import to_thread

BLOCK_SIZE: Final = 1024 * 1024
"""Bytes of rows after which a block is full. An answer costs the server one write for each."""

# A row ends in its id and time, whose texts always have the same length:
# ..., "7401355b-fc63-458a-bddc-f90d2da400d3","2026-11-21T00:05:56.407672Z"]
_TIME: Final = slice(-29, -2)
_ID: Final = slice(-68, -32)
_ROW_OVERHEAD: Final = 8
_ADDRESSES: Final = 2
_JOINED_SIZE: Final = 4 * 1024 * 1024
# Pages differ by their limit and by the host that a request names, and strangers choose both: small
# pages are kept, and few of them.
_PAGES_MAX: Final = 16
_PAGE_MAX_SIZE: Final = 128 * 1024

# Bytes that are compressed together: a new row costs the compression of no more.
_GZIP_CHUNK: Final = 128 * 1024
_GZIP_HEAD: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # RFC 1952 §2.3


class Row(NamedTuple):
    """A stored chatt as text, the way the feed shows it; `image` and `video` are media keys."""

    name: str
    message: str
    id: str
    time: str
    image: str | None
    video: str | None


class Media(NamedTuple):
    """The media keys of a row that has any."""

    image: str | None
    video: str | None


Encoded = tuple[bytes, Media | None]
"""A row of four as JSON, and its media keys."""


def encode(row: Row) -> Encoded:
    """Return the row of `getchatts`: name, message, id, time."""
    media = None if row.image is None and row.video is None else Media(row.image, row.video)
    return msgspec.json.encode(row[:4]), media


def with_media(row: bytes, media: Media | None, media_url: str | None) -> bytes:
    """Return the row of four, or of `getimages`: six, with addresses under `media_url`."""
    if media_url is None:
        return row
    if media is None:
        return row[:-1] + b",null,null]"
    urls = (key and media_url + quote(key) for key in media)
    return row[:-1] + b"," + b",".join(map(msgspec.json.encode, urls)) + b"]"


def _without_media(rows: bytes) -> bytes:
    """Return rows of four, a comma before each, as rows of six without addresses."""
    # Within a JSON string a quotation mark has a backslash before it: this is between two rows.
    return rows and rows.replace(b'Z"],["', b'Z",null,null],["')[:-1] + b",null,null]"


class Block:
    """Consecutive rows, at least one, ordered by (time, seq)."""

    __slots__ = ("_ends", "_gzipped", "_media", "data", "first_time", "last_time", "made", "size")

    def __init__(self, data: bytes, ends: "array[int]", media: Mapping[int, Media]) -> None:
        self.data = data
        """The rows of four. With a comma before each, they are the same wherever they stand."""
        self._ends = ends
        self._media = media
        self.first_time = self.row(0)[_TIME]
        self.last_time = self.row(len(ends) - 1)[_TIME]
        self._gzipped: dict[str | None, list[bytes]] = {}
        self.size = len(data) + _ROW_OVERHEAD * len(ends)
        """Bytes of memory that its rows take, about."""
        self.made = 0
        """Bytes of memory that what was made of them takes."""

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> bytes:
        """Return one row of four."""
        return self.data[self._start(index) + 1 : self._ends[index]]

    def id(self, index: int) -> str:
        """Return a row's id."""
        return self.row(index)[_ID].decode()

    def image_row(self, index: int, media_url: str | None) -> bytes:
        """Return a row as `with_media` does."""
        return with_media(self.row(index), self._media.get(index), media_url)

    def rows(self) -> list[Encoded]:
        """Return all rows."""
        return [(self.row(index), self._media.get(index)) for index in range(len(self))]

    def spliced(self, start: int, stop: int, rows: Sequence[Encoded]) -> "Block":
        """Return a block with `rows` in place of those from `start` to `stop`.

        What was compressed of the rows before those is not compressed again.
        """
        here, there = self._start(start), self._start(stop)
        data, ends, media = _packed(rows)
        data = b"".join((self.data[:here], data, self.data[there:]))
        longer, more = len(data) - len(self.data), len(rows) - (stop - start)
        moved = (end + longer for end in self._ends[stop:])
        block = Block(
            data,
            self._ends[:start] + array("I", [here + end for end in ends]) + array("I", moved),
            {index: self._media[index] for index in self._media if index < start}
            | {start + index: media[index] for index in media}
            | {index + more: self._media[index] for index in self._media if index >= stop},
        )
        # Addresses only lengthen rows: what ends before `here` without them does so with them.
        untouched = max(here - 1, 0) // _GZIP_CHUNK
        for media_url, pieces in tuple(self._gzipped.items()):  # a thread may be adding one
            block._keep_gzipped(media_url, pieces[:untouched])
        return block

    def _start(self, index: int) -> int:
        return self._ends[index - 1] if index else 0

    def part(self, media_url: str | None) -> bytes:
        """Return all rows, a comma before each: of four, or of six where `media_url` is given."""
        if media_url is None:
            return self.data
        parts = []
        start = 0
        for index in self._media:
            parts.append(_without_media(self.data[start : self._start(index)]))
            parts.append(b"," + self.image_row(index, media_url))
            start = self._ends[index]
        parts.append(_without_media(self.data[start:]))
        return b"".join(parts)

    def gzipped(self, part: bytes, media_url: str | None) -> list[bytes]:
        """Return `part`, which is the one for `media_url`, compressed without its first comma.

        What it returns stands within a deflate stream.
        """
        pieces = self._gzipped.get(media_url, [])
        begun = 1 + len(pieces) * _GZIP_CHUNK
        if begun < len(part):
            starts = range(begun, len(part), _GZIP_CHUNK)
            pieces = pieces + [_deflate(part[start : start + _GZIP_CHUNK]) for start in starts]
            if media_url not in self._gzipped and len(self._gzipped) > _ADDRESSES:
                self.forget_made()
            self._keep_gzipped(media_url, pieces)
        return pieces

    def _keep_gzipped(self, media_url: str | None, pieces: list[bytes]) -> None:
        self._gzipped[media_url] = pieces
        self.made = sum(sum(map(len, kept)) for kept in self._gzipped.values())

    def forget_made(self) -> None:
        """Forget what was made of the rows; it is made again when asked for."""
        self._gzipped = {}
        self.made = 0

    def find(self, row_id: bytes, time: bytes) -> int | None:
        """Return the index of the row with this id, which has this time."""
        index = self.after(time) - 1
        while index >= 0 and (row := self.row(index))[_TIME] == time:
            if row[_ID] == row_id:
                return index
            index -= 1
        return None

    def after(self, time: bytes) -> int:
        """Return the index behind the last row that is not later than `time`."""
        return bisect_right(range(len(self)), time, key=lambda index: self.row(index)[_TIME])


def blocks_of(rows: Sequence[Encoded]) -> Iterator[Block]:
    """Pack rows into full blocks, and a last one that may not be full."""
    begin = size = 0
    for index, (row, _) in enumerate(rows):
        size += 1 + len(row)
        if size >= BLOCK_SIZE or index == len(rows) - 1:
            yield Block(*_packed(rows[begin : index + 1]))
            begin, size = index + 1, 0


def _packed(rows: Sequence[Encoded]) -> tuple[bytes, "array[int]", dict[int, Media]]:
    """Return the rows with a comma before each, where each ends, and which have media."""
    data = b"".join(b"," + row for row, _ in rows)
    ends = array("I", accumulate(1 + len(row) for row, _ in rows))
    return data, ends, {index: media for index, (_, media) in enumerate(rows) if media is not None}


def _joined(parts: list[bytes]) -> list[bytes]:
    """Return one part in place of several, unless that would take much memory.

    Each part costs the server a write.
    """
    return [b"".join(parts)] if sum(map(len, parts)) <= _JOINED_SIZE else parts


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    # A full flush ends on a whole byte and forgets what came before (zlib manual, deflate).
    return compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)


class Page(NamedTuple):
    """Some consecutive rows as a JSON array, and the ids of the first and the last, if any."""

    first: str | None
    last: str | None
    body: bytes


def page_of(rows: Sequence[tuple[str, bytes]]) -> Page:
    """Return the page of rows that come with their ids, oldest first."""
    first, last = (rows[0][0], rows[-1][0]) if rows else (None, None)
    return Page(first, last, b"[" + b",".join(row for _, row in rows) + b"]")


class Snapshot:
    """The feed, or its newest part, at one moment.

    version: another one means another content; the same one the same, in every process.
    older_than: the rows before this time are not here but in the database; None if all are here.
    size: bytes that the rows take.
    """

    def __init__(self, version: str, blocks: Sequence[Block], older_than: bytes | None) -> None:
        self.version = version
        self.blocks = tuple(blocks)
        self.older_than = older_than
        self.size = sum(block.size for block in blocks)
        self._whole: dict[tuple[str | None, bool], list[bytes]] = {}
        self._compressing = asyncio.Lock()
        self._pages: dict[tuple[int, str | None], Page] = {}

    def whole(self, media_url: str | None) -> list[bytes]:
        """Return the JSON array of rows of four, or of six where `media_url` is given."""
        parts = self._whole.get((media_url, False))
        if parts is None:
            parts = [b"[]"]
            if self.blocks:
                parts = [block.part(media_url) for block in self.blocks]
                parts[0] = b"[" + parts[0][1:]
                parts[-1] += b"]"
            parts = _joined(parts)
            self._keep((media_url, False), parts)
        return parts

    async def gzipped_whole(self, media_url: str | None) -> list[bytes]:
        """Return `whole` as a gzip stream (RFC 1952)."""
        key = (media_url, True)
        if key not in self._whole:
            # One does it, and those who came meanwhile find it.
            async with self._compressing:
                if key not in self._whole:
                    self._keep(key, await to_thread.run_sync(self._gzip, media_url))
        return self._whole[key]

    def _gzip(self, media_url: str | None) -> list[bytes]:
        pieces = [_GZIP_HEAD]
        checksum = length = 0
        for block in self.blocks:
            pieces.append(_GZIP_COMMA if length else _GZIP_OPEN)
            checksum = zlib.crc32(b"," if length else b"[", checksum)
            part = block.part(media_url)
            pieces += block.gzipped(part, media_url)
            checksum = zlib.crc32(memoryview(part)[1:], checksum)
            length += len(part)
        end = b"]" if self.blocks else b"[]"
        pieces.append(_last_deflate_block(end))
        checksum = zlib.crc32(end, checksum)
        pieces.append(struct.pack("<II", checksum, (length + len(end)) & 0xFFFFFFFF))
        return _joined(pieces)

    def _keep(self, key: tuple[str | None, bool], parts: list[bytes]) -> None:
        if len(self._whole) > 2 * _ADDRESSES:
            self._whole.clear()
        self._whole[key] = parts

    def newest(self, limit: int, media_url: str | None) -> Page | None:
        """Return the last `limit` rows as one page; None where not all of them are here."""
        key = (limit, media_url)
        if (page := self._pages.get(key)) is None:
            found = list(islice(self._backward(media_url), limit))[::-1]
            if len(found) < limit and self.older_than is not None:
                return None
            page = page_of(found)
            if len(self._pages) >= _PAGES_MAX:
                self._pages.clear()
            if len(page.body) <= _PAGE_MAX_SIZE:
                self._pages[key] = page
        return page

    def _backward(self, media_url: str | None) -> Iterator[tuple[str, bytes]]:
        for block in reversed(self.blocks):
            for index in range(len(block) - 1, -1, -1):
                yield block.id(index), block.image_row(index, media_url)


def _last_deflate_block(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


_GZIP_OPEN: Final = _deflate(b"[")
_GZIP_COMMA: Final = _deflate(b",")
