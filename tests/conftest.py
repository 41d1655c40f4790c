"""What tests share: a real PostgreSQL, and real `chatterd serve` processes on it."""

import asyncio
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import asyncpg
import httpx2
import pytest
from sqlalchemy.engine import URL, make_url

from chatterd.database import migrate
from chatterd.embedded import postgres
from tests.ollama import FakeOllama
from tests.process import Server

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
    folder = Path(tempfile.mkdtemp(prefix="chatterd-test-"))
    folder.chmod(0o755)  # when the tests run as root, PostgreSQL does not
    try:
        # Nothing here has to survive a power cut; what must survive a kill has its own cluster.
        with postgres(folder, options=["fsync=off", "max_connections=200"]) as url:
            yield make_url(url)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def empty_database(postgres_url: URL) -> Iterator[str]:
    with _new_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="session")
def database_url(postgres_url: URL) -> Iterator[str]:
    """A database at head that tests share."""
    with _new_database(postgres_url) as url:
        migrate(make_url(url))
        yield url


@contextmanager
def _new_database(postgres_url: URL) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(dsn(postgres_url))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run(f"CREATE DATABASE {name}"))
    try:
        yield postgres_url.set(database=name).render_as_string(hide_password=False)
    finally:
        asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


def dsn(url: URL | str) -> str:
    """The same URL as libpq and asyncpg write it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to the shared database."""
    connection = await asyncpg.connect(dsn(database_url))
    try:
        yield connection
    finally:
        await connection.close()


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
async def client(
    server: Server, database: "asyncpg.Connection[asyncpg.Record]"
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the shared server, with no chatts and no files there."""
    await database.execute("TRUNCATE chatts")
    for path in server.media.iterdir():
        if path.is_file():
            path.unlink()
    async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
        yield client
