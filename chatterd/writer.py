"""The one way in: a chatt is stored when `Writer.post` returns."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextvars import Context
from datetime import datetime
from types import MappingProxyType
from typing import Final, NamedTuple
from uuid import UUID, uuid4

import asyncpg
import msgspec

from chatterd import metrics
from chatterd.database import Database, Line, Statement, describe
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.keys import TOKEN_BYTES, Claim, Posted
from chatterd.media import Slot, StoredFile
from chatterd.models import insert_chatts, insert_chatts_and_keys
from chatterd.schemas import Draft

logger = logging.getLogger(__name__)

NO_FILES: Final[Mapping[Slot, StoredFile]] = MappingProxyType({})

_QUEUE_LIMIT: Final = 10_000
_BATCH_LIMIT: Final = 1_000
_SALT_BYTES: Final = 16

_KEYS_KEY: Final = "pk_idempotency_keys"

_INSERT: Final = Statement(insert_chatts())
_INSERT_WITH_KEYS: Final = Statement(insert_chatts_and_keys())


class _Kept(NamedTuple):
    """What is kept of a post with a key; its fields are columns."""

    key_hash: bytes
    fingerprint: bytes
    salt: bytes
    files: str


class _Post(NamedTuple):
    """A chatt that waits for being stored, and who waits for it."""

    id: UUID
    draft: Draft
    image: str | None
    video: str | None
    delete_token_hash: bytes
    kept: _Kept | None
    stored: asyncio.Future[datetime]


class _KeyTaken(Exception):  # noqa: N818 - no fault: somebody was faster
    """Another process has stored a post with the same key."""


class Writer:
    """Stores what is waiting in one statement, and what has come meanwhile in the next.

    There is no timer: a chatt that comes alone is stored alone. One statement for all costs
    little more than one for each would, and takes the log's lock once.
    """

    def __init__(self, database: Database) -> None:
        self._line = Line(database)
        self._waiting: list[_Post] = []
        self._storing: asyncio.Task[None] | None = None

    async def post(
        self,
        draft: Draft,
        files: Mapping[Slot, StoredFile] = NO_FILES,
        claim: Claim | None = None,
    ) -> Posted:
        """Store a chatt; returning means committed.

        `files` are in place. With a `claim` the chatt is stored once for all posts with its key.
        Cancelling the caller does not take back the chatt. Raises `DatabaseUnavailable`, `Problem`
        503 when too many are waiting, 422 when the database refuses this one or the key was used
        for another.
        """
        if claim is None:
            return await self._post(draft, files, secrets.token_urlsafe(TOKEN_BYTES), None)
        keys = {slot: file.key for slot, file in files.items()}
        if (replay := claim.replayed(draft, keys)) is not None:
            return replay
        salt = secrets.token_bytes(_SALT_BYTES)
        kept = _Kept(
            claim.key_hash,
            claim.fingerprint(draft, keys),
            salt,
            msgspec.json.encode(dict(files)).decode(),
        )
        try:
            return await self._post(draft, files, claim.delete_token(salt), kept)
        except _KeyTaken:
            await claim.ask_again()
            if (replay := claim.replayed(draft, keys)) is None:
                raise DatabaseUnavailable from None  # it was there a moment ago
            return replay

    async def _post(
        self, draft: Draft, files: Mapping[Slot, StoredFile], token: str, kept: _Kept | None
    ) -> Posted:
        if len(self._waiting) >= _QUEUE_LIMIT:
            raise Problem(
                "too-many-posts",
                "Too many posts are waiting for the database; try again in a moment.",
                {"Retry-After": "1"},
            )
        stored: asyncio.Future[datetime] = asyncio.get_running_loop().create_future()
        chatt_id = uuid4()
        image, video = files.get("image"), files.get("video")
        self._waiting.append(
            _Post(
                chatt_id,
                draft,
                image and image.key,
                video and video.key,
                token_hash(token),
                kept,
                stored,
            )
        )
        if self._storing is None:
            # Its own context: what it logs is about no request in particular.
            work = self._store_waiting()
            self._storing = asyncio.get_running_loop().create_task(work, context=Context())
        return Posted(chatt_id, await stored, token, files)

    @property
    def waiting(self) -> int:
        """How many posts wait for the next commit."""
        return len(self._waiting)

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
        statement, columns = _statement(posts)
        sent_at = time.perf_counter()
        try:
            rows = await self._line.fetch(statement, **columns)
        except asyncpg.PostgresError as error:
            if len(posts) > 1:
                for post in posts:
                    await self._store([post])
                return
            _tell(posts, _refusal(error))
        except DatabaseUnavailable as error:
            _tell(posts, error)
            # Those who came meanwhile have waited long enough, and nothing of theirs was sent.
            waiting, self._waiting = self._waiting, []
            _tell(waiting, DatabaseUnavailable())
        except BaseException:
            _tell(posts, DatabaseUnavailable(maybe_committed=True))
            raise
        else:
            metrics.COMMIT_SECONDS.observe(time.perf_counter() - sent_at)
            metrics.BATCH_SIZE.observe(len(posts))
            times: dict[UUID, datetime] = {row["id"]: row["time"] for row in rows}
            for post in posts:
                if not post.stored.done():  # else cancelled
                    post.stored.set_result(times[post.id])


def _statement(posts: Sequence[_Post]) -> tuple[Statement, dict[str, list[object]]]:
    """Return the statement that stores `posts`, and its arrays."""
    columns: dict[str, list[object]] = {
        "id": [post.id for post in posts],
        "name": [post.draft.name for post in posts],
        "message": [post.draft.message for post in posts],
        "image": [post.image for post in posts],
        "video": [post.video for post in posts],
        "delete_token_hash": [post.delete_token_hash for post in posts],
    }
    if not any(post.kept for post in posts):
        return _INSERT, columns
    for name in _Kept._fields:
        columns[name] = [post.kept and getattr(post.kept, name) for post in posts]
    return _INSERT_WITH_KEYS, columns


def token_hash(token: str) -> bytes:
    """Return what the database knows of a delete token; it is random, and needs no slow hash."""
    return hashlib.sha256(token.encode()).digest()


def _refusal(error: asyncpg.PostgresError) -> Exception:
    if isinstance(error, asyncpg.UniqueViolationError) and error.constraint_name == _KEYS_KEY:
        return _KeyTaken()
    logger.warning("The database refused a chatt: %s", describe(error))
    return Problem("chatt-refused", "The database does not take this chatt.")


def _tell(posts: Sequence[_Post], error: Exception) -> None:
    for post in posts:
        if not post.stored.done():  # else cancelled
            post.stored.set_exception(error)
