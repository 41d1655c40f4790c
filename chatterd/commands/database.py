"""The database of a command: the operator's, or the embedded one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL, make_url

from chatterd import database, embedded, settings
from chatterd.embedded_home import EmbeddedPostgresError

VAR: Final = Path("var")
"""Where the embedded database lies, below the working directory."""


@contextmanager
def database_beside_a_server(*, migrated: bool = True) -> Iterator[URL]:
    """Yield the database's URL: of the embedded one, which a server may be running or nobody.

    Never of a new one: to it, every file would be an orphan. Where nobody runs it, it is `migrated`
    first.
    """
    if settings.DATABASE_URL is None:
        if (text := embedded.running(VAR)) is not None:
            yield make_url(text)
            return
        if not (VAR / "postgres" / "PG_VERSION").exists():
            raise EmbeddedPostgresError(
                f"there is no database in {VAR / 'postgres'}: work in the server's folder, or set"
                " DATABASE_URL"
            )
    with opened_database(migrated=migrated) as url:
        yield url


@contextmanager
def opened_database(*, migrated: bool = True) -> Iterator[URL]:
    """Yield the database's URL; where none is set, run the embedded one, `migrated` or as it is."""
    if settings.DATABASE_URL is not None:
        yield settings.DATABASE_URL
        return

    with embedded.postgres(VAR, bin_dir=settings.PG_BIN) as text:
        url = make_url(text)
        if migrated:
            database.migrate(url)
        yield url
