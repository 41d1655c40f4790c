"""The one way out: the feed in memory, checked against the database before each answer.

docs/decisions/0007-feed-in-memory.md says why it is right.
"""

import asyncio
import logging
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from contextvars import Context
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import asyncpg

from chatterd import metrics
from chatterd.blocks import BLOCK_SIZE, Block, Encoded, Row, Snapshot, blocks_of, encode
from chatterd.database import Database, Line, SchemaError, Statement
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.models import (
    feed_changes,
    feed_newest,
    feed_page,
    feed_page_back,
    feed_page_before,
    place_of,
)

logger = logging.getLogger(__name__)

_CHANGES_LIMIT: Final = 1_000
_PAGE_LIMIT: Final = 2_000
_PAGE_SIZE: Final = 1024 * 1024
# Past these, beginning anew with the newest page is quicker than taking in change by change.
_CHANGE_PAGES: Final = 10
_PUT_LIMIT: Final = 500

_NEWEST: Final = Statement(feed_newest(_PAGE_LIMIT, _PAGE_SIZE))
_CHANGES: Final = Statement(feed_changes(_CHANGES_LIMIT))
_PAGE_BEFORE: Final = Statement(feed_page_before(_PAGE_LIMIT, _PAGE_SIZE))

_LAST_TIME: Final = b"9999-12-31T23:59:59.999999Z"
_BEYOND: Final = b"~"  # later than any time


class Feed:
    """Keeps the newest part of the feed, up to `budget` bytes, as one process answers it.

    What it keeps is never served unchecked: `fresh` asks the database for what has changed since,
    by whatever program. Requests that come while a check is under way share the next one, since
    this one may have read before their own post was committed.
    """

    def __init__(self, database: Database, budget: int) -> None:
        self._database = database
        self._budget = budget
        self._line = Line(database)
        self._lock = asyncio.Lock()  # the line carries one statement at a time
        self._asking: list[asyncio.Future[Snapshot]] = []
        self._checking: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._forget()

    def _forget(self) -> None:
        # Epoch, table and connection count: where one differs, nothing known before holds.
        self._identity: tuple[object, ...] = ()
        self._seq = 0
        self._blocks: list[Block] = []
        self._older_than: bytes | None = None
        self._snapshot: Snapshot | None = None

    async def fresh(self) -> Snapshot:
        """Return the feed as it is in the database at a moment after the call.

        Raises `DatabaseUnavailable`.
        """
        asking: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._asking.append(asking)
        if self._checking is None:
            # Its own context: what it logs is about no request in particular.
            work = self._check_while_asked()
            self._checking = asyncio.get_running_loop().create_task(work, context=Context())
        return await asking

    async def older(self, snapshot: Snapshot) -> AsyncIterator[list[Row]]:
        """Yield the rows that `snapshot` leaves to the database, oldest first, in pages.

        No page is empty. Each is a transaction of its own, so that a slow reader holds nothing
        up. Raises `DatabaseUnavailable`.
        """
        if snapshot.older_than is None:
            return
        before = _datetime(snapshot.older_than) if snapshot.blocks else None
        last: tuple[datetime, int] | None = None
        # A row that is updated meanwhile goes behind all others of its time: it may come again.
        given: set[str] = set()
        while True:
            async with self._database.transaction() as session:
                page = feed_page(last, before, _PAGE_LIMIT, _PAGE_SIZE)
                rows = (await session.execute(page)).all()
            if found := [Row(*row[:6]) for row in rows if row.id not in given]:
                yield found
            if rows:
                if last is None or rows[-1].at != last[0]:
                    given = set()
                last = (rows[-1].at, rows[-1].seq)
                given.update(row.id for row in rows if row.at == last[0])
            if _is_last(rows):
                return

    async def page(
        self, limit: int, *, before: UUID | None = None, after: UUID | None = None
    ) -> list[Row]:
        """Return up to `limit` rows before or after a chatt, or the newest, oldest first.

        Raises `Problem` 404 when there is no such chatt, `DatabaseUnavailable`.
        """
        async with self._database.transaction() as session:
            place = None
            if (bound := before or after) is not None:
                place = (await session.execute(place_of(bound))).one_or_none()
                if place is None:
                    raise Problem("chatt-not-found", f"There is no chatt with the id {bound}.")
            if after is not None:
                found = await session.execute(feed_page(place, None, limit))
                return [Row(*row[:6]) for row in found]
            found = await session.execute(feed_page_back(place, limit))
            return [Row(*row[:6]) for row in found][::-1]

    @property
    def size(self) -> int:
        """Bytes of the feed that are kept."""
        return sum(block.size for block in self._blocks)

    async def aclose(self) -> None:
        """End what runs in the background and give the connection back."""
        for task in (self._checking, self._loading):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await self._line.aclose()

    async def _check_while_asked(self) -> None:
        try:
            while self._asking:
                asking, self._asking = self._asking, []
                try:
                    async with self._lock:
                        metrics.FEED_CHECKS.inc()
                        snapshot = await self._check()
                except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                    # Those who came meanwhile, too, or a database that hangs would be waited for
                    # twice.
                    asking, self._asking = asking + self._asking, []
                    for future in asking:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for future in asking:
                        if not future.done():  # else cancelled
                            future.set_result(snapshot)
        finally:
            self._checking = None

    async def _check(self) -> Snapshot:
        """Take in what has changed since the last check; return the feed as it is now."""
        if not self._identity or not await self._continue():
            await self._begin()
        if sum(block.made for block in self._blocks) > self._budget:
            for block in self._blocks:
                block.forget_made()
            self._snapshot = None
        if self._snapshot is None:
            version = f"{self._identity[0]}.{self._identity[1]}.{self._seq}"
            self._snapshot = Snapshot(version, self._blocks, self._older_than)
        return self._snapshot

    async def _continue(self) -> bool:
        """Take in what has changed; tell whether what is kept is the feed as it is now."""
        for _ in range(_CHANGE_PAGES):
            rows = await self._line.fetch(_CHANGES, seq=self._seq)
            if not rows or not self._continues(rows[0]):
                return False
            if rows[0]["seq"] is None:
                return True
            if not self._take_changes(rows):
                return False
            if len(rows) < _CHANGES_LIMIT:
                return True
        return False

    def _continues(self, head: asyncpg.Record) -> bool:
        """Tell whether what is kept is an earlier state of the feed that `head` describes."""
        identity = (head["epoch"].hex, head["table"], self._line.connects)
        return identity == self._identity and head["last_seq"] >= self._seq

    async def _begin(self) -> None:
        """Begin anew, with the newest page; older ones are loaded in the background."""
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None
        self._forget()
        records = await self._line.fetch(_NEWEST)
        if not records:  # as within a restore
            raise self._database.unavailable(
                SchemaError("The table feed has no row."), maybe_committed=False
            )
        state = records[0]
        self._seq = state["newest"]
        self._keep_page([record for record in records if record["id"]])
        self._identity = (state["epoch"].hex, state["table"], self._line.connects)
        if self._older_than is not None:
            self._loading = asyncio.create_task(self._load_older())

    async def _load_older(self) -> None:
        identity = self._identity
        try:
            more = True
            # Close to the budget a further page would only be trimmed again.
            while more and self.size < 0.9 * self._budget:
                async with self._lock:
                    if self._identity != identity:
                        return
                    more = await self._load_page()
        except DatabaseUnavailable:
            return  # the next check begins anew, on another connection

    async def _load_page(self) -> bool:
        """Put the page before the oldest row kept in front; tell whether there may be more."""
        assert self._older_than is not None
        # Rows may be newer than `_seq`; they come again as changes.
        found = await self._line.fetch(_PAGE_BEFORE, time=_datetime(self._older_than))
        return self._keep_page(found)

    def _keep_page(self, newest_first: Sequence[asyncpg.Record]) -> bool:
        """Put a page in front of what is kept; tell whether there may be more."""
        self._snapshot = None
        rows = [Row(*(record[name] for name in Row._fields)) for record in reversed(newest_first)]
        if _is_last(newest_first):
            self._older_than = None
        else:
            # Of equal times all must be kept, or none: the page may have cut between them.
            cut = rows[0].time
            rows = [row for row in rows if row.time != cut]
            if not rows:
                self._older_than = self._older_than or _behind(cut.encode())
                return False
            self._older_than = rows[0].time.encode()
        page = list(map(encode, rows))
        if self._blocks and len(self._blocks[0].data) < BLOCK_SIZE:
            self._blocks[0] = self._blocks[0].spliced(0, 0, page)
        else:
            self._blocks[:0] = blocks_of(page)
        self._trim()
        return self._older_than is not None

    def _take_changes(self, records: Sequence[asyncpg.Record]) -> bool:
        """Put changed rows, which come in the order of seq, to their places.

        Tell whether it was done: it is not where that would take long.
        """
        self._snapshot = None
        appended: list[Encoded] = []
        newest = self._newest()
        puts = 0
        for record in records:
            row = Row(*tuple(record)[5:])
            time = row.time.encode()
            if self._older_than is not None and time < self._older_than:
                continue  # the database has it
            if time <= newest:
                puts += 1
                if puts > _PUT_LIMIT:
                    return False
                self._append(appended)
                appended = []
                self._remove(row.id.encode(), time)
                if not record["deleted"]:
                    self._put(time, encode(row))
                newest = self._newest()
            elif not record["deleted"]:
                appended.append(encode(row))
                newest = time
        self._append(appended)
        self._seq = records[-1]["seq"]
        self._trim()
        return True

    def _newest(self) -> bytes:
        """Return the time of the last row kept; where there is none, one before all."""
        return self._blocks[-1].last_time if self._blocks else b""

    def _append(self, rows: Sequence[Encoded]) -> None:
        room = BLOCK_SIZE - len(self._blocks[-1].data) if self._blocks else 0
        count = 0
        while count < len(rows) and room > 0:
            room -= len(rows[count][0])
            count += 1
        if count:
            last = self._blocks[-1]
            self._blocks[-1] = last.spliced(len(last), len(last), rows[:count])
        self._blocks.extend(blocks_of(rows[count:]))

    def _put(self, time: bytes, new: Encoded) -> None:
        """Insert a row behind all others of its time: its seq is newer than theirs."""
        if not self._blocks:
            self._blocks.extend(blocks_of([new]))
            return
        place = max(bisect_right(self._blocks, time, key=lambda block: block.first_time) - 1, 0)
        index = self._blocks[place].after(time)
        self._splice(place, index, index, [new])

    def _remove(self, row_id: bytes, time: bytes) -> None:
        place = bisect_left(self._blocks, time, key=lambda block: block.last_time)
        while place < len(self._blocks) and self._blocks[place].first_time <= time:
            index = self._blocks[place].find(row_id, time)
            if index is not None:
                self._splice(place, index, index + 1, [])
                return
            place += 1

    def _splice(self, place: int, start: int, stop: int, rows: Sequence[Encoded]) -> None:
        """Put `rows` in place of some of one block's."""
        block = self._blocks[place]
        if len(block) + len(rows) == stop - start:
            del self._blocks[place]
            return
        block = block.spliced(start, stop, rows)
        is_small = len(block.data) <= 2 * BLOCK_SIZE
        self._blocks[place : place + 1] = [block] if is_small else blocks_of(block.rows())

    def _trim(self) -> None:
        """Leave the oldest rows to the database until the rest fits the budget."""
        while len(self._blocks) > 1 and self.size > self._budget:
            time = self._blocks.pop(0).last_time
            # Of equal times all must be kept, or none.
            while self._blocks and self._blocks[0].first_time == time:
                self._splice(0, 0, self._blocks[0].after(time), [])
            self._older_than = self._blocks[0].first_time if self._blocks else _behind(time)


def _is_last(page: Sequence[Any]) -> bool:
    """Tell whether there are no rows behind those of a page, which may be limited by its size."""
    # The last column is the bytes that were read up to there.
    return len(page) < _PAGE_LIMIT and (not page or page[-1][-1] < _PAGE_SIZE)


def _datetime(time: bytes) -> datetime:
    return datetime.fromisoformat(time.decode())


def _behind(time: bytes) -> bytes:
    """Return the time that follows `time`."""
    if time == _LAST_TIME:
        return _BEYOND
    later = _datetime(time) + timedelta(microseconds=1)
    return later.isoformat(timespec="microseconds").replace("+00:00", "Z").encode()
