"""The feed as bytes: rows that have been serialised once, kept in blocks.

A block never changes; a changed feed has other blocks. So an answer that is being sent needs no
copy and no lock, and what was made of a block, such as its compressed form, is made once.
"""

import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import quote

import msgspec

BLOCK_SIZE: Final = 128 * 1024
"""Bytes of rows after which a block is full."""

# A row ends in its id and time, whose texts always have the same length:
# ..., "7401355b-fc63-458a-bddc-f90d2da400d3","2026-11-21T00:05:56.407672Z"]
_TIME: Final = slice(-29, -2)
_ID: Final = slice(-68, -32)
_ROW_OVERHEAD: Final = 8
_RENDERINGS: Final = 2

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


def encode(row: Row) -> bytes:
    """Return the row of `getchatts`: name, message, id, time."""
    return msgspec.json.encode(row[:4])


def encode_with_media(row: Row, media_url: str | None) -> bytes:
    """Return the row of four, or of `getimages`: six, with addresses under `media_url`."""
    return _with_media(encode(row), Media(row.image, row.video), media_url)


def _with_media(row: bytes, media: Media | None, media_url: str | None) -> bytes:
    if media_url is None:
        return row
    if media is None:
        return row[:-1] + b",null,null]"
    urls = (key and media_url + quote(key) for key in media)
    return row[:-1] + b"," + b",".join(map(msgspec.json.encode, urls)) + b"]"


class Block:
    """Consecutive rows, ordered by (time, seq)."""

    __slots__ = (
        "_ends",
        "_gzipped",
        "_media",
        "_rendered",
        "data",
        "first_time",
        "last_time",
        "made",
        "size",
    )

    def __init__(self, rows: Sequence[bytes], media: Mapping[int, Media]) -> None:
        # With the comma in front, a block's bytes are the same wherever it stands.
        self.data = b"," + b",".join(rows)
        self._ends = array("I")
        end = 0
        for row in rows:
            end += 1 + len(row)
            self._ends.append(end)
        self._media = dict(media)
        self.first_time = rows[0][_TIME]
        self.last_time = rows[-1][_TIME]
        self._rendered: dict[str, bytes] = {}
        self._gzipped: dict[tuple[str | None, bool], bytes] = {}
        self.size = len(self.data) + _ROW_OVERHEAD * len(rows)
        """Bytes of memory that its rows take, about."""
        self.made = 0
        """Bytes of memory that what was made of them takes."""

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> bytes:
        """Return one row of four."""
        start = self._ends[index - 1] if index else 0
        return self.data[start + 1 : self._ends[index]]

    def id(self, index: int) -> str:
        """Return a row's id."""
        return self.row(index)[_ID].decode()

    def image_row(self, index: int, media_url: str | None) -> bytes:
        """Return a row as `encode_with_media` does."""
        return _with_media(self.row(index), self._media.get(index), media_url)

    def part(self, media_url: str | None) -> bytes:
        """Return all rows, a comma before each: of four, or of six where `media_url` is given."""
        if media_url is None:
            return self.data
        part = self._rendered.get(media_url)
        if part is None:
            rows = (self.image_row(index, media_url) for index in range(len(self)))
            part = b"," + b",".join(rows)
            # Addresses differ by the host that a request names; strangers choose that.
            if len(self._rendered) >= _RENDERINGS:
                self.forget_made()
            self._rendered[media_url] = part
            self.made += len(part)
        return part

    def forget_made(self) -> None:
        """Forget what was made of the rows; it is made again when asked for."""
        self._rendered.clear()
        self._gzipped.clear()
        self.made = 0

    def first_part(self, media_url: str | None) -> bytes:
        """Return `part` as it begins an array."""
        return b"[" + self.part(media_url)[1:]

    def gzipped(self, media_url: str | None, *, first: bool) -> bytes:
        """Return `part` or `first_part` compressed, to stand within a deflate stream."""
        key = (media_url, first)
        gzipped = self._gzipped.get(key)
        if gzipped is None:
            gzipped = _deflate(self.first_part(media_url) if first else self.part(media_url))
            # Another thread may empty it at any moment.
            self._gzipped[key] = gzipped
            self.made += len(gzipped)
        return gzipped

    def pairs(self) -> list[tuple[bytes, Media | None]]:
        """Return the rows of four, each with its media keys or None."""
        return [(self.row(index), self._media.get(index)) for index in range(len(self))]

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


def blocks_of(rows: Sequence[tuple[bytes, Media | None]]) -> Iterator[Block]:
    """Pack rows into full blocks, and a last one that may not be full."""
    packed: list[bytes] = []
    media: dict[int, Media] = {}
    size = 0
    for row, keys in rows:
        if keys is not None:
            media[len(packed)] = keys
        packed.append(row)
        size += len(row)
        if size >= BLOCK_SIZE:
            yield Block(packed, media)
            packed, media, size = [], {}, 0
    if packed:
        yield Block(packed, media)


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    # A full flush ends on a whole byte and forgets what came before (zlib manual, deflate).
    return compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)


class Snapshot:
    """The feed, or its newest part, at one moment.

    version: another one means another content; the same one the same, in every process.
    older_than: the rows before this time are not here but in the database; None if all are here.
    """

    def __init__(self, version: str, blocks: Sequence[Block], older_than: bytes | None) -> None:
        self.version = version
        self.blocks = tuple(blocks)
        self.older_than = older_than
        self._parts: dict[str | None, list[bytes]] = {}
        self._gzip_parts: dict[str | None, list[bytes]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def parts(self, media_url: str | None) -> list[bytes]:
        """Return the JSON array of rows of four, or of six where `media_url` is given."""
        parts = self._parts.get(media_url)
        if parts is None:
            parts = _array([block.part(media_url) for block in self.blocks])
            _remember(self._parts, media_url, parts)
        return parts

    def gzip_parts(self, media_url: str | None) -> list[bytes]:
        """Return `parts` as a gzip stream (RFC 1952). Takes a while; call it in a thread."""
        parts = self._gzip_parts.get(media_url)
        if parts is None:
            checksum = length = 0
            for part in self.parts(media_url):
                checksum = zlib.crc32(part, checksum)
                length += len(part)
            parts = [
                _GZIP_HEAD,
                *(
                    block.gzipped(media_url, first=not index)
                    for index, block in enumerate(self.blocks)
                ),
                _GZIP_END if self.blocks else _GZIP_EMPTY,
                struct.pack("<II", checksum, length & 0xFFFFFFFF),
            ]
            # In one piece as long as that is small: each piece costs the server a write.
            if sum(map(len, parts)) <= BLOCK_SIZE:
                parts = [b"".join(parts)]
            _remember(self._gzip_parts, media_url, parts)
        return parts

    def newest(self, limit: int) -> list[tuple[Block, int]]:
        """Return where the last `limit` rows are, oldest first."""
        found: list[tuple[Block, int]] = []
        for block in reversed(self.blocks):
            for index in range(len(block) - 1, -1, -1):
                if len(found) == limit:
                    return found[::-1]
                found.append((block, index))
        return found[::-1]


def _array(parts: list[bytes]) -> list[bytes]:
    """Make a JSON array of rows that each have a comma before them."""
    if not parts:
        return [b"[]"]
    parts[0] = b"[" + parts[0][1:]
    parts[-1] += b"]"
    return parts


def _remember(
    made: dict[str | None, list[bytes]], media_url: str | None, parts: list[bytes]
) -> None:
    if len(made) > _RENDERINGS:
        made.clear()
    made[media_url] = parts


def _last_deflate_block(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


_GZIP_END: Final = _last_deflate_block(b"]")
_GZIP_EMPTY: Final = _last_deflate_block(b"[]")
