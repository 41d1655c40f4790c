"""What is not counted but looked at when `/metrics` is asked for: how things stand now."""

import asyncio
import os
import platform
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import psutil
from prometheus_client.multiprocess import mark_process_dead

from chatterd import __version__, logs, metrics
from chatterd.database import Database
from chatterd.feed import Feed
from chatterd.live import Live
from chatterd.media import MediaStore
from chatterd.writer import Writer

# In this time the others' numbers are as new as Prometheus needs them.
_HAND_OVER_SECONDS: Final = 1.0


class Readings:
    """Reads what this process holds; gives it to prometheus-client with what was counted."""

    def __init__(
        self, database: Database, writer: Writer, feed: Feed, live: Live, media: MediaStore
    ) -> None:
        self._database = database
        self._writer = writer
        self._feed = feed
        self._live = live
        self._media = media
        self._process = psutil.Process()
        self._processor_seconds = 0.0

    def refresh(self) -> None:
        """Let prometheus-client have everything as it is now."""
        metrics.hand_over()
        size, in_use, waiting = self._database.pool
        metrics.POOL_SIZE.set(size)
        metrics.POOL_IN_USE.set(in_use)
        metrics.POOL_WAITING.set(waiting)
        metrics.DATABASE_UP.set(self._database.is_available)
        metrics.POSTS_WAITING.set(self._writer.waiting)
        metrics.FEED_BYTES.set(self._feed.size)
        metrics.SUBSCRIBERS.set(self._live.subscribers)
        metrics.UPLOADS_IN_FLIGHT.set(self._media.uploads)
        metrics.LOG_LINES_DROPPED.inc(logs.take_dropped())
        # A counter is told what has been added.
        before, self._processor_seconds = self._processor_seconds, time.process_time()
        metrics.CPU.inc(self._processor_seconds - before)
        metrics.MEMORY.set(self._process.memory_info().rss)
        metrics.DESCRIPTORS.set(self._process.num_fds())
        metrics.START_TIME.set(self._process.create_time())
        metrics.PROCESSES.set(1)
        metrics.BUILD_INFO.labels(__version__, platform.python_version()).set(1)

    @asynccontextmanager
    async def handed_over(self) -> AsyncIterator[None]:
        """Let the other processes know, if there are any, as long as the context lasts."""
        if not metrics.IS_ONE_OF_SEVERAL:
            yield
            return

        async def again_and_again() -> None:
            while True:
                self.refresh()
                await asyncio.sleep(_HAND_OVER_SECONDS)

        task = asyncio.create_task(again_and_again())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            self.refresh()
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call] # prometheus-client's
