"""WebP: the chunks of RFC 9649 §2.

Kept are pictures, frames, transparency, the colour profile, and of Exif how the picture is turned.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from chatterd.metadata.exif import orientation_only
from chatterd.metadata.source import Edit, Source, Uncleanable

_FRAME_PARTS: Final = frozenset({b"VP8 ", b"VP8L", b"ALPH"})
_KEPT: Final = _FRAME_PARTS | {b"VP8X", b"ICCP", b"ANIM", b"ANMF"}
_SIZES: Final = {b"VP8X": 10, b"ANIM": 6}
_FRAME_HEADER_SIZE: Final = 16
# Flags of VP8X (§2.7.1): colour profile, transparency and animation; Exif.
_PROFILE_ALPHA_ANIMATION: Final = 0x32
_EXIF: Final = 0x08


class _Chunk(NamedTuple):
    kind: bytes
    start: int
    data: int
    data_stop: int
    stop: int


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean a WebP file. Raises `Uncleanable`."""
    head = source.read(0, 12)
    if head[:4] != b"RIFF" or head[8:] != b"WEBP":
        raise Uncleanable("the WebP file does not begin as one")
    size = int.from_bytes(head[4:8], "little")
    if 8 + size > source.size:
        raise Uncleanable("the WebP file is shorter than it says")
    yield Edit(8 + size, source.size)
    flags_at: int | None = None
    flags = 0
    for chunk in _chunks(source, 12, 8 + size):
        if chunk.kind == b"VP8X":
            flags_at = chunk.data
            flags = source.integer(flags_at, 1) & _PROFILE_ALPHA_ANIMATION
        if _is_kept(source, chunk):
            continue
        # Only the extended format has Exif; its flag stands in front of it.
        exif = b"" if flags_at is None else _turned(source, chunk)
        flags |= _EXIF if exif else 0
        size += len(exif) - (chunk.stop - chunk.start)
        yield Edit(chunk.start, chunk.stop, exif)
    if flags_at is not None:
        yield Edit(flags_at, flags_at + 4, bytes([flags, 0, 0, 0]))
    yield Edit(4, 8, size.to_bytes(4, "little"))


def _chunks(source: Source, start: int, stop: int) -> Iterator[_Chunk]:
    if start > stop:
        raise Uncleanable("a frame of the WebP file is too short")
    while start < stop:
        kind, data = source.read(start, 4), start + 8
        data_stop = data + source.integer(start + 4, 4, "little")
        chunk = _Chunk(kind, start, data, data_stop, data_stop + (data_stop - data) % 2)
        if chunk.stop > stop:
            raise Uncleanable("a chunk of the WebP file is longer than what it is in")
        yield chunk
        start = chunk.stop


def _is_kept(source: Source, chunk: _Chunk) -> bool:
    """Whether `chunk` stays. Raises `Uncleanable` when one that must stay has too much in it."""
    size = chunk.data_stop - chunk.data
    if size != _SIZES.get(chunk.kind, size):
        raise Uncleanable("a chunk of the WebP file has a wrong length")
    if chunk.kind == b"ANMF":
        parts = _chunks(source, chunk.data + _FRAME_HEADER_SIZE, chunk.data_stop)
        if any(part.kind not in _FRAME_PARTS for part in parts):
            raise Uncleanable("a frame of the WebP file has an unknown part")
    return chunk.kind in _KEPT


def _turned(source: Source, chunk: _Chunk) -> bytes:
    """Return the chunk of Exif data that says how the picture is turned, if `chunk` does."""
    if chunk.kind != b"EXIF":
        return b""
    # Some programs begin the chunk as JPEG's segment begins.
    prefix = 6 if source.peek(chunk.data, 6) == b"Exif\0\0" else 0
    exif = orientation_only(source, chunk.data + prefix, chunk.data_stop)
    return b"EXIF" + len(exif).to_bytes(4, "little") + exif if exif else b""
