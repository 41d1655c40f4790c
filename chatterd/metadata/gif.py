"""GIF: the blocks of the GIF89a specification.

Kept are the pictures with their palettes and control extensions, and of the application
extensions how often an animation repeats, and the colour profile.
"""

from collections.abc import Iterator
from typing import Final

from chatterd.metadata.source import Edit, Source, Uncleanable

_TRAILER: Final = 0x3B
_IMAGE: Final = 0x2C
_EXTENSION: Final = 0x21
_CONTROL: Final = 0xF9
_APPLICATION: Final = 0xFF
_LOOPING: Final = (b"\x0bNETSCAPE2.0\x03\x01", b"\x0bANIMEXTS1.0\x03\x01")
_PROFILE: Final = b"\x0bICCRGBG1012"


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean a GIF file. Raises `Uncleanable`."""
    if source.read(0, 6) not in {b"GIF87a", b"GIF89a"}:
        raise Uncleanable("the GIF file does not begin as one")
    offset = 13 + _palette_size(source, 10)
    while (introducer := source.integer(offset, 1)) != _TRAILER:
        if introducer == _IMAGE:
            offset = _after_blocks(source, offset + 10 + _palette_size(source, offset + 9) + 1)
        elif introducer == _EXTENSION:
            stop = _after_blocks(source, offset + 2)
            yield from _extension(source, offset, stop)
            offset = stop
        else:
            raise Uncleanable("the GIF file has an unknown block")
    yield Edit(offset + 1, source.size)


def _palette_size(source: Source, offset: int) -> int:
    """Return the bytes of the colour table that the packed fields at `offset` announce (§18)."""
    fields = source.integer(offset, 1)
    return 3 * 2 ** ((fields & 7) + 1) if fields & 0x80 else 0


def _after_blocks(source: Source, offset: int) -> int:
    """Return where the sub-blocks (§15, §16) that begin at `offset` have ended."""
    position = 0
    for start, window in source.windows(offset, source.size):
        while position < len(window):
            length = window[position]
            position += length + 1
            if not length:
                return start + position
        position -= len(window)
    raise Uncleanable("the GIF file ends within a block")


def _extension(source: Source, start: int, stop: int) -> Iterator[Edit]:
    """Yield what cleans the extension (§23 to §26) between `start` and `stop`."""
    label = source.integer(start + 1, 1)
    head = source.read(start, min(stop - start, 18))
    if label == _CONTROL:
        if stop - start != 8:
            raise Uncleanable("the GIF file has a control extension of a wrong length")
    elif label == _APPLICATION and head.startswith(_LOOPING, 2) and len(head) == 18:
        yield Edit(start, stop, head + b"\0")
    elif label != _APPLICATION or not head.startswith(_PROFILE, 2):
        yield Edit(start, stop)
