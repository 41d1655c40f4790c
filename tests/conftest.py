"""What tests share: a real PostgreSQL, and real `chatterd serve` processes on it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
import httpx2
import pytest
from sqlalchemy.engine import URL, make_url

from chatterd.database import migrate
from chatterd.embedded import postgres
from chatterd.embedded_home import SYSTEM_FOLDER
from tests.nginx import Certificate, Nginx
from tests.ollama import FakeOllama
from tests.process import Cluster, Server, open_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests import multipart
    from tests.multipart import Connection

StartServer: TypeAlias = Callable[..., Server]

# What stands in front of the shared server: nothing, or an Nginx that is spoken to over TLS, in
# HTTP/1.1 (nginx) or HTTP/2 (nginx-h2).
THROUGH = os.environ.get("TEST_THROUGH", "")
assert THROUGH in {"", "nginx", "nginx-h2"}, THROUGH

# A shell starts what it puts into the background with SIGINT ignored, and so would be the servers
# started here, which are to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

MEMORY = Path("/dev/shm")  # noqa: S108 - what is made there gets a fresh name
MEMORY_BYTES = 4 * 1024**3


def _keep_temporary_files_in_memory() -> None:
    """Have temporary folders made in memory where it is large enough, and nobody said TMPDIR.

    Clusters of PostgreSQL and media folders are thousands of small files, synced one by one: half
    of the tests' time would be the disk's. Nothing here has to outlive the machine.
    """
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK):
        return
    may_execute = not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    if may_execute and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # not the answer of before


_keep_temporary_files_in_memory()


def pytest_xdist_auto_num_workers() -> int:
    """Let one more than there are processors run tests: many of them wait."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longer than others, lest all wait for them at the end."""
    usual = float(config.getini("timeout"))

    def is_short(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("timeout")
        return marker is None or marker.args[0] <= usual

    items.sort(key=is_short)
    if not THROUGH:
        return
    # What does not go through Nginx is left out where the tests are run through it.
    left_out = [item for item in items if not _asks_the_shared_server(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        direct = item.get_closest_marker("direct")
        if direct and direct.kwargs.get("through", THROUGH) == THROUGH:
            item.add_marker(pytest.mark.skip(reason=direct.kwargs["reason"]))


def _asks_the_shared_server(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    return "server" in fixtures and "start_server" not in fixtures


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _no_cluster_is_left_outside_the_folders_of_the_tests() -> Iterator[None]:
    """Where root runs the tests, an embedded database below `tmp_path` would not lie there.

    It would outlive the test, and be there when another test's folder has the same path.
    """
    before = _clusters()
    yield
    assert _clusters() <= before, "use open_folder for a server with the embedded database"


def _clusters() -> set[Path]:
    return {path.parent for path in SYSTEM_FOLDER.glob("*/PG_VERSION")}


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


async def waiting_for(table: str, psql: Connection) -> int:
    """How many wait for a lock on a table; pg_stat_activity would not change in a transaction."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass"
    count: int = await psql.fetchval(waiting, table)
    return count


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
    return httpx2.AsyncClient(base_url=server.url, timeout=60, http2=THROUGH == "nginx-h2")


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
    settings = {"DATABASE_URL": database_url, "OLLAMA_URL": ollama.url}
    with Server(folder, TRUSTED_PROXIES="127.0.0.1", **settings) as server, ExitStack() as stack:
        if THROUGH:
            stack.enter_context(_through_nginx(server, tmp_path_factory.mktemp("nginx")))
        yield server
        stack.close()
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log


@contextmanager
def _through_nginx(server: Server, folder: Path) -> Iterator[None]:
    """Have the server's URL be that of an Nginx in front of it, whose certificate all trust."""
    certificate = Certificate(folder)
    with (
        pytest.MonkeyPatch.context() as patch,
        Nginx(folder, server.url, certificate=certificate, media=server.media) as nginx,
    ):
        # OpenSSL reads it, and so does every client here.
        patch.setenv("SSL_CERT_FILE", str(certificate.authority))
        patch.setattr(server, "url", nginx.url)
        yield


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
