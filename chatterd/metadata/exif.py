"""How a picture is turned, the one thing worth keeping of Exif (CIPA DC-008 §4.6.5.1.6)."""

import struct
from typing import Final, Literal

from chatterd.metadata.source import Source

_ORDERS: Final[dict[bytes, Literal["little", "big"]]] = {b"II*\0": "little", b"MM\0*": "big"}
_ORIENTATION: Final = 0x0112
_SHORT: Final = 3
_ENTRIES_MAX: Final = 1000


def orientation_only(source: Source, start: int, stop: int) -> bytes:
    """Return the Exif data between `start` and `stop` less everything but the orientation.

    Empty when it is the usual one, when there is none, and when the data make no sense.
    """
    orientation = _orientation(source, start, stop)
    if not 2 <= orientation <= 8:
        return b""
    entry = struct.pack(">HHIHH", _ORIENTATION, _SHORT, 1, orientation, 0)
    return b"MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def _orientation(source: Source, start: int, stop: int) -> int:
    """Read the tag from the first directory (TIFF 6.0 §2); 0 when there is none."""
    if stop - start < 8:
        return 0
    order = _ORDERS.get(source.read(start, 4))
    if order is None:
        return 0
    directory = start + source.integer(start + 4, 4, order)
    if directory + 2 > stop:
        return 0
    count = min(source.integer(directory, 2, order), _ENTRIES_MAX)
    fields = struct.Struct("<HHIH" if order == "little" else ">HHIH")
    entries = range(directory + 2, directory + 2 + 12 * count, 12)
    for entry in entries:
        if entry + 12 > stop:
            break
        tag, kind, values, value = fields.unpack(source.read(entry, fields.size))
        if (tag, kind, values) == (_ORIENTATION, _SHORT, 1):
            return int(value)
    return 0
