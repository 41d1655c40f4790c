"""What happened, in commit order: events, the places among them, and the newest ones in memory."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from chatterd.chatts import StoredChatt

T = TypeVar("T")

PAGE_LIMIT: Final = 500
"""How many events are read from the table at once."""

# What is kept for those who are a little behind; who is further behind is cut, and resumes.
_KEPT_EVENTS: Final = 5_000
_KEPT_SIZE: Final = 8 * 1024 * 1024
_BATCH_SIZE: Final = 128 * 1024
_EVENT_OVERHEAD: Final = 400

# Addresses differ by the host that a request names, and strangers choose that.
_ENCODED_MAX: Final = 8

_CURSOR: Final = re.compile(r"([0-9a-f]{32}\.[0-9]{1,10})\.([0-9]{1,18})")


class Event(NamedTuple):
    """A chatt that was posted or changed, or one that was deleted."""

    seq: int
    is_deleted: bool
    chatt: StoredChatt

    @property
    def size(self) -> int:
        """Bytes that it takes on the wire, about."""
        return len(self.chatt.name) + len(self.chatt.message) + _EVENT_OVERHEAD


_pack: Final = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder(list[Event]).decode


class Batch:
    """Events in commit order: as many of the first as go out at once.

    With `is_reset` there are none: what happened cannot be told, and the feed is to be read anew.
    Subscribers at the same place share one, and what was made of it.
    """

    __slots__ = ("_encoded", "events", "is_reset", "log")

    def __init__(self, log: str, events: Sequence[Event], *, is_reset: bool = False) -> None:
        self.log = log
        self.events = _beginning(events)
        self.is_reset = is_reset
        self._encoded: dict[tuple[object, str], Any] = {}

    def encoded(self, media_url: str, encode: "Callable[[Batch, str], T]") -> T:
        """Return what `encode` makes of this, once for each address."""
        found: T | None = self._encoded.get((encode, media_url))
        if found is None:
            if len(self._encoded) >= _ENCODED_MAX:
                self._encoded.clear()
            found = self._encoded[encode, media_url] = encode(self, media_url)
        return found

    def cursor_of(self, event: Event) -> str:
        """Return the cursor behind one of the events."""
        return f"{self.log}.{event.seq}"


class Position(NamedTuple):
    """A place in a log: `log` is the feed's epoch and table, `seq` the last number before it."""

    log: str
    seq: int

    def __str__(self) -> str:
        return f"{self.log}.{self.seq}"


def position_of(cursor: str) -> Position | None:
    """Return the place that a cursor names; None for what is no cursor of ours."""
    match = _CURSOR.fullmatch(cursor)
    return Position(match[1], int(match[2])) if match else None


class _Run(NamedTuple):
    """Events that were read together: the number of the last, how many there are, their bytes."""

    seq: int
    length: int
    packed: bytes


class Kept:
    """The newest events, which all subscribers share, after the number `start`.

    They are packed, for hardly anybody asks for them again: as objects they would lie among those
    that requests make and drop all the time, and slow down everything that the process does.
    """

    def __init__(self, end: Position) -> None:
        self.log = end.log
        self.start = self.seq = end.seq
        self._runs: list[_Run] = []
        self._count = 0
        self._size = 0
        self._batches: dict[int, Batch] = {}

    @property
    def end(self) -> Position:
        """The place behind the last event."""
        return Position(self.log, self.seq)

    def extend(self, events: Sequence[Event]) -> None:
        """Add the events that follow; the oldest go when there are too many.

        These stay in any case: those who have all before are yet to get them.
        """
        self._batches = {self.seq: Batch(self.log, events)}  # nothing to unpack
        self.seq = events[-1].seq
        self._runs.append(_Run(self.seq, len(events), _pack(events)))
        self._count += len(events)
        self._size += len(self._runs[-1].packed)
        while len(self._runs) > 1 and (self._count > _KEPT_EVENTS or self._size > _KEPT_SIZE):
            oldest = self._runs.pop(0)
            self.start = oldest.seq
            self._count -= oldest.length
            self._size -= len(oldest.packed)

    def after(self, seq: int) -> Batch | None:
        """Return the events after `seq`, or the first of them where they are many."""
        if seq >= self.seq:
            return None
        batch = self._batches.get(seq)
        if batch is None:
            batch = self._batches[seq] = Batch(self.log, self._unpacked(seq))
        return batch

    def _unpacked(self, seq: int) -> Sequence[Event]:
        events: list[Event] = []
        for run in self._runs[bisect_right(self._runs, seq, key=lambda run: run.seq) :]:
            events += [event for event in _unpack(run.packed) if event.seq > seq]
            if len(events) >= PAGE_LIMIT:
                break
        return events


def event_of(row: Any) -> Event:  # noqa: ANN401 - SQLAlchemy's row or asyncpg's record
    """Return the event of a row of `models.log_after`."""
    values = tuple(row)
    return Event(values[3], values[4], StoredChatt.of(values))


def _beginning(events: Sequence[Event]) -> Sequence[Event]:
    """Return as many of the first events as go out at once."""
    size = 0
    for index, event in enumerate(events):
        size += event.size
        if size > _BATCH_SIZE:
            return events[: index + 1]
    return events
