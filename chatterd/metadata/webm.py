"""WebM: the elements of EBML (RFC 8794) and Matroska (RFC 9559).

Everything in such a file may be found by its place, so nothing is moved: what must go becomes a
Void element. Kept are pictures and sound, and what plays and seeks them. Tags, attachments,
chapters, titles and times go, and checksums, which would be wrong.
"""

import re
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from chatterd.metadata.source import WINDOW, Edit, Source, Uncleanable, zeros

_EBML: Final = 0x1A45DFA3
_SEGMENT: Final = 0x18538067
_CLUSTER: Final = 0x1F43B675
_SEEK_HEAD: Final = 0x114D9B74
_SEEK: Final = 0x4DBB
_SEEK_ID: Final = 0x53AB
_INFO: Final = 0x1549A966
_MUXING_APP: Final = 0x4D80
_WRITING_APP: Final = 0x5741
_TRACKS: Final = 0x1654AE6B
_TRACK_ENTRY: Final = 0xAE
_TRACK_TYPE: Final = 0x83
_CODEC_ID: Final = 0x86
_CODEC_PRIVATE: Final = 0x63A2
_CUES: Final = 0x1C53BB6B
# Beside those above, what a segment has: Chapters, Tags, Attachments.
_LEVEL_1: Final = frozenset(
    {_SEEK_HEAD, _INFO, _TRACKS, _CUES, _CLUSTER, 0x1043A770, 0x1254C367, 0x1941A469}
)
_TWO_SIZES: Final = re.compile(rb"\x02(\xff*[^\xff])(\xff*[^\xff])", re.DOTALL)
# No vendor, no comments, the end of the header.
_NO_COMMENTS: Final = b"\x03vorbis" + bytes(8) + b"\x01"


class _Element(NamedTuple):
    """The bytes from `start` to `stop`, the contents from `contents` on.

    An element of unknown size (RFC 8794 §6.2) could reach as far as what it is in.
    """

    number: int
    start: int
    contents: int
    stop: int
    has_size: bool


_Rule: TypeAlias = Callable[[Source, _Element], Iterator[Edit]]


def edits(source: Source) -> Iterator[Edit]:
    """Yield the changes that clean a WebM file. Raises `Uncleanable`."""
    header = _element(source, 0, source.size)
    segment = _element(source, header.stop, source.size)
    if (header.number, segment.number) != (_EBML, _SEGMENT):
        raise Uncleanable("the WebM file does not begin as one")
    start = segment.contents
    while start < segment.stop:
        part = _element(source, start, segment.stop)
        if part.number == _CLUSTER:
            start = yield from _cluster(source, part)
        else:
            yield from _SEGMENT_RULES.get(part.number, _void)(source, part)
            start = part.stop
    yield Edit(segment.stop, source.size)


def _cluster(source: Source, cluster: _Element) -> Generator[Edit, None, int]:
    """Clean a cluster (RFC 9559 §5.1.3); return where it ends.

    One of unknown size, as live recordings have, ends where the next part of the segment begins.
    """
    start = cluster.contents
    while start < cluster.stop:
        part = _element(source, start, cluster.stop)
        if not cluster.has_size and part.number in _LEVEL_1:
            break
        yield from _CLUSTER_RULES.get(part.number, _void)(source, part)
        start = part.stop
    return start


def _element(source: Source, start: int, limit: int) -> _Element:
    """Read the head of an element that ends at `limit` or before (RFC 8794 §5, §6)."""
    head = source.peek(start, 12)
    width = 9 - head[0].bit_length() if head else 9
    size_width = 9 - head[width].bit_length() if width < len(head) else 9
    contents = start + width + size_width
    if width > 4 or size_width > 8 or contents > limit:
        raise Uncleanable("the WebM file has something that is no element")
    number = int.from_bytes(head[:width])
    unknown = (1 << 7 * size_width) - 1
    size = int.from_bytes(head[width : width + size_width]) & unknown
    if size == unknown:
        if number not in {_SEGMENT, _CLUSTER}:
            raise Uncleanable("the WebM file has an element of unknown size")
        return _Element(number, start, contents, limit, has_size=False)
    if contents + size > limit:
        raise Uncleanable("an element of the WebM file is longer than what it is in")
    return _Element(number, start, contents, contents + size, has_size=True)


def _parts(source: Source, element: _Element) -> Iterator[_Element]:
    start = element.contents
    while start < element.stop:
        part = _element(source, start, element.stop)
        yield part
        start = part.stop


def _void(_source: Source, element: _Element) -> Iterator[Edit]:
    """Make the element a Void one of the same length (RFC 8794 §11.3.2)."""
    length = element.stop - element.start
    width = 1 if length - 2 < 0x7F else 8
    contents = element.start + 1 + width
    size = (element.stop - contents) | 1 << 7 * width
    yield Edit(element.start, contents, b"\xec" + size.to_bytes(width))
    yield from zeros(contents, element.stop)


def _keep(_source: Source, _element: _Element) -> Iterator[Edit]:
    return iter(())


def _empty(_source: Source, element: _Element) -> Iterator[Edit]:
    """Clear a text that must be there: zeros end it (RFC 8794 §7.5)."""
    return zeros(element.contents, element.stop)


def _within(rules: Mapping[int, _Rule]) -> _Rule:
    """Return the rule for an element of elements; what `rules` leave out becomes Void."""

    def rule(source: Source, element: _Element) -> Iterator[Edit]:
        for part in _parts(source, element):
            yield from rules.get(part.number, _void)(source, part)

    return rule


def _values(source: Source, element: _Element, number: int) -> list[bytes]:
    """Return what the parts of `element` with this number say, as far as a short value goes."""
    return [
        source.read(part.contents, min(16, part.stop - part.contents))
        for part in _parts(source, element)
        if part.number == number
    ]


def _seek(source: Source, element: _Element) -> Iterator[Edit]:
    """Clear a pointer (RFC 9559 §5.1.1.1) to what is cleared."""
    targets = _values(source, element, _SEEK_ID)
    if any(int.from_bytes(target) not in _SEGMENT_RULES for target in targets):
        yield from _void(source, element)


def _track(source: Source, element: _Element) -> Iterator[Edit]:
    kinds = [int.from_bytes(value) for value in _values(source, element, _TRACK_TYPE)]
    if kinds not in ([1], [2]):  # its samples lie between those of the others
        raise Uncleanable("the WebM file has a track that is neither picture nor sound")
    codecs = [value.rstrip(b"\0") for value in _values(source, element, _CODEC_ID)]
    if len(codecs) != 1 or codecs[0] not in _CODECS:
        raise Uncleanable("the WebM file has a track of a codec that WebM does not have")
    yield from _within(_TRACK_RULES | {_CODEC_PRIVATE: _CODECS[codecs[0]]})(source, element)


def _without_comments(source: Source, element: _Element) -> Iterator[Edit]:
    """Empty the comments (Vorbis I §5.2.1), the second of three headers in Xiph lacing."""
    head = source.read(element.contents, min(WINDOW, element.stop - element.contents))
    lacing = _TWO_SIZES.match(head)
    if lacing is None:
        raise Uncleanable("the WebM file has sound that begins wrongly")
    first, second = (sum(lacing[group]) for group in (1, 2))
    start = element.contents + lacing.end() + first
    stop = start + second
    if second < len(_NO_COMMENTS) or stop > element.stop or source.read(start, 7) != b"\x03vorbis":
        raise Uncleanable("the WebM file has sound that begins wrongly")
    yield Edit(start, start + len(_NO_COMMENTS), _NO_COMMENTS)
    yield from zeros(start + len(_NO_COMMENTS), stop)


def _keeping(*numbers: int) -> dict[int, _Rule]:
    return dict.fromkeys(numbers, _keep)


# The codecs of WebM, and what is done about what they keep for their decoders.
_CODECS: Final[Mapping[bytes, _Rule]] = {
    **dict.fromkeys(b"V_VP8 V_VP9 V_AV1 A_OPUS".split(), _keep),
    b"A_VORBIS": _without_comments,
}
# Timestamp, Position, PrevSize, SimpleBlock, BlockGroup.
_CLUSTER_RULES: Final = _keeping(0xE7, 0xA7, 0xAB, 0xA3, 0xA0)
# TrackNumber, TrackUID, FlagEnabled, FlagDefault, FlagForced, FlagLacing, MinCache, MaxCache,
# DefaultDuration, DefaultDecodedFieldDuration, TrackTimestampScale, MaxBlockAdditionID,
# BlockAdditionMapping, Language, LanguageBCP47, CodecDelay, SeekPreRoll, Video, Audio,
# ContentEncodings.
_TRACK_RULES: Final = (
    _keeping(_TRACK_TYPE, _CODEC_ID, 0xD7, 0x73C5, 0xB9, 0x88, 0x55AA, 0x9C, 0x6DE7, 0x6DF8)
    | _keeping(0x23E383, 0x234E7A, 0x23314F, 0x55EE, 0x41E4, 0x22B59C, 0x22B59D)
    | _keeping(0x56AA, 0x56BB, 0xE0, 0xE1, 0x6D80)
)
# TimestampScale and Duration stay.
_INFO_RULES: Final = _within(
    _keeping(0x2AD7B1, 0x4489) | {_MUXING_APP: _empty, _WRITING_APP: _empty}
)
_SEGMENT_RULES: Final[Mapping[int, _Rule]] = {
    _SEEK_HEAD: _within({_SEEK: _seek}),
    _INFO: _INFO_RULES,
    _TRACKS: _within({_TRACK_ENTRY: _track}),
    _CUES: _keep,
    _CLUSTER: _keep,
}
