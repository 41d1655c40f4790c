"""MP4 and QuickTime: movies of ISO/IEC 14496-12 §8 and of the QuickTime File Format.

Kept are the tracks of picture and sound. Any other track goes with its samples: telephones write
where and how they were held into tracks of metadata, drones write where they flew into subtitles.
"""

import re
import sys
from array import array
from collections.abc import Iterator, Mapping
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
        _require_codec(source, entry, entry.contents + 78, _PICTURE_CODECS)
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
        _require_codec(source, entry, entry.contents + 28 + longer, _SOUND_CODECS)
        yield from apply(source, entry.contents + 28 + longer, entry.stop, _UNDESCRIBED, keep)


_UNDESCRIBED: Final[dict[bytes, Rule]] = dict.fromkeys(
    (b"free", b"skip", b"udta", b"meta", b"uuid"), blank
)


def _require_codec(
    source: Source, entry: Box, start: int, codecs: Mapping[bytes, frozenset[int] | None]
) -> None:
    """Refuse what is encoded in a way that is not among `codecs`.

    The descriptions within the sample entry begin at `start`.
    """
    if entry.kind not in codecs:
        raise Uncleanable(f"the file has the codec {entry.kind.decode('latin-1')!r}")
    object_types = codecs[entry.kind]
    if object_types is None:
        return
    found = [_object_type(source, part) for part in _stream_descriptions(source, entry, start)]
    if not found or not object_types.issuperset(found):
        kind = entry.kind.decode()
        raise Uncleanable(f"the file has the codec {kind!r} of a kind that is not accepted")


def _stream_descriptions(source: Source, entry: Box, start: int) -> Iterator[Box]:
    """Yield the boxes `esds` of a sample entry (ISO/IEC 14496-14 §6.7), also those in `wave`.

    In `wave` QuickTime puts what describes sound (QTFF, "siDecompressionParam atom").
    """
    for part in boxes(source, start, entry.stop):
        if part.kind == b"esds":
            yield part
        elif part.kind == b"wave":
            inner = boxes(source, part.contents, part.stop)
            yield from (box for box in inner if box.kind == b"esds")


def _object_type(source: Source, box: Box) -> int | None:
    """Return the codec that `esds` names (ISO/IEC 14496-1 §7.2.6.6); None when it is unclear."""
    found = _OBJECT_TYPE.match(source.read(box.contents, min(32, box.stop - box.contents)))
    return found[1][0] if found else None


# Version and flags; the stream's descriptor, its length, number and flags, of which none announces
# more; the decoder's descriptor, its length and the type.
_OBJECT_TYPE: Final = re.compile(
    rb".{4}\x03[\x80-\xff]{0,3}[\0-\x7f]..[\0-\x1f]\x04[\x80-\xff]{0,3}[\0-\x7f](.)", re.DOTALL
)
# What encoders of cameras, telephones and programs write. Not among them is what has room for
# metadata of its own, as pictures of JPEG and PNG, FLAC and Vorbis have.
_PICTURE_CODECS: Final[dict[bytes, frozenset[int] | None]] = {
    **dict.fromkeys(b"avc1 avc3 hvc1 hev1 dvh1 dvhe vp08 vp09 av01 s263".split()),
    **dict.fromkeys(b"apch apcn apcs apco ap4h ap4x".split()),  # ProRes
    b"mp4v": frozenset({0x20, *range(0x60, 0x66), 0x6A}),  # MPEG-4, MPEG-2 and MPEG-1
}
_SOUND_CODECS: Final[dict[bytes, frozenset[int] | None]] = {
    **dict.fromkeys(b"alac ac-3 ec-3 Opus samr sawb apac".split()),
    # PCM.
    **dict.fromkeys(b"lpcm sowt twos in24 in32 fl32 fl64 ipcm fpcm ulaw alaw NONE".split()),
    b"raw ": None,
    b"mp4a": frozenset({0x40, 0x66, 0x67, 0x68, 0x69, 0x6B}),  # AAC and MP3
}


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
# What dash cameras write between the pictures, and AVCHD cameras in them: the text of H.264 for
# users (ITU-T H.264 Annex D) by its UUID and the cameras' mark. Each is one literal: that is found
# ten times as fast as two alternatives.
_PLACES: Final = (
    re.compile(b"freeGPS "),
    re.compile(re.escape(bytes.fromhex("17ee8c60f84d11d98cd60800200c9a66") + b"MDPM")),
)


def _media_data(source: Source, box: Box) -> Iterator[Edit]:
    """Leave the samples as they are. Raises `Uncleanable` when there is a place among them."""
    if any(source.find(place, box.contents, box.stop) is not None for place in _PLACES):
        raise Uncleanable("the file has a place among its pictures")
    return iter(())


_MOVIE: Final = keeping("iods") | {
    b"mvhd": _times,
    b"trak": _track,
    b"mvex": within(keeping("mehd trex leva")),
}
_FRAGMENT: Final = within(
    keeping("mfhd")
    | {b"traf": within(keeping("tfhd tfdt trun sdtp sbgp sgpd subs saiz saio senc"))}
)
TOP_LEVEL: Final = keeping("ftyp styp pdin sidx ssix") | {
    b"mdat": _media_data,
    b"moov": _movie,
    b"moof": _FRAGMENT,
    b"mfra": within(keeping("tfra mfro")),
}
"""What is done about the boxes of a file: these rules, and `blank` for all others (§8.1.1)."""
