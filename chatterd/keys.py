"""Retry safety: a post that is sent again with the same `Idempotency-Key` is not stored again.

docs/decisions/0011-idempotency-keys.md says why it is right. The header is that of the IETF draft
draft-ietf-httpapi-idempotency-key-header.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import msgspec
from starlette.datastructures import Headers

from chatterd.database import Database, Line, Statement
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.media import Slot, StoredFile
from chatterd.models import delete_old_keys, kept_answers
from chatterd.schemas import Draft

logger = logging.getLogger(__name__)

TOKEN_BYTES: Final = 18
"""The random part of a delete token, before it is written as text."""

_KEPT_SECONDS: Final = 24 * 3600.0
_FORGET_INTERVAL_SECONDS: Final = 3600.0
_FORGET_LIMIT: Final = 10_000
_KEY: Final = re.compile(r'"([!#-\[\]-~]{1,255})"|([!#-~]{1,255})')

_ASK: Final = Statement(kept_answers())


class Posted(NamedTuple):
    """A chatt that is stored, as its author is told of it."""

    id: UUID
    time: datetime
    delete_token: str
    files: Mapping[Slot, StoredFile]
    is_replay: bool = False


class KeptAnswer(NamedTuple):
    """What the table has of a post with a key."""

    fingerprint: bytes
    salt: bytes
    chatt_id: UUID
    time: datetime
    files: str


class Claim:
    """A key for as long as a request with it is under way."""

    def __init__(self, keys: "IdempotencyKeys", key: str, route: str) -> None:
        self._keys = keys
        self._key = key.encode()
        self._route = route
        self.key_hash = hashlib.sha256(self._key).digest()
        self.kept: KeptAnswer | None = None

    def delete_token(self, salt: bytes) -> str:
        """Return the chatt's delete token, which only the key and the salt together give again.

        The database has the salt, the author the key, and neither the token.
        """
        mac = hmac.digest(self._key, salt, "sha256")
        return urlsafe_b64encode(mac[:TOKEN_BYTES]).decode()

    def fingerprint(self, draft: Draft, media_keys: Mapping[Slot, str]) -> bytes:
        """Return the digest of what is posted, and by which route."""
        content = (self._route, draft, media_keys.get("image"), media_keys.get("video"))
        return hashlib.sha256(msgspec.json.encode(content)).digest()

    def replayed(self, draft: Draft, media_keys: Mapping[Slot, str]) -> Posted | None:
        """Return what the same post was answered before, or None for the first.

        Raises `Problem` 422 when it was another post.
        """
        kept = self.kept
        if kept is None:
            return None
        if kept.fingerprint != self.fingerprint(draft, media_keys):
            raise Problem(
                "idempotency-key-reused",
                "Idempotency-Key was used for another post before; take a new key for a new post.",
            )
        files = msgspec.json.decode(kept.files, type=dict[Slot, StoredFile])
        return Posted(kept.chatt_id, kept.time, self.delete_token(kept.salt), files, is_replay=True)

    async def ask_again(self) -> None:
        """Find what somebody else has stored with the key meanwhile."""
        self.kept, is_locked = await self._keys.ask(self.key_hash)
        if is_locked:  # once more than before
            self._keys.unlock(self.key_hash)


def key_in(headers: Headers) -> str | None:
    """Return the `Idempotency-Key`, which may stand in quotation marks.

    Raises `Problem` 422 for one that is none.
    """
    value = headers.get("idempotency-key")
    return None if value is None else checked_key(value)


def checked_key(value: str) -> str:
    """Return the key without its quotation marks; raises `Problem` 422."""
    match = _KEY.fullmatch(value)
    if match is None:
        raise Problem(
            "idempotency-key-invalid",
            "Idempotency-Key must be 1 to 255 visible ASCII characters, such as a UUID.",
        )
    return match[1] or match[2]


class _Asking(NamedTuple):
    key_hash: bytes
    answer: "asyncio.Future[tuple[KeptAnswer | None, bool]]"


class IdempotencyKeys:
    """What was answered to posts with keys, and which keys are in use at this moment.

    A key in use is an advisory lock of PostgreSQL's, so that every process sees it, and it goes
    with the process. All that ask at the same time share one question.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._line = Line(database)
        self._in_use: set[bytes] = set()
        self._asking: list[_Asking] = []
        self._unlocking: list[int] = []
        self._working: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def claimed(self, key: str, route: str) -> AsyncIterator[Claim]:
        """Hold `key` while the context lasts.

        Raises `Problem` 409 when another request with it is under way, `DatabaseUnavailable`.
        """
        claim = Claim(self, key, route)
        if claim.key_hash in self._in_use:
            raise _in_use()
        self._in_use.add(claim.key_hash)
        is_locked = False
        try:
            claim.kept, is_locked = await self.ask(claim.key_hash)
            if claim.kept is None and not is_locked:
                raise _in_use()
            yield claim
        finally:
            self._in_use.discard(claim.key_hash)
            if is_locked:
                self.unlock(claim.key_hash)

    async def ask(self, key_hash: bytes) -> tuple[KeptAnswer | None, bool]:
        """Return what is kept of a key, and whether it is now locked for this process."""
        answer: asyncio.Future[tuple[KeptAnswer | None, bool]]
        answer = asyncio.get_running_loop().create_future()
        self._asking.append(_Asking(key_hash, answer))
        self._work()
        return await answer

    async def aclose(self) -> None:
        """Give the connection back, and every lock with it."""
        if self._working is not None:
            self._working.cancel()
            with suppress(asyncio.CancelledError):
                await self._working
        await self._line.aclose()

    def unlock(self, key_hash: bytes) -> None:
        """Give up one lock that `ask` has got."""
        self._unlocking.append(_lock_of(key_hash))
        self._work()

    def _work(self) -> None:
        if self._working is None:
            self._working = asyncio.create_task(self._work_while_asked())

    async def _work_while_asked(self) -> None:
        try:
            while self._asking or self._unlocking:
                asking, self._asking = self._asking, []
                unlocking, self._unlocking = self._unlocking, []
                try:
                    await self._answer(asking, unlocking)
                except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                    # A lost connection has given up its locks by itself.
                    for _, answer in asking:
                        if not answer.done():
                            answer.set_exception(error)
        finally:
            self._working = None

    async def _answer(self, asking: list[_Asking], unlocking: list[int]) -> None:
        hashes = {key_hash: _lock_of(key_hash) for key_hash, _ in asking}
        records = await self._line.fetch(
            _ASK, key_hash=list(hashes), lock=list(hashes.values()), unlock=unlocking
        )
        found = {record["key_hash"]: record for record in records}
        for key_hash, answer in asking:
            record = found[key_hash]
            kept = None
            if record["fingerprint"] is not None:
                kept = KeptAnswer(*(record[name] for name in KeptAnswer._fields))
            if not answer.done():
                answer.set_result((kept, record["is_locked"]))
            elif record["is_locked"]:  # whoever asked has left
                self._unlocking.append(hashes[key_hash])

    async def forget_old(self, older_than_seconds: float = _KEPT_SECONDS) -> int:
        """Forget the keys of so long ago; return how many. Raises `DatabaseUnavailable`."""
        count = 0
        while True:
            async with self._database.transaction() as session:
                result = await session.execute(
                    delete_old_keys(_FORGET_LIMIT), {"seconds": older_than_seconds}
                )
            forgotten: int = result.rowcount  # type: ignore[attr-defined] # a DELETE has it
            count += forgotten
            if forgotten < _FORGET_LIMIT:
                return count


@asynccontextmanager
async def old_keys_forgotten(
    keys: IdempotencyKeys, interval_seconds: float = _FORGET_INTERVAL_SECONDS
) -> AsyncIterator[None]:
    """Forget old keys in the background, again and again, while the context lasts."""

    async def forget_again_and_again() -> None:
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                if count := await keys.forget_old():
                    logger.info("Forgot %d idempotency keys", count)
            except DatabaseUnavailable:
                pass  # has been logged; what is left will be there next time
            except Exception:  # whatever it is, the server goes on
                logger.exception("Old idempotency keys cannot be forgotten")

    task = asyncio.create_task(forget_again_and_again())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _in_use() -> Problem:
    return Problem(
        "idempotency-key-in-use",
        "The first request with this Idempotency-Key is still under way; try again in a moment.",
        {"Retry-After": "1"},
    )


def _lock_of(key_hash: bytes) -> int:
    return int.from_bytes(key_hash[:8], signed=True)
