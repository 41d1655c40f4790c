"""PNG: the chunks of Portable Network Graphics (Third Edition) §5 and §11.

Kept are what decodes the picture, what shows its colours right, its frames, and of eXIf how it is
turned. Texts, times and what is not known go: sPLT, which no browser uses, because it has a name
as free as a text's.
"""

from collections.abc import Iterator
from typing import Final
from zlib import crc32

from chatterd.metadata.exif import orientation_only
from chatterd.metadata.source import Edit, Source, Uncleanable

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_ANY: Final = 2**31 - 1
# By type, as many bytes as a chunk can have; there is room for a text in a longer one.
_KEPT: Final = {
    b"IHDR": 13,
    b"PLTE": 768,
    b"IDAT": _ANY,
    b"tRNS": 256,
    b"gAMA": 4,
    b"cHRM": 32,
    b"sRGB": 1,
    b"cICP": 4,
    b"mDCV": 24,
    b"cLLI": 8,
    b"sBIT": 4,
    b"bKGD": 6,
    b"hIST": 512,
    b"pHYs": 9,
    b"acTL": 8,
    b"fcTL": 26,
    b"fdAT": _ANY,
}
_PROFILE_NAME: Final = b"ICC Profile\0"


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean a PNG file. Raises `Uncleanable`."""
    if source.read(0, 8) != _SIGNATURE:
        raise Uncleanable("the PNG file does not begin as one")
    start = 8
    while True:
        length, kind = source.integer(start, 4), source.read(start + 4, 4)
        if kind == b"IEND":
            yield Edit(start, source.size, _chunk(b"IEND", b""))
            return
        stop = start + length + 12
        if stop > source.size:
            raise Uncleanable("the PNG file ends within a chunk")
        if kind == b"iCCP":
            yield from _rename_profile(source, start, stop)
        elif kind == b"eXIf":
            exif = orientation_only(source, start + 8, stop - 4)
            yield Edit(start, stop, _chunk(kind, exif) if exif else b"")
        elif length > _KEPT.get(kind, -1):
            if not kind.isalpha() or kind[:1].isupper():
                raise Uncleanable("the PNG file has a chunk that no decoder knows")
            yield Edit(start, stop)
        start = stop


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + crc32(kind + data).to_bytes(4)


def _rename_profile(source: Source, start: int, stop: int) -> Iterator[Edit]:
    """Give the colour profile (§11.3.2.3) a name that tells nothing."""
    head = source.read(start + 8, min(80, stop - 4 - start - 8))
    name, end, _ = head.partition(b"\0")
    if not end:
        raise Uncleanable("the colour profile of the PNG file has no name")
    profile = start + 8 + len(name) + 1
    header = b"iCCP" + _PROFILE_NAME
    checksum = crc32(header)
    for _, window in source.windows(profile, stop - 4):
        checksum = crc32(window, checksum)
    length = len(_PROFILE_NAME) + stop - 4 - profile
    yield Edit(start, profile, length.to_bytes(4) + header)
    yield Edit(stop - 4, stop, checksum.to_bytes(4))
