"""The chatts that every program serves: the same ones in every run."""

import asyncio
import json
import random
import string
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg
from sqlalchemy.engine import URL

_SEED: Final = 441
_FIRST: Final = datetime(2025, 1, 1, microsecond=407672, tzinfo=UTC)
# None on a whole second, whose fraction some programs leave out.
_INTERVAL: Final = timedelta(seconds=7, microseconds=200)
# As people write: mostly ASCII. Nothing that JSON escapes, see `feed_length`.
_LETTERS: Final = string.ascii_lowercase * 4 + " " * 25 + "aeiou" * 9 + "äéñßøжд日本語😀"


class Chatt(NamedTuple):
    """A row of the feed, about 150 bytes of JSON."""

    name: str
    message: str
    id: UUID
    time: datetime


def chatts(count: int) -> Iterator[Chatt]:
    """Yield the first `count` chatts."""
    rng = random.Random(_SEED)
    text = "".join(rng.choices(_LETTERS, k=10_000))
    for number in range(count):
        start = rng.randrange(len(text) - 120)
        yield Chatt(
            name="".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 12))),
            message=text[start : start + rng.randint(20, 120)],
            id=UUID(int=rng.getrandbits(128), version=4),
            time=_FIRST + number * _INTERVAL,
        )


def feed(count: int) -> bytes:
    """Return what GET /getchatts answers with `count` chatts (contract §1)."""
    rows = [
        (chatt.name, chatt.message, str(chatt.id), f"{chatt.time:%Y-%m-%dT%H:%M:%S.%fZ}")
        for chatt in chatts(count)
    ]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()


def post_bodies(count: int) -> Iterator[str]:
    """Yield JSON objects as clients post them."""
    for chatt in chatts(count):
        yield json.dumps({"name": chatt.name, "message": chatt.message}, ensure_ascii=False)


def dsn(url: URL) -> str:
    """Return the URL as libpq and asyncpg write it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def execute(url: URL, *statements: str) -> None:
    """Run statements, each in a transaction of its own."""

    async def run() -> None:
        connection = await asyncpg.connect(dsn(url))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


def value(url: URL, statement: str) -> object:
    """Return the one value that a query yields."""

    async def run() -> object:
        connection = await asyncpg.connect(dsn(url))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def fill(url: URL, count: int) -> None:
    """Make the first `count` chatts the only ones in the table, settled and with statistics."""

    async def run() -> None:
        connection = await asyncpg.connect(dsn(url))
        try:
            await connection.execute("TRUNCATE chatts")
            await connection.copy_records_to_table(
                "chatts", records=chatts(count), columns=Chatt._fields
            )
            await connection.execute("VACUUM ANALYZE chatts")
            await connection.execute("CHECKPOINT")
        finally:
            await connection.close()

    asyncio.run(run())


def feed_length(url: URL) -> int:
    """Return the length in bytes of the feed as it is in the database at `url` now.

    Around name and message a row has 76 bytes and, like the feed's two brackets, a comma.
    """
    length = value(
        url, "SELECT 1 + sum(77 + octet_length(name) + octet_length(message))::bigint FROM chatts"
    )
    assert isinstance(length, int)
    return length
