"""HEIC and HEIF: the items of ISO/IEC 14496-12 §8.11 and ISO/IEC 23008-12.

Items of metadata (Exif, XMP and others) lose their type, their names and their data; pictures, what
they consist of and how they are turned (`irot`, `imir`) stay. Sequences are cleaned as movies are.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from chatterd.metadata import mp4
from chatterd.metadata.isobmff import (
    DATA_INFORMATION,
    Box,
    apply,
    boxes,
    handler,
    is_within,
    keep,
    keeping,
    only,
    within,
)
from chatterd.metadata.source import Edit, Source, Uncleanable, zeros

_NO_TYPE: Final = b"free"
_PICTURES: Final = frozenset(b"hvc1 hev1 lhv1 vvc1 avc1 av01 grid iovl iden tmap".split())
_METADATA: Final = frozenset({b"Exif", b"mime", b"uri ", b"rgan", _NO_TYPE})
# What tells a decoder about a picture. Other properties are texts and times; as their places in
# the list count, they become free boxes, for which ISO/IEC 23008-12 §9.3 has room there.
_PROPERTIES: Final = (
    "ispe hvcC lhvC vvcC avcC av1C colr pixi pasp clap irot imir auxC rloc lsel oinf tols a1op a1lx"
    " clli mdcv amve cclv ndwt reve"
)


class _Item(NamedTuple):
    """An item's type, where that stands, and where its entry in the list ends."""

    kind: bytes
    kind_at: int
    stop: int


class _Extent(NamedTuple):
    """A part of an item's data, and the box it has to be in unless that is any `mdat`."""

    start: int
    stop: int
    item: int
    idat: Box | None


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean a HEIC or HEIF file. Raises `Uncleanable`."""
    if sum(box.kind == b"meta" for box in boxes(source, 0, source.size)) != 1:
        raise Uncleanable("the file has no list of pictures, or several")
    return apply(source, 0, source.size, mp4.TOP_LEVEL | {b"meta": _list})


def _list(source: Source, meta: Box) -> Iterator[Edit]:
    meta = meta._replace(contents=meta.contents + 4)  # its version and flags come first
    yield from apply(source, meta.contents, meta.stop, _RULES)
    items = _items(source, only(source, meta, b"iinf"))
    for item in items.values():
        if item.kind in _METADATA:
            yield Edit(item.kind_at, item.kind_at + 4, _NO_TYPE)
        elif item.kind not in _PICTURES:
            raise Uncleanable("the file has an item that is neither a picture nor known metadata")
        yield from zeros(item.kind_at + 4, item.stop)
    yield from _without_metadata(source, items, sorted(_extents(source, meta), key=lambda e: e[:3]))


def _without_metadata(
    source: Source, items: dict[int, _Item], extents: list[_Extent]
) -> Iterator[Edit]:
    """Clear the data of items of metadata, which must be nobody else's."""
    media_data = [box for box in boxes(source, 0, source.size) if box.kind == b"mdat"]
    kept_until = cleared_until = 0
    for extent in extents:
        if extent.item not in items:
            raise Uncleanable("the file has data of an item that is not in its list")
        is_kept = items[extent.item].kind in _PICTURES
        if extent.start < (cleared_until if is_kept else kept_until):
            raise Uncleanable("the file has metadata in its pictures")
        if is_kept:
            kept_until = max(kept_until, extent.stop)
            continue
        homes = [extent.idat] if extent.idat else media_data
        if not is_within(extent.start, extent.stop, homes):
            raise Uncleanable("the file has an item whose data are elsewhere")
        yield from zeros(max(extent.start, cleared_until), extent.stop)
        cleared_until = max(cleared_until, extent.stop)


def _items(source: Source, box: Box) -> dict[int, _Item]:
    """Return the items by their numbers (§8.11.6)."""
    items: dict[int, _Item] = {}
    first = box.contents + (6 if source.integer(box.contents, 1) == 0 else 8)
    for entry in boxes(source, first, box.stop):
        version = source.integer(entry.contents, 1)
        if entry.kind != b"infe" or version not in {2, 3}:
            raise Uncleanable("the file has a list of items of an unknown kind")
        width = 2 if version == 2 else 4
        number, kind_at = source.integer(entry.contents + 4, width), entry.contents + 6 + width
        if kind_at + 4 > entry.stop or number in items:
            raise Uncleanable("the file has a broken list of items")
        items[number] = _Item(source.read(kind_at, 4), kind_at, entry.stop)
    return items


def _extents(source: Source, meta: Box) -> Iterator[_Extent]:
    """Yield where the data of all items are (§8.11.3)."""
    box = only(source, meta, b"iloc")
    position = box.contents

    def take(width: int) -> int:
        nonlocal position
        position += width
        if position > box.stop:
            raise Uncleanable("the file has a broken list of the places of its items")
        return source.integer(position - width, width)

    version, _flags, sizes = take(1), take(3), take(2)
    if version > 2:
        raise Uncleanable("the file has its items at places of an unknown kind")
    count_width = 4 if version == 2 else 2
    for _ in range(take(count_width)):
        item = take(count_width)
        method = take(2) & 15 if version else 0
        if method > 1 or take(2):
            raise Uncleanable("the file has an item within another or in another file")
        idat = only(source, meta, b"idat") if method else None
        base = take(sizes >> 4 & 15) + (idat.contents if idat else 0)
        for _ in range(take(2)):
            take(sizes & 15 if version else 0)
            start = base + take(sizes >> 12)
            # No length is the whole of what the data are in.
            length = take(sizes >> 8 & 15)
            stop = start + length if length else (idat.stop if idat else source.size)
            if stop > source.size:
                raise Uncleanable("the file ends within the data of an item")
            yield _Extent(start, stop, item, idat)


_RULES: Final = keeping("pitm iref iinf iloc idat grpl") | {
    b"hdlr": handler,
    b"dinf": DATA_INFORMATION,
    b"iprp": within({b"ipco": within(keeping(_PROPERTIES)), b"ipma": keep}),
}
