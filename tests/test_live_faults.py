"""What happens reaches everybody who follows it: once, in order, whatever is cut meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import pytest

from tests.live import FOLLOWS, Batch, Cut, connect, post, shown
from tests.multipart import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import StartServer
    from tests.live import Follow, Line
    from tests.multipart import Connection

WRITERS, POSTS_EACH, DELETES_EACH = 8, 2_500, 63
# How many follow in which way, and how many changes they miss after each cut: with thousands they
# are behind what a server keeps.
READERS = [
    *(8 * [("stream", 0)]),
    *(2 * [("stream", 6_000)]),
    *(2 * [("poll", 0)]),
    ("websocket", 0),
    ("websocket", 6_000),
]
# Where the readers' connections are cut.
MOST_BYTES, LONGEST_SECONDS = 400_000, 3.0
DEADLINE_SECONDS = 200
SEED = 20261121

# Every change that is ever committed. The table itself has only the last one of each chatt.
HISTORY = """
    CREATE TABLE history (
        seq bigint, id uuid, deleted boolean, time timestamptz DEFAULT clock_timestamp()
    );
    CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO history VALUES (NEW.seq, NEW.id, NEW.deleted);
        RETURN NULL;
    END $$;
    CREATE TRIGGER remember AFTER INSERT OR UPDATE ON chatts
        FOR EACH ROW EXECUTE FUNCTION remember();
"""


class Arrival(NamedTuple):
    """A batch, and when it came, by the clock on the wall."""

    time: float
    batch: Batch


class Log:
    """How many changes there are by now."""

    def __init__(self) -> None:
        self._length = 0
        self._is_complete = False
        self._changed = asyncio.Condition()

    async def grow(self) -> None:
        async with self._changed:
            self._length += 1
            self._changed.notify_all()

    async def complete(self) -> None:
        async with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    async def grown_by(self, count: int) -> None:
        """Wait for so many further changes, or for the last."""
        goal = self._length + count
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_complete or self._length >= goal)


class Reader:
    """Follows now one server, now the other; is cut, and goes on with the last cursor it has."""

    def __init__(
        self, kind: str, missed: int, urls: Sequence[str], log: Log, chance: random.Random
    ) -> None:
        self.kind = kind
        self._missed = missed
        self._log = log
        self._follow: Follow = FOLLOWS[kind]
        self._urls = urls
        self._chance = chance
        self._cursor: str | None = None
        self.arrivals: list[Arrival] = []
        self.cuts = 0
        self.begun = asyncio.Event()

    async def run(self) -> None:
        while True:
            # The first may end only when it knows where it has begun.
            limit = self._chance.randrange(MOST_BYTES) if self._cursor else MOST_BYTES
            seconds = self._chance.random() * LONGEST_SECONDS if self._cursor else None
            with suppress(Cut, TimeoutError):
                async with (
                    asyncio.timeout(seconds),
                    connect(self._chance.choice(self._urls), limit=limit) as line,
                    aclosing(self._follow(line, self._cursor)) as batches,
                ):
                    async for batch in batches:
                        self._take(batch)
            self.cuts += 1
            await self._log.grown_by(self._missed)

    def _take(self, batch: Batch) -> None:
        self._cursor = batch.cursor
        self.begun.set()
        if batch.changes:
            self.arrivals.append(Arrival(time.time(), batch))

    def has(self, chatt_id: str) -> bool:
        """Tell whether this chatt is the last that came."""
        return bool(self.arrivals) and any(
            change.data["id"] == chatt_id for change in self.arrivals[-1].batch.changes
        )


def all_have(readers: Sequence[Reader], chatt_id: str) -> bool:
    return all(reader.has(chatt_id) for reader in readers)


class Writer:
    """Posts to both servers, and deletes some of it, now at once and now later."""

    def __init__(self, number: int, log: Log) -> None:
        self._number = number
        self._log = log
        self._chance = random.Random(SEED + number)  # noqa: S311 - no secret
        self._posted: list[tuple[str, str]] = []

    async def write(self, urls: Sequence[str]) -> None:
        deletes = set(self._chance.sample(range(POSTS_EACH), DELETES_EACH))
        async with AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(connect(url)) for url in urls]
            for number in range(POSTS_EACH):
                chatt_id, token = await post(self._chance.choice(lines), f"{self._number} {number}")
                self._posted.append((chatt_id, token))
                await self._log.grow()
                if number in deletes:
                    await self._delete_one(self._chance.choice(lines))

    async def _delete_one(self, line: Line) -> None:
        newest = len(self._posted) - 1
        index = self._chance.choice([newest, self._chance.randint(0, newest)])
        chatt_id, token = self._posted.pop(index)
        answer = await line.ask("DELETE", f"/v1/chatts/{chatt_id}", Chatterd_Delete_Token=token)
        assert answer.status == 204, answer
        await self._log.grow()


@pytest.mark.timeout(240)  # it takes 40 s, and a busy machine is slower
async def test_readers_that_are_cut_at_any_moment_get_every_change_once_in_commit_order(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(HISTORY)
    urls = [start_server(DATABASE_URL=own_database).url for _ in range(2)]
    chance = random.Random(SEED)  # noqa: S311 - no secret
    log = Log()
    readers = [
        Reader(kind, missed, urls, log, random.Random(chance.random()))  # noqa: S311 - no secret
        for kind, missed in READERS
    ]
    with anyio.fail_after(DEADLINE_SECONDS):
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(reader.run()) for reader in readers]
            for reader in readers:
                await reader.begun.wait()
            await asyncio.gather(*(Writer(number, log).write(urls) for number in range(WRITERS)))
            await log.complete()
            # What comes twice comes before the last word.
            for url in urls:
                async with connect(url) as line:
                    last, _ = await post(line, "the last word")
                await until(partial(all_have, readers, last))
            for task in reading:
                task.cancel()
    history = await History.read(psql)
    assert len(history.places) == WRITERS * (POSTS_EACH + DELETES_EACH) + len(urls)
    for reader in readers:
        assert reader.cuts > 1
        history.check(reader)


class History:
    """Every change in the order of its commit, and what is left in the end."""

    def __init__(self, changes: Sequence[Any], left: dict[str, Any]) -> None:
        kinds = ("chatt", "delete")
        self._changes = [(kinds[row["deleted"]], str(row["id"])) for row in changes]
        self._times = [row["time"].timestamp() for row in changes]
        self.places = {change: place for place, change in enumerate(self._changes)}
        self._left = left

    @classmethod
    async def read(cls, psql: Connection) -> History:
        changes = await psql.fetch("SELECT seq, id, deleted, time FROM history ORDER BY seq")
        return cls(changes, await shown(psql))

    def check(self, reader: Reader) -> None:
        """Check that nothing is missing, nothing came twice, and all came in order."""
        following = 0
        left: dict[str, object] = {}
        for came, batch in reader.arrivals:
            for place, change in self._in_order(batch):
                assert place >= following, (reader.kind, "again, or too late", change.kind, place)
                for passed in range(following, place):
                    self._check_passed_over(passed, came)
                following = place + 1
                if change.kind == "chatt":
                    left[change.data["id"]] = change.data
                else:
                    left.pop(change.data["id"], None)
        assert following == len(self._changes), (reader.kind, following)
        assert left == self._left

    def _in_order(self, batch: Batch) -> list[tuple[int, Any]]:
        """Return the changes with their places; a long poll has those of each kind in order."""
        found = [(self.places[change.kind, change.data["id"]], change) for change in batch.changes]
        for kind in ("chatt", "delete"):
            places = [place for place, change in found if change.kind == kind]
            assert places == sorted(places)
        return sorted(found, key=lambda pair: pair[0])

    def _check_passed_over(self, place: int, came: float) -> None:
        """Check that a chatt that never came had been deleted by the time the next one came."""
        kind, chatt_id = self._changes[place]
        deleted = self.places.get(("delete", chatt_id), -1)
        assert kind == "chatt", ("a delete never came", place)
        assert deleted > place, ("a chatt never came", place)
        assert self._times[deleted] < came, ("a chatt did not come before it was deleted", place)
