"""The one way out: every chatt, oldest first, as JSON."""

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Final

from chatterd.database import Database
from chatterd.models import feed_page
from chatterd.schemas import Row

_PAGE_SIZE: Final = 1000


class Feed:
    """Reads the table in pages, so that neither memory nor a transaction grows with it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def json(self, row_json: Callable[[Row], bytes]) -> AsyncIterator[bytes]:
        """Yield the feed as one JSON array of what `row_json` makes of each row.

        The first part comes after the first page has been read, so that a database that is away
        is an error before an answer has begun. Raises `DatabaseUnavailable`.
        """
        before, last = b"[", None
        while True:
            rows, last = await self._page(last)
            if rows:
                yield before + b",".join(map(row_json, rows))
                before = b","
            if len(rows) < _PAGE_SIZE:
                break
        yield b"]" if before == b"," else b"[]"

    async def _page(
        self, after: tuple[datetime, int] | None
    ) -> tuple[list[Row], tuple[datetime, int] | None]:
        async with self._database.transaction() as session:
            found = (await session.execute(feed_page(after, _PAGE_SIZE))).all()
        rows = [Row(*row[:6]) for row in found]
        return rows, (found[-1].time, found[-1].seq) if found else None
