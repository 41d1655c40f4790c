"""The way to the database, for the checks and for who mends what they find."""

import shlex
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import asyncpg
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine import URL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import TypeAlias

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_HERE: Final = ("localhost", "127.0.0.1", "::1")
_SOCKETS: Final = ("/run/postgresql", "/var/run/postgresql")
"""Where psql looks by itself on Debian."""
_CLOSE_SECONDS: Final = 1.0


class Way(NamedTuple):
    """The way to the database at `url`, which chatterd itself runs if it `is_embedded`."""

    url: URL
    is_embedded: bool

    @property
    def name(self) -> str:
        """Where it is, for people."""
        host, port = self._place()
        return f"{self.url.database} at {host or 'localhost'}:{port}"

    def as_admin(self, *statements: str) -> str:
        """Return the command that executes the statements as who may do everything."""
        host, port = self._place()
        if self.is_embedded:
            words = ["psql", "-h", str(host), "-U", str(self.url.username)]
        elif host is None or host in _HERE or host.startswith("/"):
            words = ["sudo", "-u", "postgres", "psql"]
            if host is not None and host.startswith("/") and host not in _SOCKETS:
                words += ["-h", host]
            if port != 5432:
                words += ["-p", str(port)]
        else:
            words = ["psql", "-h", str(host), "-p", str(port), "-U", "postgres"]
        words += ["-d", str(self.url.database)]
        return " ".join(
            [*map(shlex.quote, words), *(f"-c {shlex.quote(each)}" for each in statements)]
        )

    def configured(self, name: str, value: str) -> str:
        """Return the command that gives a setting of PostgreSQL another value."""
        return self.as_admin(f"ALTER SYSTEM SET {name} = {value}", "SELECT pg_reload_conf()")

    def _place(self) -> tuple[str | None, int]:
        _, options = dialect().create_connect_args(self.url)  # type: ignore[no-untyped-call] # SQLAlchemy's
        return options.get("host"), options.get("port", 5432)

    @asynccontextmanager
    async def connected(self) -> "AsyncIterator[Connection]":
        """Open a connection; raises what asyncpg does."""
        _, options = dialect().create_connect_args(self.url)  # type: ignore[no-untyped-call] # SQLAlchemy's
        connection = await asyncpg.connect(
            **options, server_settings={"application_name": "chatterd doctor"}
        )
        try:
            yield connection
        finally:
            with suppress(OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError):
                await connection.close(timeout=_CLOSE_SECONDS)


async def row_of(connection: "Connection", statement: str) -> asyncpg.Record:
    """Return the one row of a statement that always has one."""
    row = await connection.fetchrow(statement)
    assert row is not None
    return row


def quoted(name: str) -> str:
    """Return a name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'
