"""Takes out of pictures and videos what they tell about people: place, time, device, author.

Nothing is encoded anew. Each module walks through the files of one family by its specification
and says which bytes must change. What is kept is listed, everything else goes; a file that cannot
be understood is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Final

from chatterd.metadata import gif, heif, jpeg, mp4, png, webm, webp
from chatterd.metadata.source import Edit, Source, Uncleanable

__all__ = ["Edit", "Source", "Uncleanable", "clean", "clean_beginning", "edits"]

_EDITS_MAX: Final = 10_000

_WALKERS: Final[Mapping[str, Callable[[Source], Iterator[Edit]]]] = {
    "image/jpeg": jpeg.edits,
    "image/png": png.edits,
    "image/gif": gif.edits,
    "image/webp": webp.edits,
    "image/heic": heif.edits,
    "image/heif": heif.edits,
    "video/mp4": mp4.edits,
    "video/quicktime": mp4.edits,
    "video/webm": webm.edits,
}

# Formats in which what a part means does not depend on what comes later.
_IN_ORDER: Final = frozenset({"image/jpeg", "image/png", "image/gif"})


def clean(path: Path, media_type: str) -> bool:
    """Clean the file at `path`, which is of `media_type`, one of those in `chatterd.media`.

    Tells whether it was changed. It is not synced. A copy, where one is needed, lies beside it
    meanwhile.

    Raises `Uncleanable` before anything is changed, and `OSError`, after which the file may be
    cleaned in parts.
    """
    with path.open("r+b") as file:
        source = Source(file)
        changes = edits(source, media_type)
        if any(_moves_what_follows(edit, source.size) for edit in changes):
            _rewrite(path, source, changes)
            return True
        for edit in changes:
            file.seek(edit.start)
            file.write(edit.replacement)
            if edit.stop == source.size:
                file.truncate()
        return bool(changes)


def clean_beginning(data: bytes, media_type: str) -> bytes:
    """Return the first bytes of a file of `media_type` without what can be seen to go by now.

    The whole file is for `clean` all the same, which seldom has to move the rest of it then:
    cameras write what tells of people in front of the picture.
    """
    if media_type not in _IN_ORDER:
        return data
    source = Source(data)
    changes: list[Edit] = []
    with suppress(Uncleanable):  # at the latest where `data` ends
        changes.extend(islice(_WALKERS[media_type](source), _EDITS_MAX))
    return b"".join(_pieces(source, changes))


def edits(source: Source, media_type: str) -> list[Edit]:
    """Return the changes that clean a file of `media_type`: in order, none overlapping another.

    A cleaned file needs none. Raises `Uncleanable`.
    """
    changes = list(islice(_WALKERS[media_type](source), _EDITS_MAX + 1))
    if len(changes) > _EDITS_MAX:
        raise Uncleanable("the file has too many parts")
    changes.sort(key=lambda edit: (edit.start, edit.stop))
    if any(first.stop > second.start for first, second in pairwise(changes)):
        raise Uncleanable("parts of the file overlap")
    return [edit for edit in changes if not source.has(edit)]


def _moves_what_follows(edit: Edit, size: int) -> bool:
    return len(edit.replacement) != edit.stop - edit.start and edit.stop != size


def _pieces(source: Source, changes: list[Edit]) -> Iterator[bytes | memoryview]:
    """Yield what `changes`, which are in order, make of a file."""
    kept_from = 0
    for edit in (*changes, Edit(source.size, source.size)):
        for _, window in source.windows(kept_from, edit.start):
            yield window
        yield edit.replacement
        kept_from = edit.stop


def _rewrite(path: Path, source: Source, changes: list[Edit]) -> None:
    copy = path.with_name(path.name + ".clean")
    with copy.open("xb") as target:
        try:
            target.writelines(_pieces(source, changes))
            target.flush()
            copy.replace(path)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
