"""How alembic reaches the database: one connection, one transaction per revision."""

import asyncio
import logging
from pathlib import Path

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, NullPool, func, select
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine

from chatterd import embedded, settings
from chatterd.embedded_home import EmbeddedPostgresError
from chatterd.models import Base

# Held while revisions run, so that of two upgrades at once the second finds nothing to do.
MIGRATION_LOCK = int.from_bytes(b"alembic", "big")


def run_offline() -> None:
    """Print the SQL. It is for a fresh database: a tutorial's table can only be adopted online."""
    context.configure(
        dialect_name="postgresql",
        target_metadata=Base.metadata,
        literal_binds=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run on the caller's `Config.attributes["url"]`, else DATABASE_URL, else the embedded one."""
    url = context.config.attributes.get("url") or settings.DATABASE_URL
    if url is not None:
        asyncio.run(_connect(url))
        return
    try:
        with embedded.postgres(Path("var"), bin_dir=settings.PG_BIN) as embedded_url:
            asyncio.run(_connect(embedded_url))
    except EmbeddedPostgresError as error:
        raise CommandError(str(error)) from error


async def _connect(url: str | URL) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_run)


def _run(connection: Connection) -> None:
    connection.execute(select(func.pg_advisory_lock(MIGRATION_LOCK)))
    connection.commit()  # The lock is the session's; alembic begins its own transactions.
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.config.cmd_opts is not None:
    # Started as `alembic`: nobody else has set up logging.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)

if context.is_offline_mode():
    run_offline()
else:
    run_online()
