"""The way to PostgreSQL: one engine and one session factory per process, made in the lifespan."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg
from sqlalchemy import ClauseElement, event, exc, text
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler

from chatterd import metrics, settings
from chatterd.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from alembic.config import Config

logger = logging.getLogger(__name__)

# SQLSTATEs (PostgreSQL manual, appendix A) that are no fault of the request's: connection lost,
# read-only standby, transaction rolled back by the server, out of resources, lock or server not
# ready, cancelled by a time limit, file system trouble; and what a running server meets while
# somebody restores its database: no such role, database, schema, table.
_UNAVAILABLE: Final = ("08", "25", "40", "53", "55", "57", "58", "28", "3D", "3F", "42P01")
_SQL_MAX: Final = 1_000
# At the start, somebody has to change a setting.
_REFUSED: Final = ("28", "3D")


class SchemaError(Exception):
    """The database is not what this version of chatterd works on. The message says what to do."""


# A refused connection is a plain OSError, not one of SQLAlchemy's.
_TROUBLE: Final = (OSError, exc.TimeoutError, exc.DBAPIError, SchemaError)
# Asked first, for a SELECT would be refused where no revision has ever been.
_HAS_REVISION: Final = text("SELECT to_regclass('alembic_version') IS NOT NULL")
_REVISION: Final = text("SELECT string_agg(version_num, ', ') FROM alembic_version")
# A plan is made once and kept: planning takes longer than executing. It must then be the one for a
# large table, which it may have been made before; jit would be begun for what is off and yet done.
_LINE_SETTINGS: Final = """
    SET plan_cache_mode = force_generic_plan;
    SET enable_seqscan = off;
    SET enable_bitmapscan = off;
    SET jit = off;
"""
# The same without SQLAlchemy. The last is what asyncpg says when a connection ends out of turn.
DRIVER_TROUBLE: Final = (
    *_TROUBLE,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class StatementError(Exception):
    """PostgreSQL refused a statement. The message names the kind of error and what it is about."""


class PoolUse(NamedTuple):
    """Connections: how many there may be, how many are in use, how many are waited for."""

    size: int
    in_use: int
    waiting: int


class _Pool(AsyncAdaptedQueuePool):
    """Knows how many wait for a connection, to get one or for it to be made."""

    waiting = 0

    def _do_get(self) -> ConnectionPoolEntry:
        self.waiting += 1
        try:
            return super()._do_get()
        finally:
            self.waiting -= 1


# What SQLAlchemy tells of a pool, under a name of ours, is nobody's business but its own.
logging.getLogger(f"{__name__}.{_Pool.__name__}").setLevel(logging.WARNING)


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

    @property
    def is_available(self) -> bool:
        """Whether the database has answered last."""
        return not self._away_reasons

    @property
    def pool(self) -> PoolUse:
        """How many connections there may be, and who has them."""
        pool = self._engine.pool
        assert isinstance(pool, _Pool)
        return PoolUse(settings.DATABASE_POOL_SIZE, pool.checkedout(), pool.waiting)

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

    async def check(self, seconds: float) -> bool:
        """Look whether it answers within `seconds`; tell whether its schema is this version's.

        Not so when it is a newer one, on which requests go on being answered until the connection
        is lost. Raises `DatabaseUnavailable`, `SchemaError` for another schema.
        """
        try:
            async with asyncio.timeout(seconds), self._engine.connect() as connection:
                current = await _current_revision(connection)
        except _TROUBLE as error:
            raise self.unavailable(error, maybe_committed=False) from error
        self.available()
        if self._schema_is_head and current not in {None, *_revisions()}:
            return False
        require_head(current)
        self._schema_is_head = True
        return True

    async def aclose(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def _require_head(self, connection: AsyncConnection) -> None:
        if self._schema_is_head:
            return
        current = await _current_revision(connection)
        await connection.rollback()
        require_head(current)
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
            sent_at = time.perf_counter()
            try:
                rows = await self._driver.fetch(statement.sql, *statement.arguments(values))
            finally:
                _log_if_slow(statement.sql, sent_at)
        except DRIVER_TROUBLE as error:
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
        poolclass=_Pool,
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
    if settings.SLOW_QUERY_MILLISECONDS:
        event.listen(engine.sync_engine, "before_cursor_execute", _note_sent)
        event.listen(engine.sync_engine, "after_cursor_execute", _note_answered)
        event.listen(engine.sync_engine, "handle_error", _note_failed)
    return engine


def _note_sent(*event: Any) -> None:  # noqa: ANN401 - SQLAlchemy's signature
    _connection, _cursor, _statement, _parameters, context, _many = event
    context.sent_at = time.perf_counter()


def _note_answered(*event: Any) -> None:  # noqa: ANN401 - SQLAlchemy's signature
    _connection, _cursor, statement, _parameters, context, _many = event
    _log_if_slow(statement, context.sent_at)


def _note_failed(failure: ExceptionContext) -> None:
    sent_at = getattr(failure.execution_context, "sent_at", None)
    if sent_at is not None and failure.statement is not None:
        _log_if_slow(failure.statement, sent_at)


def _log_if_slow(sql: str, sent_at: float) -> None:
    """Log a statement that took long, also one that was given up; never its values."""
    milliseconds = (time.perf_counter() - sent_at) * 1000
    if 0 < settings.SLOW_QUERY_MILLISECONDS < milliseconds:
        metrics.SLOW_STATEMENTS.inc()
        text = " ".join(sql.split())
        logger.warning("A statement took %.0f ms: %s", milliseconds, text[:_SQL_MAX])


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


def trouble(error: Exception) -> SchemaError | StatementError:
    """Return what a command says of an error of the driver's."""
    return _refusal(error) if _is_unavailable(error) else StatementError(describe(error))


def _refusal(error: Exception) -> SchemaError:
    return SchemaError(f"The database of DATABASE_URL cannot be used: {_reason(error)}.")


def _reason(error: Exception) -> str:
    """Return the driver's words, without those that SQLAlchemy puts around them."""
    cause: BaseException = getattr(error, "orig", None) or error
    cause = cause.__cause__ or cause
    return str(cause).rstrip(".") or type(cause).__name__


async def _current_revision(connection: AsyncConnection) -> str | None:
    if not await connection.scalar(_HAS_REVISION):
        return None
    revision: str | None = await connection.scalar(_REVISION)
    return revision


def _migrations() -> Path:
    """Return the folder of alembic's environment, wherever chatterd is installed."""
    package = Path(__file__).parent
    checkout = package.parent / "alembic"
    # A wheel carries the revisions inside the package, which then lies beside the library alembic.
    return checkout if (checkout / "env.py").is_file() else package / "migrations"


def alembic_config(url: URL) -> "Config":
    """Return alembic's configuration for the database at `url`."""
    from alembic.config import Config  # noqa: PLC0415 - see head_revision

    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.attributes["url"] = url
    return config


def head_revision() -> str:
    """Return the newest schema revision that this version brings."""
    return max(_revisions())


@cache
def _revisions() -> frozenset[str]:
    """Return every revision that this version knows: how their files are called.

    Alembic would say the same, but loading it is a quarter of a server's start.
    """
    names = (path.name for path in (_migrations() / "versions").glob("[0-9]*_*.py"))
    return frozenset(name.partition("_")[0] for name in names)


def require_head(current: str | None) -> None:
    """Raise `SchemaError` unless the revision `current` is the one this version works on."""
    head = head_revision()
    if current != head:
        raise SchemaError(
            f"The database's schema is at revision {current or 'none'}; this version of"
            f" chatterd works on {head}. Run: chatterd migrate"
        )


def migrate(url: URL) -> None:
    """Bring the database's schema to head, adopting a tutorial database found there.

    Starts an event loop of its own: never call it inside one. Raises `SchemaError` when the
    database cannot be reached or cannot be brought to head.
    """
    from alembic import command  # noqa: PLC0415 - see head_revision
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        command.upgrade(alembic_config(url), "head")
    except CommandError as error:
        raise SchemaError(str(error)) from error
    except (OSError, exc.DBAPIError) as error:
        if not _is_unavailable(error):
            raise
        raise _refusal(error) from error
