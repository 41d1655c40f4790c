"""The way to PostgreSQL: one engine and one session factory per process, made in the lifespan."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import ClauseElement, Connection, event, exc
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.sql.compiler import SQLCompiler

from chatterd import settings
from chatterd.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

# SQLSTATEs (PostgreSQL manual, appendix A) that are no fault of the request's: connection lost,
# read-only standby, transaction rolled back by the server, out of resources, lock or server not
# ready, cancelled by a time limit, file system trouble; and what a running server meets while
# somebody restores its database: no such role, database, schema, table.
_UNAVAILABLE: Final = ("08", "25", "40", "53", "55", "57", "58", "28", "3D", "3F", "42P01")
# At the start, somebody has to change a setting.
_REFUSED: Final = ("28", "3D")


class SchemaError(Exception):
    """The database is not what this version of chatterd works on. The message says what to do."""


# A refused connection is a plain OSError, not one of SQLAlchemy's.
_TROUBLE: Final = (OSError, exc.TimeoutError, exc.DBAPIError, SchemaError)
# A plan is made once and kept: planning takes longer than executing. It must then be the one for a
# large table, which it may have been made before; jit would be begun for what is off and yet done.
_LINE_SETTINGS: Final = """
    SET plan_cache_mode = force_generic_plan;
    SET enable_seqscan = off;
    SET enable_bitmapscan = off;
    SET jit = off;
"""
# The same without SQLAlchemy. The last is what asyncpg says when a connection ends out of turn.
_LINE_TROUBLE: Final = (
    *_TROUBLE,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class StatementError(Exception):
    """PostgreSQL refused a statement. The message names the kind of error and what it is about."""


class Database:
    """One process's way to the database: engine, session factory, and what is known of both.

    Belongs to one event loop; `aclose` gives every connection back.
    """

    def __init__(self, url: URL) -> None:
        self._engine = _create_engine(url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._schema_is_head = False
        self._away_reasons: set[str] = set()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Open a session for one unit of work; leaving it without an error commits.

        Raises `DatabaseUnavailable` for whatever is the database's trouble and not the
        request's: away, restarting, overloaded, schema not migrated.
        """
        committing = False
        try:
            if not self._schema_is_head:
                async with self._engine.connect() as connection:
                    await self._require_head(connection)
            async with self._sessions() as session:
                yield session
                await session.flush()  # what fails here is surely not there
                committing = True
                await session.commit()
        except _TROUBLE as error:
            if not _is_unavailable(error):
                raise StatementError(describe(error)) from None
            raise self.unavailable(error, maybe_committed=committing) from error
        self.available()

    async def connect(self) -> AsyncConnection:
        """Take a connection, on which each statement is its own transaction, out of the pool."""
        connection = await self._engine.connect()
        try:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await self._require_head(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    def unavailable(self, error: Exception, *, maybe_committed: bool) -> DatabaseUnavailable:
        """Take note that the database is away because of `error`; return what to raise."""
        self._schema_is_head = False  # it may be another database when it comes back
        self._note_away(str(error) if isinstance(error, SchemaError) else _reason(error))
        return DatabaseUnavailable(maybe_committed=maybe_committed)

    def available(self) -> None:
        """Take note that the database has answered."""
        if self._away_reasons:
            logger.info("The database is available again")
            self._away_reasons.clear()

    async def require_schema(self) -> None:
        """Raise `SchemaError` unless the schema is the one this version works on.

        A database that is away is no error: it is asked again before the first unit of work.
        """
        try:
            async with self._engine.connect() as connection:
                await self._require_head(connection)
        except (OSError, exc.SQLAlchemyError) as error:
            if not _is_unavailable(error) or _sqlstate(error).startswith(_REFUSED):
                raise _refusal(error) from error
            self._note_away(_reason(error))

    async def aclose(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def _require_head(self, connection: AsyncConnection) -> None:
        if self._schema_is_head:
            return
        current = await connection.run_sync(_current_revision)
        await connection.rollback()
        head = head_revision()
        if current != head:
            raise SchemaError(
                f"The database's schema is at revision {current or 'none'}; this version of"
                f" chatterd works on {head}. Run: chatterd migrate"
            )
        self._schema_is_head = True

    def _note_away(self, reason: str) -> None:
        # Once for each reason, not for each of the requests that meet it.
        if reason not in self._away_reasons:
            logger.error("Requests get 503, the database is not available: %s", reason)
        self._away_reasons.add(reason)


class Statement:
    """A statement compiled for asyncpg once, for `Line.fetch`."""

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=asyncpg_dialect())  # type: ignore[no-untyped-call] # SQLAlchemy's
        self.sql = str(compiled)
        assert isinstance(compiled, SQLCompiler)
        self._names = compiled.positiontup or []
        self._constants = compiled.params

    def arguments(self, values: Mapping[str, object]) -> list[object]:
        """Return the arguments in the statement's order."""
        return [values.get(name, self._constants[name]) for name in self._names]


class Line:
    """A connection that one user keeps, for statements that are each a whole transaction.

    There is no pool, no BEGIN and no COMMIT in between: one round trip. One statement at a time.
    With a `channel` it listens there while it is connected, and calls `on_notice` for each
    notification, and when the connection is lost.
    """

    def __init__(
        self,
        database: Database,
        *,
        channel: str | None = None,
        on_notice: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._channel = channel
        self._on_notice = on_notice
        self._connection: AsyncConnection | None = None
        self._driver: asyncpg.Connection[asyncpg.Record] | None = None
        self.connects = 0
        """How often it has connected: after a change, nothing known from before may hold."""

    async def fetch(self, statement: Statement, **values: object) -> list[asyncpg.Record]:
        """Execute `statement` and return its rows; it is committed then.

        Raises `DatabaseUnavailable` as `Database.transaction` does, `asyncpg.PostgresError` when
        the statement itself is refused.
        """
        sent = False
        try:
            if self._driver is None or self._driver.is_closed():
                await self._connect()
            assert self._driver is not None
            sent = True
            rows = await self._driver.fetch(statement.sql, *statement.arguments(values))
        except _LINE_TROUBLE as error:
            if not _is_unavailable(error):
                raise
            await self.aclose()
            # PostgreSQL's own last words come before a commit; only silence leaves it open.
            silent = _sqlstate(error).startswith("08")
            raise self._database.unavailable(error, maybe_committed=sent and silent) from error
        self._database.available()
        return rows

    async def _connect(self) -> None:
        await self.aclose()
        self._connection = await self._database.connect()
        self._driver = (await self._connection.get_raw_connection()).driver_connection
        assert self._driver is not None
        await self._driver.execute(_LINE_SETTINGS)
        if self._channel is not None:
            await self._driver.add_listener(self._channel, self._notice)
            self._driver.add_termination_listener(self._notice)
        self.connects += 1

    def _notice(self, *_: object) -> None:
        self._on_notice()

    async def aclose(self) -> None:
        """Give the connection back."""
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            with suppress(exc.DBAPIError, OSError):
                await connection.invalidate()  # what state it is in is not known
                await connection.close()


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
    event.listen(engine.sync_engine, "invalidate", _hang_up)
    return engine


def _hang_up(dbapi_connection: Any, *_: Any) -> None:  # noqa: ANN401 - SQLAlchemy's signature
    """Close a connection that is of no more use without waiting for the server's goodbye.

    SQLAlchemy would wait two seconds for it, on top of DATABASE_TIMEOUT, from a server that hangs.
    """
    dbapi_connection.driver_connection.terminate()


def _refuse_closed_connection(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:  # noqa: ANN401 - SQLAlchemy's signature
    """Make the pool replace a connection that the server has closed, as a restart does.

    asyncpg learns of it when it happens, so nothing is sent, unlike with `pool_pre_ping`.
    """
    if dbapi_connection.driver_connection.is_closed():
        raise exc.DisconnectionError


def _sqlstate(error: Exception) -> str:
    # asyncpg's own errors, a lost connection among them, have none.
    return getattr(getattr(error, "orig", error), "sqlstate", None) or "08000"


def _is_unavailable(error: Exception) -> bool:
    """Tell whether `error` is the database's trouble and not the request's."""
    return _sqlstate(error).startswith(_UNAVAILABLE)


def describe(error: Exception) -> str:
    """Return what `error` is about, without the driver's words, which repeat what people wrote."""
    cause: BaseException = getattr(error, "orig", None) or error
    cause = cause.__cause__ or cause
    names = ("sqlstate", "table_name", "column_name", "constraint_name")
    facts = [f"{name} {value}" for name in names if (value := getattr(cause, name, None))]
    return ", ".join([type(cause).__name__, *facts])


def refusal(unavailable: DatabaseUnavailable) -> SchemaError:
    """Return what a command says where a request would be answered `unavailable`."""
    cause = unavailable.__cause__
    assert isinstance(cause, Exception)
    return cause if isinstance(cause, SchemaError) else _refusal(cause)


def _refusal(error: Exception) -> SchemaError:
    return SchemaError(f"The database of DATABASE_URL cannot be used: {_reason(error)}.")


def _reason(error: Exception) -> str:
    """Return the driver's words, without those that SQLAlchemy puts around them."""
    cause: BaseException = getattr(error, "orig", None) or error
    cause = cause.__cause__ or cause
    return str(cause).rstrip(".") or type(cause).__name__


def _current_revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def alembic_config(url: URL) -> Config:
    """Return alembic's configuration for the database at `url`, wherever chatterd is installed."""
    package = Path(__file__).parent
    checkout = package.parent / "alembic"
    config = Config()
    # A wheel carries the revisions inside the package, which then lies beside the library alembic.
    location = checkout if (checkout / "env.py").is_file() else package / "migrations"
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    config.attributes["url"] = url
    return config


def head_revision() -> str | None:
    """Return the newest schema revision that this version brings."""
    return ScriptDirectory.from_config(alembic_config(URL.create("postgresql"))).get_current_head()


def migrate(url: URL) -> None:
    """Bring the database's schema to head, adopting a tutorial database found there.

    Starts an event loop of its own: never call it inside one. Raises `SchemaError` when the
    database cannot be reached, `alembic.util.CommandError` when it cannot be brought to head.
    """
    try:
        command.upgrade(alembic_config(url), "head")
    except (OSError, exc.DBAPIError) as error:
        if not _is_unavailable(error):
            raise
        raise _refusal(error) from error
