"""The one way in: a chatt is stored when `Writer.post` returns."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, NamedTuple

import asyncpg

from chatterd.database import Database, Line, Statement, describe
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.models import insert_chatts
from chatterd.schemas import Draft

logger = logging.getLogger(__name__)

_QUEUE_LIMIT: Final = 10_000
_BATCH_LIMIT: Final = 1_000

_INSERT: Final = Statement(insert_chatts())


class _Post(NamedTuple):
    """A chatt that waits for being stored, and who waits for it."""

    draft: Draft
    image: str | None
    video: str | None
    stored: asyncio.Future[None]


class Writer:
    """Stores what is waiting in one statement, and what has come meanwhile in the next.

    There is no timer: a chatt that comes alone is stored alone. One statement for all costs
    little more than one for each would, and takes the log's lock once.
    """

    def __init__(self, database: Database) -> None:
        self._line = Line(database)
        self._waiting: list[_Post] = []
        self._storing: asyncio.Task[None] | None = None

    async def post(self, draft: Draft, image: str | None = None, video: str | None = None) -> None:
        """Store a chatt; returning means committed.

        `image` and `video` are keys of files that are in place. Cancelling the caller does not
        take back the chatt. Raises `DatabaseUnavailable`, `Problem` 503 when too many are
        waiting, 422 when the database refuses this one.
        """
        if len(self._waiting) >= _QUEUE_LIMIT:
            raise Problem(
                "too-many-posts",
                "Too many posts are waiting for the database; try again in a moment.",
                {"Retry-After": "1"},
            )
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append(_Post(draft, image, video, stored))
        if self._storing is None:
            self._storing = asyncio.create_task(self._store_waiting())
        await stored

    async def aclose(self) -> None:
        """Store what is waiting, then give the connection back."""
        if self._storing is not None:
            await self._storing
        await self._line.aclose()

    async def _store_waiting(self) -> None:
        try:
            while self._waiting:
                posts = self._waiting[:_BATCH_LIMIT]
                del self._waiting[:_BATCH_LIMIT]
                await self._store(posts)
        finally:
            self._storing = None

    async def _store(self, posts: Sequence[_Post]) -> None:
        """Store `posts` in one transaction and tell each; one that is refused fails alone."""
        try:
            await self._line.fetch(
                _INSERT,
                name=[post.draft.name for post in posts],
                message=[post.draft.message for post in posts],
                image=[post.image for post in posts],
                video=[post.video for post in posts],
            )
        except asyncpg.PostgresError as error:
            if len(posts) > 1:
                for post in posts:
                    await self._store([post])
                return
            logger.warning("The database refused a chatt: %s", describe(error))
            _tell(posts, Problem("chatt-refused", "The database does not take this chatt."))
        except DatabaseUnavailable as error:
            _tell(posts, error)
            # Those who came meanwhile have waited long enough, and nothing of theirs was sent.
            waiting, self._waiting = self._waiting, []
            _tell(waiting, DatabaseUnavailable())
        except BaseException:
            _tell(posts, DatabaseUnavailable(maybe_committed=True))
            raise
        else:
            _tell(posts, None)


def _tell(posts: Sequence[_Post], error: Exception | None) -> None:
    for post in posts:
        if post.stored.done():  # cancelled
            continue
        if error is None:
            post.stored.set_result(None)
        else:
            post.stored.set_exception(error)
