"""Following the log: what has changed, to those who are connected, as it is committed.

PostgreSQL's notifications only wake the one reader of a process; the table tells what there is
(contract §2, docs/decisions/0012-live.md).
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

from chatterd import metrics
from chatterd.database import Database, Line, Statement
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.events import PAGE_LIMIT, Batch, Kept, Position, event_of, position_of
from chatterd.models import log_after, log_end

logger = logging.getLogger(__name__)

SILENCE_SECONDS: Final = 15.0
"""After so long without an event, a subscriber is to say something, or proxies hang up."""

# What the table may hold that no notification has told of: one that was lost, or the end of a
# connection that nobody has noticed.
_CHECK_SECONDS: Final = 15.0
_TICK_SECONDS: Final = 1.0
# A client that takes nothing for so long has gone, or will not miss its connection.
_STUCK_SECONDS: Final = 30.0
_BACKOFF_SECONDS: Final = (0.05, 2.0)
# After a delivery the reader rests for some times as long as it took, so that posting goes on
# beside many subscribers: what is committed meanwhile goes out together.
_REST_FACTOR: Final = 20.0
_REST_MAX_SECONDS: Final = 0.1

_LOG_END: Final = Statement(log_end())
_LOG_AFTER: Final = Statement(log_after(PAGE_LIMIT))


class StreamEnd(Exception):  # noqa: N818 - no fault: it is over
    """A subscription has ended: the server stops, the client has left or is too far behind."""


class Subscription:
    """Somebody who follows the log, from `start` on."""

    def __init__(self, live: "Live") -> None:
        self._live = live
        self._waiter: asyncio.Future[None] | None = None
        self._is_caught_up = False
        self._is_ended = False
        self._is_reset = False
        self._kept: Kept | None = None
        self._silent_since = 0.0
        self._stuck_at: float | None = None
        self._cut: asyncio.Timeout | None = None
        self.position: Position | None = None
        """What has been handed out up to here; None before the start."""
        self.push: Callable[[Batch], bool] | None = None
        """Hands a batch over without waiting, if the client has taken all before; tells whether."""

    async def start(self, cursor: str | None) -> Position:
        """Begin behind `cursor`, or now; return where.

        A cursor that cannot be resumed makes the first batch a reset. Raises `StreamEnd`,
        `DatabaseUnavailable`.
        """
        self._kept = kept = await self._live.fresh()
        self.position = kept.end
        if cursor is not None:
            asked = position_of(cursor)
            if asked is None or asked.log != kept.log or asked.seq > kept.seq:
                self._is_reset = True
            else:
                self.position = asked
        return self.position

    async def take(self) -> Batch | None:
        """Return the next batch; None when there was none for `SILENCE_SECONDS`.

        Before the start there is none. Raises `StreamEnd`, `DatabaseUnavailable` while it is
        behind.
        """
        self._silent_since = self._live.time()
        while not self._is_ended:
            batch = None if self.position is None else await self._next(self.position)
            if batch is not None:
                if batch.events:
                    self.position = Position(batch.log, batch.events[-1].seq)
                    metrics.EVENTS_DELIVERED.count += len(batch.events)
                return batch
            self._waiter = self._live.waiter()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if self._live.time() >= self._silent_since + SILENCE_SECONDS:
                return None
        raise StreamEnd

    async def _next(self, position: Position) -> Batch | None:
        kept = self._live.kept
        if self._is_reset or kept is None or kept is not self._kept:
            self._is_reset = False
            self.position = await self.start(None)
            return Batch(self.position.log, (), is_reset=True)
        if position.seq >= kept.start:
            self._is_caught_up = True
            return kept.after(position.seq)
        if self._is_caught_up:
            raise StreamEnd  # it was too slow; it may come back with its cursor
        start = kept.start
        batch = await self._live.changes(position, PAGE_LIMIT)
        if batch.is_reset:
            self._is_reset = True
        elif batch.events:
            return batch
        else:
            # There is nothing in between, and will not be: numbers only grow.
            self.position = position = position._replace(seq=start)
        return await self._next(position)

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Be cut while the context lasts if the client takes nothing; raises `StreamEnd` then."""
        try:
            async with asyncio.timeout(None) as self._cut:
                yield
        except TimeoutError:
            raise StreamEnd from None
        finally:
            self._cut = None

    def begin_sending(self) -> None:
        """Take note that something is handed to the client from now on."""
        self._stuck_at = self._live.time() + _STUCK_SECONDS

    def end_sending(self) -> None:
        """Take note that the client has room for it."""
        self._stuck_at = None

    def end(self) -> None:
        """Let `take` raise `StreamEnd`."""
        self._is_ended = True
        self.wake()

    def offer(self, kept: Kept) -> None:
        """Hand out what has been read: at once where that is possible, else through `take`.

        To wake a task for each subscriber would take half as long again.
        """
        is_waiting = self._waiter is not None and not self._waiter.done()
        if self.push is not None and is_waiting and self._is_caught_up and kept is self._kept:
            assert self.position is not None
            while (batch := kept.after(self.position.seq)) is not None and self.push(batch):
                self.position = Position(batch.log, batch.events[-1].seq)
                metrics.EVENTS_DELIVERED.count += len(batch.events)
                self._silent_since = self._live.time()
            if self.position.seq == kept.seq:
                return
        self.wake()

    def wake(self) -> None:
        """Let `take` look."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def tick(self, now: float, kept: Kept | None) -> None:
        """Look whether it has been silent, or stuck, for too long."""
        if self._waiter is not None:
            if now >= self._silent_since + SILENCE_SECONDS:
                self.wake()
        elif self._stuck_at is not None and self._cut is not None:
            is_behind = (
                self._is_caught_up
                and kept is not None
                and self.position is not None
                and self.position.seq < kept.start
            )
            if is_behind or now >= self._stuck_at:
                self._cut.reschedule(now)


class Live:
    """The log's reader in this process, and its subscribers, at most `max_subscribers`.

    It reads while there are any. `stopping` ends them all.
    """

    def __init__(self, database: Database, max_subscribers: int, stopping: asyncio.Event) -> None:
        self._database = database
        self._max_subscribers = max_subscribers
        self._stopping = stopping
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._line = Line(database, channel="chatts", on_notice=self._changed.set)
        self._subscribers: set[Subscription] = set()
        self._asking: list[asyncio.Future[Kept]] = []
        self._tasks = [asyncio.create_task(work()) for work in (self._follow, self._stop)]
        self._offered_since: float | None = None
        self.kept: Kept | None = None
        """What was read last. Another one does not continue what was handed out before."""
        self.time = self._loop.time

    @contextmanager
    def subscribed(self) -> Iterator[Subscription]:
        """Have a place among the subscribers; raises `Problem` 503 when there is none."""
        if len(self._subscribers) >= self._max_subscribers or self._stopping.is_set():
            raise Problem(
                "too-many-subscribers",
                "Too many are connected at the moment; try again in a moment.",
                {"Retry-After": str(random.randint(1, 5))},  # noqa: S311 - no secret
            )
        subscription = Subscription(self)
        self._subscribers.add(subscription)
        try:
            yield subscription
        finally:
            self._subscribers.discard(subscription)

    @property
    def subscribers(self) -> int:
        """How many there are."""
        return len(self._subscribers)

    @property
    def is_stopping(self) -> bool:
        """Whether the server is about to end."""
        return self._stopping.is_set()

    async def fresh(self) -> Kept:
        """Return what is kept, read to the end of the log at a moment after the call.

        Raises `DatabaseUnavailable`.
        """
        asking: asyncio.Future[Kept] = self._loop.create_future()
        self._asking.append(asking)
        self._changed.set()
        return await asking

    async def changes(self, position: Position | None, limit: int) -> Batch:
        """Return the first events after `position`; a reset where they cannot be told.

        Raises `DatabaseUnavailable`.
        """
        async with self._database.transaction() as session:
            seq = 0 if position is None else position.seq
            rows = (await session.execute(log_after(limit), {"seq": seq})).all()
            head = rows[0]
            log = f"{head.epoch.hex}.{head.table}"
            if position is not None and position.log == log and position.seq <= head.last_seq:
                events = [event_of(row) for row in rows if row.seq is not None]
                return Batch(log, events)
        return Batch(log, (), is_reset=True)

    def waiter(self) -> "asyncio.Future[None]":
        """Return what `Subscription.wake` ends."""
        return self._loop.create_future()

    async def aclose(self) -> None:
        """End every subscription and give the connection back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end_all()
        await self._line.aclose()

    async def _stop(self) -> None:
        await self._stopping.wait()
        self._end_all()

    def _end_all(self) -> None:
        for subscription in self._subscribers:
            subscription.end()

    async def _follow(self) -> None:
        """Read whenever there is something to read, for ever."""
        checked = ticked = 0.0
        pause, longest = _BACKOFF_SECONDS
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._changed.wait()
            now = self.time()
            if now >= ticked + _TICK_SECONDS:
                ticked = now
                for subscription in self._subscribers:
                    subscription.tick(now, self.kept)
            if not self._subscribers and not self._asking:
                self.kept = None  # what comes now, nobody will have seen
                self._changed.clear()
            elif self._changed.is_set() or now >= checked + _CHECK_SECONDS:
                self._changed.clear()
                checked = now
                if await self._read_and_tell():
                    pause = _BACKOFF_SECONDS[0]
                    await self._rest()
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
                    self._changed.set()

    async def _read_and_tell(self) -> bool:
        """Read to the end of the log; tell whether the database was there."""
        asking, self._asking = self._asking, []
        try:
            kept = await self._read()
        except Exception as error:
            if not isinstance(error, DatabaseUnavailable):
                logger.exception("The log cannot be followed")
            # Those who came meanwhile, too, or a database that hangs would be waited for twice.
            asking, self._asking = asking + self._asking, []
            for future in asking:
                if not future.done():
                    future.set_exception(error)
            return False
        for future in asking:
            if not future.done():  # else cancelled
                future.set_result(kept)
        return True

    async def _read(self) -> Kept:
        while self.kept is not None:
            rows = await self._line.fetch(_LOG_AFTER, seq=self.kept.seq)
            head = rows[0] if rows else None
            if (
                head is None
                or f"{head['epoch'].hex}.{head['table']}" != self.kept.log
                or head["last_seq"] < self.kept.seq
            ):
                break
            if head["seq"] is not None:
                metrics.EVENTS_READ.count += len(rows)
                self.kept.extend([event_of(row) for row in rows])
                self._offer_all(self.kept)
            if head["seq"] is None or len(rows) < PAGE_LIMIT:
                return self.kept
        return await self._begin()

    async def _begin(self) -> Kept:
        """Begin at the end of the log; who follows another learns of it by a reset."""
        rows = await self._line.fetch(_LOG_END)
        if not rows:  # as within a restore
            raise DatabaseUnavailable
        end = Position(f"{rows[0]['epoch'].hex}.{rows[0]['table']}", rows[0]["newest"])
        self.kept = Kept(end)
        self._offer_all(self.kept)
        return self.kept

    def _offer_all(self, kept: Kept) -> None:
        self._offered_since = self.time()
        for subscription in self._subscribers:
            subscription.offer(kept)

    async def _rest(self) -> None:
        """Let the subscribers go that have been woken, then all others."""
        if self._offered_since is not None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            took = self.time() - self._offered_since
            self._offered_since = None
            await asyncio.sleep(min(_REST_FACTOR * took, _REST_MAX_SECONDS))
