"""What one process holds while it serves: made at start, given back at stop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TypedDict

import httpx2
from anyio import to_thread
from sqlalchemy.engine import URL
from starlette.applications import Starlette

from chatterd import settings
from chatterd.database import Database
from chatterd.feed import Feed
from chatterd.health import Health
from chatterd.keys import IdempotencyKeys, old_keys_forgotten
from chatterd.live import Live
from chatterd.media import MediaStore
from chatterd.media_sweep import Leavings, swept
from chatterd.readings import Readings
from chatterd.writer import Writer

logger = logging.getLogger(__name__)

_LLM_CONNECT_SECONDS = 5.0
_LLM_MAX_CONNECTIONS = 100


class StartError(Exception):
    """The server cannot start. The message is for the operator: what is wrong, what to do."""


class State(TypedDict):
    """The lifespan state, as views find it in `request.state`; nothing of it outlives the loop."""

    database: Database
    writer: Writer
    feed: Feed
    live: Live
    media: MediaStore
    keys: IdempotencyKeys
    leavings: Leavings
    health: Health
    readings: Readings
    llm: httpx2.AsyncClient


def lifespan(
    database_url: URL | None, stopping: asyncio.Event
) -> Callable[[Starlette], AbstractAsyncContextManager[Mapping[str, object]]]:
    """Return the application's lifespan on the database at `database_url`.

    `stopping` is set when the server is about to stop: what would go on for ever ends then.
    Entering it raises `StartError` or `SchemaError` when the server must not start.
    """

    @asynccontextmanager
    async def context(_app: Starlette) -> AsyncIterator[Mapping[str, object]]:
        if database_url is None:
            raise StartError(
                "DATABASE_URL is not set. Set it, or run: chatterd serve, which brings a database."
            )
        database = Database(database_url)
        media = MediaStore(settings.MEDIA_ROOT, database)
        try:
            await to_thread.run_sync(media.prepare)
        except OSError as error:
            raise StartError(
                f"MEDIA_ROOT, {settings.MEDIA_ROOT}, cannot be written: {error.strerror}."
            ) from error
        try:
            await database.require_schema()
            async with (
                aclosing(Writer(database)) as writer,
                aclosing(Feed(database, settings.FEED_CACHE_BYTES)) as feed,
                aclosing(Live(database, settings.STREAM_MAX_SUBSCRIBERS, stopping)) as live,
                aclosing(media),
                aclosing(IdempotencyKeys(database)) as keys,
                aclosing(Leavings(database, settings.MEDIA_ROOT)) as leavings,
                aclosing(Health(database, media, stopping)) as health,
                _llm_client() as llm,
                swept(database, settings.MEDIA_ROOT),
                old_keys_forgotten(keys),
            ):
                readings = Readings(database, writer, feed, live, media)
                state = State(
                    database=database,
                    writer=writer,
                    feed=feed,
                    live=live,
                    media=media,
                    keys=keys,
                    leavings=leavings,
                    health=health,
                    readings=readings,
                    llm=llm,
                )
                async with readings.handed_over():
                    yield state
        finally:
            await database.aclose()

    return context


def _llm_client() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=settings.OLLAMA_URL,
        # A model may think for minutes before its first word.
        timeout=httpx2.Timeout(None, connect=_LLM_CONNECT_SECONDS, pool=_LLM_CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=_LLM_MAX_CONNECTIONS),
        # The address is the operator's choice; proxies of the environment have no say in it.
        trust_env=False,
    )
