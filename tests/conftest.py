"""What tests share: a real PostgreSQL, and real `chatterd serve` processes on it."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Callable
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
import httpx2
import pytest
from sqlalchemy.engine import URL, make_url

from chatterd.database import migrate
from chatterd.embedded import postgres
from tests.ollama import FakeOllama
from tests.process import Cluster, Server, open_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests import multipart
    from tests.multipart import Connection

StartServer: TypeAlias = Callable[..., Server]

# A shell starts what it puts into the background with SIGINT ignored, and so would be the servers
# started here, which are to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[URL]:
    """The PostgreSQL under test: our own, or that of TEST_DATABASE_URL.

    The latter names a database to connect to and a role that may create others.
    """
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield make_url(given).set(drivername="postgresql+asyncpg")
        return
    # Nothing here has to survive a power cut; what must survive a kill has its own cluster.
    options = ["fsync=off", "max_connections=200"]
    with open_folder() as folder, postgres(folder, options=options) as url:
        yield make_url(url)


@pytest.fixture
def empty_database(postgres_url: URL) -> Iterator[str]:
    with new_database(postgres_url) as url:
        yield url


@pytest.fixture
def own_database(postgres_url: URL) -> Iterator[str]:
    """A database at head for one test alone."""
    with database_at_head(postgres_url) as url:
        yield url


@pytest.fixture
async def psql(own_database: str) -> AsyncIterator[Connection]:
    """Another program's connection to `own_database`."""
    async with connected(own_database) as connection:
        yield connection


@pytest.fixture(scope="session")
def database_url(postgres_url: URL) -> Iterator[str]:
    """A database at head that tests share."""
    with database_at_head(postgres_url) as url:
        yield url


@contextmanager
def database_at_head(postgres_url: URL) -> Iterator[str]:
    """Make a database with our tables; remove it."""
    with new_database(postgres_url) as url:
        migrate(make_url(url))
        yield url


@contextmanager
def new_database(postgres_url: URL) -> Iterator[str]:
    """Make a database with nothing in it; remove it."""
    name = f"test_{uuid.uuid4().hex}"

    async def run(statement: str) -> None:
        async with connected(postgres_url) as connection:
            await connection.execute(statement)

    asyncio.run(run(f"CREATE DATABASE {name}"))
    try:
        yield postgres_url.set(database=name).render_as_string(hide_password=False)
    finally:
        asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


def dsn(url: URL | str) -> str:
    """The same URL as libpq and asyncpg write it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@asynccontextmanager
async def connected(url: URL | str) -> AsyncIterator[Connection]:
    """Connect as another program does."""
    connection = await asyncpg.connect(dsn(url))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def database_away(url: str, postgres_url: URL) -> AsyncIterator[None]:
    """Have PostgreSQL end the connections to a database and take no new ones."""
    name = make_url(url).database
    async with connected(postgres_url) as admin:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        ended = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1"
        await admin.fetch(ended, name)
        try:
            yield
        finally:
            await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def client_of(server: multipart.Server) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=server.url, timeout=60)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Connection]:
    """A connection to the shared database."""
    async with connected(database_url) as connection:
        yield connection


@pytest.fixture(scope="session")
def ollama() -> Iterator[FakeOllama]:
    with FakeOllama() as ollama:
        yield ollama


@pytest.fixture(scope="session")
def server(
    database_url: str, ollama: FakeOllama, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server that tests share; it must still be there, and stop cleanly, after them all."""
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, DATABASE_URL=database_url, OLLAMA_URL=ollama.url) as server:
        yield server
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def start_server(database_url: str, tmp_path: Path) -> Iterator[StartServer]:
    """Start further servers with their own settings and options, on the shared database."""
    with ExitStack() as stack:

        def start(*options: str, **settings: str) -> Server:
            folder = tmp_path / uuid.uuid4().hex
            folder.mkdir()
            server = Server(folder, *options, **{"DATABASE_URL": database_url} | settings)
            return stack.enter_context(server)

        yield start


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with open_folder() as folder:
        cluster = Cluster(folder)
        try:
            cluster.start()
            migrate(make_url(cluster.url))
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
async def client(server: Server, database: Connection) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the shared server, with no chatts and no files there."""
    await database.execute("TRUNCATE chatts")
    for path in server.media.iterdir():
        if path.is_file():
            path.unlink()
    async with client_of(server) as client:
        yield client
