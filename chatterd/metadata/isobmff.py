"""The boxes of ISO base media files (ISO/IEC 14496-12 §4.2) and of QuickTime's.

Everything in such a file is found by its offset, so nothing is moved: what must go becomes a
`free` box of zeros.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from chatterd.metadata.source import Edit, Source, Uncleanable, zeros

_FREE: Final = frozenset({b"free", b"skip", b"wide"})
_SELF_CONTAINED: Final = 1


class Box(NamedTuple):
    """A box: the bytes from `start` to `stop`, its contents from `contents` on."""

    kind: bytes
    start: int
    contents: int
    stop: int


Rule: TypeAlias = Callable[[Source, Box], Iterator[Edit]]
"""What is done about a box of some kind."""


def boxes(source: Source, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that fill `start` to `stop`. Raises `Uncleanable` when they do not."""
    while stop - start >= 8:
        size, kind = source.integer(start, 4), source.read(start + 4, 4)
        contents = start + 8
        if size == 1:
            size = source.integer(contents, 8)
            contents += 8
        box = Box(kind, start, contents, start + size if size else stop)
        if not contents <= box.stop <= stop:
            raise Uncleanable("a box of the file is longer than what it is in, or too short")
        yield box
        start = box.stop
    # QuickTime closes some lists with a size of zero in four bytes.
    if start > stop or any(source.read(start, stop - start)):
        raise Uncleanable("the file has bytes that are in no box")


def only(source: Source, box: Box, kind: bytes) -> Box:
    """Return the box of `kind` in `box`. Raises `Uncleanable` unless there is exactly one."""
    found = [part for part in boxes(source, box.contents, box.stop) if part.kind == kind]
    if len(found) != 1:
        raise Uncleanable(f"the file has a box with {len(found)} boxes {kind.decode()!r} in it")
    return found[0]


def is_within(start: int, stop: int, homes: Sequence[Box]) -> bool:
    """Whether one of `homes`, which are in order, contains bytes `start` to `stop`."""
    at = bisect_right(homes, start, key=lambda home: home.contents) - 1
    return at >= 0 and stop <= homes[at].stop


def keep(_source: Source, _box: Box) -> Iterator[Edit]:
    """Leave the box as it is."""
    return iter(())


def keeping(kinds: str) -> dict[bytes, Rule]:
    """Return the rules that leave boxes of `kinds`, with blanks between them, as they are."""
    return dict.fromkeys(kinds.encode().split(), keep)


def blank(_source: Source, box: Box) -> Iterator[Edit]:
    """Make the box a free one with nothing in it (ISO/IEC 14496-12 §8.1.2)."""
    if box.kind not in _FREE:
        yield Edit(box.start + 4, box.start + 8, b"free")
    yield from zeros(box.contents, box.stop)


def apply(
    source: Source, start: int, stop: int, rules: Mapping[bytes, Rule], default: Rule = blank
) -> Iterator[Edit]:
    """Yield what `rules` say of each box from `start` to `stop`, and `default` of all others.

    Raises `Uncleanable`.
    """
    for box in boxes(source, start, stop):
        yield from rules.get(box.kind, default)(source, box)


def within(rules: Mapping[bytes, Rule]) -> Rule:
    """Return the rule for a box of boxes: `rules`, and `blank` for all others."""

    def rule(source: Source, box: Box) -> Iterator[Edit]:
        return apply(source, box.contents, box.stop, rules)

    return rule


def overwrite(box: Box, offset: int, count: int) -> Iterator[Edit]:
    """Put zeros over `count` bytes of the contents. Raises `Uncleanable` when there are fewer."""
    start = box.contents + offset
    if start + count > box.stop:
        raise Uncleanable(f"the file has too short a box {box.kind.decode('latin-1')!r}")
    return zeros(start, start + count)


def handler(_source: Source, box: Box) -> Iterator[Edit]:
    """Clear the names of the maker and of the handler in `hdlr` (§8.4.3), not its type."""
    return zeros(box.contents + 12, box.stop)


def _data_references(source: Source, box: Box) -> Iterator[Edit]:
    """Clear what `dref` (§8.7.2) says beside that the data are in this file.

    QuickTime's may still name the disk and the folder in which the file was made.
    """
    for reference in boxes(source, box.contents + 8, box.stop):
        if not source.integer(reference.contents, 4) & _SELF_CONTAINED:
            raise Uncleanable("the file refers to another file")
        yield from zeros(reference.contents + 4, reference.stop)


DATA_INFORMATION: Final = within({b"dref": _data_references})
"""The rule for `dinf` (§8.7.1)."""
