"""The way to PostgreSQL: one engine and one session factory per process, made in the lifespan."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, exc
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from chatterd import settings
from chatterd.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

# SQLSTATE classes (PostgreSQL manual, appendix A) that pass without anybody changing the request
# or the schema: connection lost, transaction rolled back by the server, read-only standby, out
# of resources, lock or server not ready, cancelled by a time limit, file system trouble.
_PASSING_CLASSES: Final = {"08", "25", "40", "53", "55", "57", "58"}
# Wrong password or role, no such database: somebody has to change something.
_REFUSED_CLASSES: Final = {"28", "3D"}


class SchemaError(Exception):
    """The database is not what this version of chatterd works on. The message says what to do."""


class Database:
    """One process's way to the database: engine, session factory, and what is known of both.

    Belongs to one event loop; `aclose` gives every connection back.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = _create_engine(url)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self._schema_is_head = False

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Open a session for one unit of work; leaving it without an error commits.

        Raises `DatabaseUnavailable` for whatever is the database's trouble and not the
        request's: away, restarting, overloaded, schema not migrated.
        """
        committing = False
        try:
            async with self._sessions() as session:
                await self._require_head(session)
                yield session
                committing = True
                await session.commit()
        # A refused connection is a plain OSError, not one of SQLAlchemy's.
        except (OSError, exc.TimeoutError, exc.DBAPIError) as error:
            if not _is_passing(error):
                raise
            logger.warning("The database is not available: %s", _reason(error))
            raise DatabaseUnavailable(maybe_committed=committing) from error
        except SchemaError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it all
            raise DatabaseUnavailable from error

    async def require_schema(self) -> None:
        """Raise `SchemaError` unless the schema is the one this version works on.

        A database that is away is no error: it is asked again before the first unit of work.
        """
        try:
            async with self.transaction():
                pass
        except DatabaseUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, SchemaError):
                raise cause from None
        except exc.DBAPIError as error:
            raise SchemaError(f"The database refuses the connection: {_reason(error)}.") from error

    async def aclose(self) -> None:
        """Close every connection."""
        await self.engine.dispose()

    async def _require_head(self, session: AsyncSession) -> None:
        if self._schema_is_head:
            return
        connection = await session.connection()
        current = await connection.run_sync(_current_revision)
        await session.rollback()
        head = head_revision()
        if current != head:
            raise SchemaError(
                f"The database's schema is at revision {current or 'none'}; this version of"
                f" chatterd works on {head}. Run: chatterd migrate"
            )
        self._schema_is_head = True


def _create_engine(url: URL) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=settings.DATABASE_POOL_SIZE,
        max_overflow=0,
        pool_timeout=settings.DATABASE_TIMEOUT,
        # Errors would otherwise carry what people wrote into the log.
        hide_parameters=True,
        connect_args={
            "timeout": settings.DATABASE_TIMEOUT,
            "command_timeout": settings.DATABASE_TIMEOUT,
            "server_settings": {"application_name": "chatterd"},
        },
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed_connection)
    return engine


def _refuse_closed_connection(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:  # noqa: ANN401 - SQLAlchemy's signature
    """Make the pool replace a connection that the server has closed, as a restart does.

    asyncpg learns of it when it happens, so nothing is sent, unlike with `pool_pre_ping`.
    """
    if dbapi_connection.driver_connection.is_closed():
        raise exc.DisconnectionError


def _is_passing(error: Exception) -> bool:
    if not isinstance(error, exc.DBAPIError):
        return True
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is None:  # asyncpg's own: connection lost, wait for an answer given up
        return True
    return error.connection_invalidated or sqlstate[:2] in _PASSING_CLASSES


def _reason(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return (str(cause).splitlines() or [""])[0].removeprefix("<class 'asyncpg.exceptions.").rstrip(
        "."
    ) or (type(cause).__name__)


def _current_revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def alembic_config(url: URL) -> Config:
    """Return alembic's configuration for the database at `url`, wherever chatterd is installed."""
    package = Path(__file__).parent
    checkout = package.parent / "alembic"
    config = Config()
    # A wheel carries the revisions inside the package.
    location = checkout if checkout.is_dir() else package / "migrations"
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    config.attributes["url"] = url
    return config


def head_revision() -> str | None:
    """Return the newest schema revision that this version brings."""
    return ScriptDirectory.from_config(alembic_config(URL.create("postgresql"))).get_current_head()


def migrate(url: URL) -> None:
    """Bring the database's schema to head, adopting a tutorial database found there.

    Starts an event loop of its own: never call it inside one.
    """
    command.upgrade(alembic_config(url), "head")
