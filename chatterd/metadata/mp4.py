"""MP4 and QuickTime: movies of ISO/IEC 14496-12 §8 and of the QuickTime File Format.

Kept are the tracks of picture and sound. Any other track goes with its samples: telephones write
where and how they were held into tracks of metadata, drones write where they flew into subtitles.
"""

import sys
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, Literal

from chatterd.metadata.isobmff import (
    DATA_INFORMATION,
    Box,
    Rule,
    apply,
    blank,
    boxes,
    handler,
    is_within,
    keep,
    keeping,
    only,
    overwrite,
    within,
)
from chatterd.metadata.source import WINDOW, Edit, Source, Uncleanable, zeros


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean an MP4 or QuickTime file. Raises `Uncleanable`."""
    if all(box.kind != b"moov" for box in boxes(source, 0, source.size)):
        raise Uncleanable("the file has no movie in it")
    return apply(source, 0, source.size, TOP_LEVEL)


def _movie(source: Source, box: Box) -> Iterator[Edit]:
    tracks = [part for part in boxes(source, box.contents, box.stop) if part.kind == b"trak"]
    if not any(_media_kind(source, track) in _KEPT_TRACKS for track in tracks):
        raise Uncleanable("the file has neither picture nor sound that can be found")
    return apply(source, box.contents, box.stop, _MOVIE)


def _track(source: Source, box: Box) -> Iterator[Edit]:
    return _KEPT_TRACKS.get(_media_kind(source, box), _remove_track)(source, box)


def _remove_track(source: Source, track: Box) -> Iterator[Edit]:
    tops = list(boxes(source, 0, source.size))
    if any(top.kind == b"moof" for top in tops):
        raise Uncleanable("the file has a track in fragments that is neither picture nor sound")
    media_data = [top for top in tops if top.kind == b"mdat"]
    chunks = sorted(_chunks(source, track))
    if any(first[1] > second[0] for first, second in pairwise(chunks)):
        raise Uncleanable("the file has a track whose samples overlap")
    for start, stop in chunks:
        if not is_within(start, stop, media_data):
            raise Uncleanable("the file has a track whose data are elsewhere")
        yield from zeros(start, stop)
    yield from blank(source, track)


def _media_kind(source: Source, track: Box) -> bytes:
    """Return the type of the track's handler (§8.4.3)."""
    return source.read(only(source, only(source, track, b"mdia"), b"hdlr").contents + 8, 4)


def _chunks(source: Source, track: Box) -> Iterator[tuple[int, int]]:
    """Yield where the samples of `track` lie (§8.7), by the chunk."""
    table = track
    for kind in (b"mdia", b"minf", b"stbl"):
        table = only(source, table, kind)
    wide = any(box.kind == b"co64" for box in boxes(source, table.contents, table.stop))
    offsets = (
        _numbers(source, only(source, table, b"co64"), "Q")
        if wide
        else _numbers(source, only(source, table, b"stco"), "I")
    )
    source.spend(len(offsets))
    runs = _numbers(source, only(source, table, b"stsc"), "I", values=3)
    samples_of = dict(zip(runs[::3], runs[1::3], strict=True))
    sizes_box = only(source, table, b"stsz")
    size = source.integer(sizes_box.contents + 4, 4)
    sizes = array("I") if size else _numbers(source, sizes_box, "I", skip=8)
    first, count = 0, 0
    for number, start in enumerate(offsets, 1):
        count = samples_of.get(number, count)
        yield start, start + (size * count or sum(sizes[first : first + count]))
        first += count


def _numbers(
    source: Source, box: Box, code: Literal["I", "Q"], values: int = 1, skip: int = 4
) -> "array[int]":
    """Return the table in `box`: after `skip` bytes its length, then so many times `values`."""
    table = array(code)
    start = box.contents + skip + 4
    size = source.integer(start - 4, 4) * values * table.itemsize
    if size > min(WINDOW, box.stop - start):
        raise Uncleanable("a track that is neither picture nor sound has too many samples")
    table.frombytes(source.read(start, size))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def _times(source: Source, box: Box) -> Iterator[Edit]:
    """Clear the times of creation and modification (§8.2.2, §8.3.2, §8.4.2)."""
    return overwrite(box, 4, 16 if source.integer(box.contents, 1) == 1 else 8)


def _picture_descriptions(source: Source, box: Box) -> Iterator[Edit]:
    """Clear the names of maker and compressor (§12.1.3; QTFF, "Video sample description")."""
    for entry in boxes(source, box.contents + 8, box.stop):
        yield from overwrite(entry, 12, 4)
        yield from overwrite(entry, 42, 32)
        yield from apply(source, entry.contents + 78, entry.stop, _UNDESCRIBED, keep)


def _sound_descriptions(source: Source, box: Box) -> Iterator[Edit]:
    """Clear the name of the maker (§12.2.3; QTFF, "Sound sample description")."""
    for entry in boxes(source, box.contents + 8, box.stop):
        yield from overwrite(entry, 12, 4)
        version = source.integer(entry.contents + 8, 2)
        # The newer versions of QuickTime are longer; ISO's says the same of itself, and is not.
        quicktime = source.integer(box.contents, 1) == 0
        longer = {1: 16, 2: 36}.get(version, 0) if quicktime else 0
        yield from apply(source, entry.contents + 28 + longer, entry.stop, _UNDESCRIBED, keep)


_UNDESCRIBED: Final[dict[bytes, Rule]] = dict.fromkeys(
    (b"free", b"skip", b"udta", b"meta", b"uuid"), blank
)


def _track_rule(descriptions: Rule) -> Rule:
    table = "stts ctts cslg stsc stsz stz2 stco co64 stss stps stsh padb stdp sdtp sbgp sgpd subs"
    media = {b"stbl": within(keeping(f"{table} saiz saio") | {b"stsd": descriptions})}
    media |= keeping("vmhd smhd") | {b"hdlr": handler, b"dinf": DATA_INFORMATION}
    return within(
        keeping("tapt")
        | {
            b"tkhd": _times,
            b"edts": within(keeping("elst")),
            # References to tracks that are kept; a player might look for others in vain.
            b"tref": within(keeping("auxl fall folw vdep vplx")),
            b"mdia": within(
                keeping("elng") | {b"mdhd": _times, b"hdlr": handler, b"minf": within(media)}
            ),
        }
    )


_PICTURE_TRACK: Final = _track_rule(_picture_descriptions)
_KEPT_TRACKS: Final = {
    b"vide": _PICTURE_TRACK,
    b"pict": _PICTURE_TRACK,
    b"auxv": _PICTURE_TRACK,
    b"soun": _track_rule(_sound_descriptions),
}
_MOVIE: Final = keeping("iods") | {
    b"mvhd": _times,
    b"trak": _track,
    b"mvex": within(keeping("mehd trex leva")),
}
_FRAGMENT: Final = within(
    keeping("mfhd")
    | {b"traf": within(keeping("tfhd tfdt trun sdtp sbgp sgpd subs saiz saio senc"))}
)
TOP_LEVEL: Final = keeping("ftyp styp mdat pdin sidx ssix") | {
    b"moov": _movie,
    b"moof": _FRAGMENT,
    b"mfra": within(keeping("tfra mfro")),
}
"""What is done about the boxes of a file: these rules, and `blank` for all others (§8.1.1)."""
