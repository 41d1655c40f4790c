"""JPEG: the segments of ITU-T T.81 Annex B.

Kept are what decodes the picture, and of the application segments: JFIF (ITU-T T.871 §10.1)
without its thumbnail, the colour profile (ICC.1 Annex B.4), Adobe's mark of the colour transform
(ITU-T T.872 §6.5.3), and of Exif (CIPA DC-008 §4.7) how the picture is turned. Other pictures and
films that cameras append go with everything after the end of the first.
"""

import re
from collections.abc import Iterator
from typing import Final

from chatterd.metadata.exif import orientation_only
from chatterd.metadata.source import Edit, Source, Uncleanable

# In a scan, 0xFF is also followed by a stuffed zero, and restart markers divide it (§B.1.1.5); any
# number of 0xFF may fill the space before a marker (§B.1.1.2).
_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EOI: Final = 0xD9
_SOS: Final = 0xDA
# Frames but for the reserved 0xC8, with DHT and DAC; SOS, DQT, DNL, DRI.
_DECODING: Final = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xDE)} - {0xC8})
_DNL: Final = 0xDC
_DNL_SIZE: Final = 6  # with its marker (§B.2.5)
_APP0: Final = 0xE0
_APP1: Final = 0xE1
_APP2: Final = 0xE2
_APP14: Final = 0xEE
_COM: Final = 0xFE


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean a JPEG file. Raises `Uncleanable`."""
    if source.read(0, 2) != b"\xff\xd8":
        raise Uncleanable("the JPEG file does not begin as one")
    offset, in_scan = 2, False
    start, kept = 2, b""  # what stays of the bytes from `start` to the next marker
    while True:
        marker = source.find(_MARKER, offset)
        if marker is None:
            raise Uncleanable("the JPEG file has no end marker")
        if not in_scan and start < marker:
            # Decoders skip what lies between segments. It goes together with what goes before it:
            # right behind a scan it would pass for a part of that.
            yield Edit(start, marker, kept)
        code = source.integer(marker + 1, 1)
        if code == _EOI:
            yield Edit(marker + 2, source.size)
            return
        offset = marker + 2 + source.integer(marker + 2, 2)
        if not marker + 4 <= offset <= source.size:
            raise Uncleanable("a segment of the JPEG file has a wrong length")
        if code == _DNL and offset - marker != _DNL_SIZE:
            raise Uncleanable("the JPEG file has a number of lines of a wrong length")
        start, kept = offset, b""
        if code not in _DECODING and not _is_profile(source, code, marker + 4, offset):
            start, kept = marker, _application(source, code, marker + 4, offset)
        in_scan = code == _SOS


def _is_profile(source: Source, code: int, start: int, stop: int) -> bool:
    """Whether a segment, whose contents begin at `start`, is of a colour profile."""
    return code == _APP2 and source.read(start, min(stop - start, 12)) == b"ICC_PROFILE\0"


def _application(source: Source, code: int, start: int, stop: int) -> bytes:
    """Return what is kept of a segment that no decoding needs; its contents begin at `start`."""
    if not (_APP0 <= code < _APP0 + 16 or code == _COM):
        raise Uncleanable(f"the JPEG file has the unknown marker 0xFF{code:02X}")
    head = source.read(start, min(stop - start, 14))
    if code == _APP0 and head.startswith(b"JFIF\0") and len(head) == 14:
        return _segment(code, head[:12] + bytes(2))  # a thumbnail of no width and no height
    if code == _APP1 and head.startswith(b"Exif\0"):
        exif = orientation_only(source, start + 6, stop)
        return _segment(code, b"Exif\0\0" + exif) if exif else b""
    if code == _APP14 and head.startswith(b"Adobe") and len(head) >= 12:
        return _segment(code, head[:12])
    return b""


def _segment(code: int, contents: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(contents) + 2).to_bytes(2) + contents
