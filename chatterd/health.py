"""Whether the server can do its work: what a load balancer and an operator ask."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from anyio import to_thread

from chatterd.database import Database, SchemaError
from chatterd.errors import DatabaseUnavailable, Problem
from chatterd.media import MediaStore

logger = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 3.0
# However often somebody asks, nothing is looked at more often.
_KEPT_SECONDS: Final = 1.0

_OK: Final = "ok"
_FAILED: Final = "failed"
_UNKNOWN: Final = "unknown"
_NEWER: Final = "newer"
_WORDS: Final[Mapping[str, str]] = {
    "database": "the database does not answer",
    "schema": "the database's schema is not the one that this version works on",
    "media": "the media folder is not usable",
    "disk": "the media folder's disk has less free than MEDIA_FREE_FLOOR",
    "stopping": "the server is stopping",
}
"""What it means that a check has failed."""


class Health:
    """The checks of `/readyz`. Those who ask at the same time share them.

    database: it answers. schema: it is the one of this version, or newer while requests go on
    being answered. media: a file was written into the media folder and removed. disk: it has
    `MEDIA_FREE_FLOOR` free. stopping: the server is not.
    """

    def __init__(self, database: Database, media: MediaStore, stopping: asyncio.Event) -> None:
        self._database = database
        self._media = media
        self._stopping = stopping
        self._checking: asyncio.Task[dict[str, str]] | None = None
        self._checked_at = float("-inf")
        self._probing: asyncio.Task[bool] | None = None
        self._troubles: dict[str, str | None] = {}

    async def checks(self) -> Mapping[str, str]:
        """Return the state of each check; raises `Problem` 503 when one has failed."""
        now = asyncio.get_running_loop().time()
        if self._checking is None or (
            self._checking.done() and now >= self._checked_at + _KEPT_SECONDS
        ):
            self._checking = asyncio.create_task(self._check())
        # One who leaves does not end what others wait for.
        found = dict(await asyncio.shield(self._checking))
        found["stopping"] = _FAILED if self._stopping.is_set() else _OK
        failed = [_WORDS[name] for name, state in found.items() if state == _FAILED]
        if failed:
            detail = f"Not ready: {'; '.join(failed)}."
            raise Problem("not-ready", detail, {"Retry-After": "1"}, {"checks": found})
        return found

    async def aclose(self) -> None:
        """End the checks."""
        for task in (self._checking, self._probing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    async def _check(self) -> dict[str, str]:
        database, media = await asyncio.gather(self._check_database(), self._check_media())
        self._checked_at = asyncio.get_running_loop().time()
        return database | media

    async def _check_database(self) -> dict[str, str]:
        try:
            is_head = await self._database.check(_CHECK_SECONDS)
        except DatabaseUnavailable:  # has been logged
            return {"database": _FAILED, "schema": _UNKNOWN}
        except SchemaError as error:
            self._note("schema", str(error))
            return {"database": _OK, "schema": _FAILED}
        self._note("schema", None)
        return {"database": _OK, "schema": _OK if is_head else _NEWER}

    async def _check_media(self) -> dict[str, str]:
        # A disk that hangs keeps one thread, however often somebody asks.
        if self._probing is None:
            probe = to_thread.run_sync(self._probe, abandon_on_cancel=True)
            self._probing = asyncio.create_task(probe)
        await asyncio.wait({self._probing}, timeout=_CHECK_SECONDS)
        if not self._probing.done():
            self._note("media", "it hangs")
            return {"media": _FAILED, "disk": _UNKNOWN}
        probing, self._probing = self._probing, None
        try:
            is_floor_free = probing.result()
        except OSError as error:
            self._note("media", error.strerror)
            return {"media": _FAILED, "disk": _UNKNOWN}
        self._note("media", None if is_floor_free else _WORDS["disk"])
        return {"media": _OK, "disk": _OK if is_floor_free else _FAILED}

    def _probe(self) -> bool:
        """Write into the media folder; tell whether its disk has enough free."""
        try:
            self._media.room.require_free(1)
        except Problem:
            return False  # a write might fail for that reason alone
        self._media.probe()
        return True

    def _note(self, name: str, trouble: str | None) -> None:
        """Log a trouble that is new, or over."""
        before = self._troubles.get(name)
        self._troubles[name] = trouble
        if trouble is not None and trouble != before:
            logger.error("Not ready, %s: %s", _WORDS[name], trouble)
        elif trouble is None and before is not None:
            logger.info("No longer so: %s", _WORDS[name])
