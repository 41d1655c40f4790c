"""The process: start, stop, kill, a database that goes and comes back, and what is logged."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import anyio
import asyncpg
import httpx2
import psutil
import pytest
from sqlalchemy.engine import make_url

from chatterd import __version__
from chatterd.database import migrate
from chatterd.embedded import postgres
from tests.conftest import client_of, connected, waiting_for
from tests.multipart import connect, encode, fields, files, form_type, image, kept, until
from tests.process import (
    Server,
    assert_refused,
    environment,
    open_folder,
    run,
    running,
    wait_until,
)
from tests.samples import JPEG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from tests.conftest import StartServer
    from tests.multipart import Response
    from tests.ollama import FakeOllama

    Situation: TypeAlias = Callable[[Server, FakeOllama], AbstractAsyncContextManager[None]]

ROOT = Path(__file__).parent.parent
# Ctrl-C stops everything within this time, where clients end what they do, or get no time for it.
STOP_SECONDS = 3
SHUTDOWN_TIMEOUT = 30  # the default
PASSWORD = "geheim"  # noqa: S105 - of databases that ask for none, or that refuse it
BIG_FILE = "big.mp4"


class Cluster:
    """A PostgreSQL of the test's own, to be stopped and started under a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running = ExitStack()
        self.url = self.start()

    def start(self) -> str:
        return self._running.enter_context(postgres(self.folder, options=["fsync=off"]))

    def stop(self) -> None:
        self._running.close()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let connections be accepted and nothing be answered, as on a stuck disk."""
        stopped = running(self.folder)
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    async def messages(self) -> list[str]:
        async with connected(self.url) as connection:
            return [row[0] for row in await connection.fetch("SELECT message FROM chatts")]

    async def execute(self, statement: str) -> None:
        async with connected(self.url) as connection:
            await connection.execute(statement)


@pytest.fixture(scope="module")
def cluster_folder() -> Iterator[Path]:
    with open_folder() as folder:
        cluster = Cluster(folder)
        try:
            migrate(make_url(cluster.url))
        finally:
            cluster.stop()
        yield folder


@pytest.fixture
async def cluster(cluster_folder: Path) -> AsyncIterator[Cluster]:
    """A cluster with an empty table at head; it is running."""
    cluster = Cluster(cluster_folder)
    try:
        await cluster.execute("TRUNCATE chatts")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder where an embedded PostgreSQL can lie whoever runs the tests."""
    with open_folder() as folder:
        yield folder


# --- Start


def test_the_start_prints_the_address_the_database_and_the_media_folder(
    start_server: StartServer, database_url: str
) -> None:
    url = make_url(database_url)
    if url.password is None:
        url = url.set(password=PASSWORD)
    server = start_server(DATABASE_URL=url.render_as_string(hide_password=False))
    address, database, media = server.greeting
    assert address.startswith(f"chatterd {__version__} answers at http://127.0.0.1:")
    assert database.startswith("database: PostgreSQL, postgresql")
    assert str(url.database) in database
    assert str(url.password) not in database
    assert media == f"media: {server.media}"
    assert httpx2.get(f"{server.url}/getchatts").status_code == 200
    server.process.terminate()
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""
    assert server.wait() == 0
    assert server.log == ""


def test_ipv6_is_listened_on_when_it_is_asked_for(start_server: StartServer) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    server = start_server("--host", "::1")
    assert server.url.startswith("http://[::1]:")
    assert httpx2.get(f"{server.url}/getchatts").status_code == 200


def test_an_empty_database_is_refused_until_it_is_migrated(
    tmp_path: Path, empty_database: str, start_server: StartServer
) -> None:
    refused = run(tmp_path, "serve", "--port", "0", DATABASE_URL=empty_database)
    assert_refused(refused, "chatterd migrate")
    assert run(tmp_path, "migrate", DATABASE_URL=empty_database).returncode == 0
    server = start_server(DATABASE_URL=empty_database)
    assert httpx2.get(f"{server.url}/getchatts").content == b"[]"


def test_the_embedded_database_is_migrated_by_itself_and_stops_with_the_server(
    open_path: Path,
) -> None:
    with Server(open_path) as server:
        assert server.greeting[1].startswith("database: embedded PostgreSQL, ")
        assert httpx2.get(f"{server.url}/getchatts").content == b"[]"
        assert running(open_path / "var") != []
        assert server.stop() == 0
        assert server.log == ""
    assert running(open_path / "var") == []
    assert sorted(path.name for path in open_path.iterdir()) == ["stderr", "var"]


def test_a_second_server_on_the_same_folder_is_told_who_uses_it(open_path: Path) -> None:
    with Server(open_path) as server:
        assert_refused(run(open_path, "serve", "--port", "0"), f"process {server.pid}")
        assert_refused(run(open_path, "migrate"), f"process {server.pid}")
        assert httpx2.get(f"{server.url}/getchatts").status_code == 200
        assert server.stop() == 0


def test_a_database_that_does_not_exist_is_refused(tmp_path: Path, database_url: str) -> None:
    url = make_url(database_url).set(database="not_there").render_as_string(hide_password=False)
    assert_refused(run(tmp_path, "serve", "--port", "0", DATABASE_URL=url), "not_there")


async def test_a_wrong_password_is_refused_and_not_repeated(
    tmp_path: Path, cluster: Cluster
) -> None:
    await cluster.execute(f"ALTER ROLE chatterd PASSWORD '{PASSWORD}-right'")
    rules = cluster.folder / "postgres" / "pg_hba.conf"
    kept = rules.read_text()
    rules.write_text("local all all scram-sha-256\n")
    try:
        await cluster.execute("SELECT pg_reload_conf()")
        url = make_url(cluster.url).set(password=PASSWORD).render_as_string(hide_password=False)
        with anyio.fail_after(30):
            while not await asks_for_a_password(url):  # noqa: ASYNC110 - PostgreSQL has no event for it
                await anyio.sleep(0.01)  # PostgreSQL reads its rules again in its own time
        for command in (("serve", "--port", "0"), ("migrate",)):
            done = run(tmp_path, *command, DATABASE_URL=url)
            assert_refused(done, "password", "chatterd")
            assert PASSWORD not in done.stderr
    finally:
        rules.write_text(kept)


async def asks_for_a_password(url: str) -> bool:
    try:
        async with connected(url):
            return False
    except asyncpg.InvalidPasswordError:
        return True


def test_a_port_in_use_is_refused(tmp_path: Path, database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(tmp_path, "serve", "--port", port, DATABASE_URL=database_url)
    assert_refused(done, port, "in use")


def test_a_host_that_is_not_ours_is_refused(tmp_path: Path, database_url: str) -> None:
    # 192.0.2.0/24 is for documentation (RFC 5737): no machine has such an address.
    done = run(tmp_path, "serve", "--host", "192.0.2.1", "--port", "0", DATABASE_URL=database_url)
    assert_refused(done, "192.0.2.1")


@pytest.mark.parametrize("folder", ["a-file/media", "/proc/media"])
def test_a_media_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, database_url: str, folder: str
) -> None:
    (tmp_path / "a-file").touch()
    done = run(tmp_path, "serve", "--port", "0", DATABASE_URL=database_url, MEDIA_ROOT=folder)
    assert_refused(done, "MEDIA_ROOT", folder)


# --- Stop


@asynccontextmanager
async def idle(_server: Server, _ollama: FakeOllama) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def endless_answer(server: Server, ollama: FakeOllama) -> AsyncIterator[None]:
    ollama.forget()
    prompt = json.dumps({"model": "slow", "prompt": "hi"})
    async with (
        httpx2.AsyncClient(timeout=30) as client,
        client.stream("POST", f"{server.url}/llmprompt", content=prompt) as answer,
    ):
        lines = answer.aiter_lines()
        assert "hi" in await anext(lines)
        yield
        await lines.aclose()  # type: ignore[attr-defined]  # it is a generator
    assert ollama.wait_for_disconnect(STOP_SECONDS)


@asynccontextmanager
async def half_an_upload(server: Server, _ollama: FakeOllama) -> AsyncIterator[None]:
    form = encode(*fields(), image(JPEG + bytes(4 * 2**20)))
    length = f"Content-Length: {len(form)}"
    type_line = f"Content-Type: {form_type()['Content-Type']}"
    async with connect(server.url) as wire:
        await wire.request("POST", "/postimages", length, type_line)
        await wire.send(form[: 2 * 2**20])
        await until(lambda: files(server.media) != [])
        yield
    assert [name for name in files(server.media) if name != BIG_FILE] == []


@asynccontextmanager
async def half_a_head(server: Server, _ollama: FakeOllama) -> AsyncIterator[None]:
    async with connect(server.url) as wire:
        await wire.send(b"GET /getchatts HTTP/1.1\r\nHos")
        yield


@asynccontextmanager
async def a_kept_connection(server: Server, _ollama: FakeOllama) -> AsyncIterator[None]:
    async with connect(server.url) as wire:
        await wire.request("GET", "/getchatts")
        assert (await wire.answer()).status_code == 200
        yield


@asynccontextmanager
async def a_client_that_does_not_read(server: Server, _ollama: FakeOllama) -> AsyncIterator[None]:
    with (server.media / BIG_FILE).open("wb") as file:
        file.truncate(2**28)
    async with connect(server.url) as wire:
        await wire.request("GET", f"/media/{BIG_FILE}")
        process = psutil.Process(server.pid)
        await until(lambda: any(path.endswith(BIG_FILE) for path, *_ in process.open_files()))
        yield


@asynccontextmanager
async def everything(server: Server, ollama: FakeOllama) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for situation in (
            half_an_upload,
            endless_answer,
            half_a_head,
            a_kept_connection,
            a_client_that_does_not_read,
        ):
            await stack.enter_async_context(situation(server, ollama))
        yield


def assert_stops(server: Server, signum: int) -> None:
    started = time.monotonic()
    server.process.send_signal(signum)
    assert server.wait() == 0, server.log
    assert time.monotonic() - started < STOP_SECONDS


@pytest.mark.parametrize(
    ("situation", "signum"),
    [
        (idle, signal.SIGINT),
        (idle, signal.SIGTERM),
        (endless_answer, signal.SIGTERM),
        (half_an_upload, signal.SIGTERM),
        (half_a_head, signal.SIGTERM),
        (a_kept_connection, signal.SIGTERM),
        (a_client_that_does_not_read, signal.SIGTERM),
        (everything, signal.SIGINT),
    ],
)
async def test_a_signal_stops_the_server_within_three_seconds(
    start_server: StartServer, ollama: FakeOllama, situation: Situation, signum: int
) -> None:
    # Nobody has anything under way; the others go on for ever, and get a second for it.
    settings = {} if situation in {idle, a_kept_connection} else {"SHUTDOWN_TIMEOUT": "1"}
    server = start_server(OLLAMA_URL=ollama.url, **settings)
    async with situation(server, ollama):
        assert_stops(server, signum)
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("situation", "signum"),
    [(idle, signal.SIGINT), (everything, signal.SIGINT), (everything, signal.SIGTERM)],
)
async def test_a_signal_stops_the_embedded_database_too_and_leaves_nothing_locked(
    open_path: Path, ollama: FakeOllama, situation: Situation, signum: int
) -> None:
    with Server(open_path, OLLAMA_URL=ollama.url, SHUTDOWN_TIMEOUT="0") as server:
        async with situation(server, ollama):
            assert_stops(server, signum)
    assert running(open_path / "var") == []
    with Server(open_path) as server:
        assert httpx2.get(f"{server.url}/getchatts").status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_stops_at_once_and_breaks_nothing(
    open_path: Path, ollama: FakeOllama, signum: int
) -> None:
    with Server(open_path, OLLAMA_URL=ollama.url) as server:
        async with everything(server, ollama):
            server.process.send_signal(signum)
            await until(lambda: not accepts(server))
            started = time.monotonic()
            server.process.send_signal(signum)
            assert server.wait() == 128 + signum
            assert time.monotonic() - started < SHUTDOWN_TIMEOUT / 3
        assert "Traceback" not in server.log
    assert running(open_path / "var") == []


def accepts(server: Server) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=30).close()
    except ConnectionError:
        return False
    return True


def test_many_signals_do_not_break_the_stop(open_path: Path) -> None:
    with Server(open_path) as server:
        for _ in range(5):
            server.process.send_signal(signal.SIGINT)
        assert server.wait() in {0, 130}  # several that come together may be taken for one
        assert "Traceback" not in server.log
    assert running(open_path / "var") == []


def test_a_signal_during_the_start_leaves_nothing_running(open_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "chatterd", "serve", "--port", "0"],
        cwd=open_path,
        env=environment(open_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: running(open_path / "var") != [])
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=STOP_SECONDS * 5)
    assert "Traceback" not in said
    assert running(open_path / "var") == []
    with Server(open_path) as server:
        assert httpx2.get(f"{server.url}/getchatts").content == b"[]"
        assert server.stop() == 0


async def test_a_post_in_flight_gets_its_answer_before_the_end(
    start_server: StartServer, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    await database.execute("TRUNCATE chatts")
    server = start_server()
    lock = database.transaction()
    await lock.start()
    await database.execute("LOCK TABLE chatts IN ACCESS EXCLUSIVE MODE")
    async with httpx2.AsyncClient(timeout=30) as client:
        chatt = {"name": "ann", "message": "in flight"}
        post = asyncio.create_task(client.post(f"{server.url}/postchatt", json=chatt))
        with anyio.fail_after(30):
            while not await waiting_for("chatts", database):  # noqa: ASYNC110 - PostgreSQL has no event for it
                await anyio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        await lock.commit()
        answer = await post
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert server.wait() == 0
    assert await database.fetchval("SELECT message FROM chatts") == "in flight"


# --- Connections


def connections(server: Server) -> int:
    """How many clients the server has a connection of."""
    port = int(server.url.rpartition(":")[2])
    ours = psutil.Process(server.pid).net_connections("tcp")
    return sum(1 for one in ours if one.laddr.port == port and one.status != psutil.CONN_LISTEN)


@contextmanager
def answered_connection(server: Server) -> Iterator[socket.socket]:
    """A connection on which a request has been answered, and no other follows."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        # Without a body: what is left unread would make a reset of the end.
        client.sendall(b"HEAD /media/none HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 404 ")
        yield client


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the segments")
def test_a_small_answer_is_one_segment(start_server: StartServer) -> None:
    with answered_connection(start_server()) as client:
        assert received_segments(client) == 1
        client.sendall(b"GET /media/none HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65_536).endswith(b"}")
        assert received_segments(client) == 2


def received_segments(client: socket.socket) -> int:
    """How many TCP segments with data have come: `tcpi_data_segs_in` in Linux's `tcp_info`."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    count: int = struct.unpack_from("I", info, 152)[0]
    return count


def test_the_connection_of_a_client_that_has_left_is_given_back_at_once(
    start_server: StartServer,
) -> None:
    server = start_server()
    with answered_connection(server):
        assert connections(server) == 1
    left = time.monotonic()
    wait_until(lambda: connections(server) == 0)
    # Not only when an idle connection is closed.
    assert time.monotonic() - left < 3


# --- Kill


async def test_a_kill_loses_no_chatt_that_was_answered(open_path: Path) -> None:
    posted = Posts()
    with Server(open_path) as server:
        async with posted.going_on(server.url, count=8):
            await until(lambda: len(posted.acknowledged) >= 100)
            server.kill()
    with Server(open_path) as server:
        feed = httpx2.get(f"{server.url}/getchatts").json()
        assert server.stop() == 0
    posted.assert_in([message for _, message, *_ in feed])


class Posts:
    """Clients that post one chatt after the other, each with a message of its own."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.refused: list[httpx2.Response] = []

    @asynccontextmanager
    async def going_on(self, url: str, count: int) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(self._post, url, number)
            yield
            tasks.cancel_scope.cancel()

    async def _post(self, url: str, client_number: int) -> None:
        async with httpx2.AsyncClient(timeout=30) as client:
            number = 0
            # A server that was killed ends it.
            with suppress(httpx2.TransportError):
                while True:
                    number += 1
                    message = f"{client_number}-{number}"
                    chatt = {"name": "ann", "message": message}
                    answer = await client.post(f"{url}/postchatt", json=chatt)
                    if answer.status_code == 200:
                        self.acknowledged.append(message)
                    else:
                        self.refused.append(answer)

    async def more(self, answers: Sequence[object], count: int) -> None:
        """Wait for so many more answers of this kind."""
        wanted = len(answers) + count
        await until(lambda: len(answers) >= wanted)

    def assert_in(self, messages: list[str]) -> None:
        """Check that each acknowledged message is there, and none twice."""
        assert set(self.acknowledged) <= set(messages)
        assert len(messages) == len(set(messages))


# --- The database goes, and comes back


async def answers(url: str, media: Path) -> dict[str, httpx2.Response]:
    """What every route that needs the database says."""
    chatt = {"name": "ann", "message": "hi"}
    form = encode(*fields(), image(JPEG))
    async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
        requests = {
            "getchatts": client.get("/getchatts"),
            "getimages": client.get("/getimages"),
            "head": client.head("/getchatts"),
            "postchatt": client.post("/postchatt", json=chatt),
            "postimages": client.post("/postimages", content=form, headers=form_type()),
        }
        said = dict(zip(requests, await asyncio.gather(*requests.values()), strict=True))
    assert files(media) == [] or said["postimages"].status_code == 200
    return said


def assert_unavailable(said: dict[str, httpx2.Response], seconds: float) -> None:
    for route, answer in said.items():
        assert answer.status_code == 503, route
        assert int(answer.headers["retry-after"]) > 0
        assert answer.elapsed.total_seconds() < seconds, route
        if route != "head":
            assert_problem(answer, "database-unavailable")


def assert_problem(answer: Response, code: str) -> None:
    assert answer.headers["content-type"] == "application/problem+json"
    document = json.loads(answer.content)
    assert (document["status"], document["code"]) == (answer.status_code, code)


async def test_a_server_starts_without_its_database_and_serves_when_it_comes(
    cluster: Cluster, start_server: StartServer
) -> None:
    cluster.stop()
    settings = {"DATABASE_TIMEOUT": "20", "LOG_LEVEL": "info"}
    server = start_server(DATABASE_URL=cluster.url, **settings)
    assert server.log.count("\n") == 1
    assert "503" in server.log
    # At once: not after DATABASE_TIMEOUT.
    assert_unavailable(await answers(server.url, server.media), seconds=5)
    (server.media / "there.jpeg").write_bytes(JPEG)
    assert httpx2.get(f"{server.url}/media/there.jpeg").content == JPEG
    (server.media / "there.jpeg").unlink()
    cluster.start()
    said = await answers(server.url, server.media)
    assert {answer.status_code for answer in said.values()} == {200}
    assert await cluster.messages() == ["hi", "hi"]
    assert server.stop() == 0
    assert "Traceback" not in server.log
    of_database = '"logger":"chatterd.database"'
    assert server.log.count(of_database) == 2, "one line when it goes, one when it is back"


async def test_an_upload_whose_database_has_just_gone_leaves_no_file(
    cluster: Cluster, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=cluster.url)
    form = encode(*fields(), image(JPEG))
    url = f"{server.url}/postimages"
    assert httpx2.post(url, content=form, headers=form_type()).status_code == 200
    before = kept(server.media)
    cluster.stop()
    for _ in range(2):
        answer = httpx2.post(url, content=form, headers=form_type())
        assert_problem(answer, "database-unavailable")
        assert kept(server.media) == before


async def test_a_database_that_comes_unmigrated_is_unavailable_until_it_is_migrated(
    open_path: Path, tmp_path: Path, start_server: StartServer
) -> None:
    cluster = Cluster(open_path)
    cluster.stop()
    server = start_server(DATABASE_URL=cluster.url)
    cluster.start()
    try:
        assert_unavailable(await answers(server.url, server.media), seconds=5)
        assert "chatterd migrate" in server.log
        assert run(tmp_path, "migrate", DATABASE_URL=cluster.url).returncode == 0
        said = await answers(server.url, server.media)
        assert {answer.status_code for answer in said.values()} == {200}
    finally:
        cluster.stop()


async def test_a_restart_of_the_database_costs_503s_and_no_acknowledged_chatt(
    cluster: Cluster, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=cluster.url)
    posted = Posts()
    async with posted.going_on(server.url, count=8):
        for _ in range(2):
            await posted.more(posted.acknowledged, 50)
            cluster.stop()
            await posted.more(posted.refused, 1)
            cluster.start()
        await posted.more(posted.acknowledged, 50)
    for answer in posted.refused:
        assert_problem(answer, "database-unavailable")
    posted.assert_in(await cluster.messages())
    assert "Traceback" not in server.log


async def test_a_database_that_hangs_is_given_up_after_its_timeout(
    cluster: Cluster, start_server: StartServer
) -> None:
    # So long that waiting twice is seen, also on a busy machine.
    server = start_server(DATABASE_URL=cluster.url, DATABASE_TIMEOUT="4")
    chatt = {"name": "ann", "message": "hi"}
    async with client_of(server) as client:
        with cluster.hanging():
            # One of them has the connection of the start, the others have to make theirs.
            assert_unavailable(await answers(server.url, server.media), seconds=7)
            # More than there are connections.
            for answer in await asyncio.gather(
                *(client.post("/postchatt", json=chatt) for _ in range(30))
            ):
                assert_problem(answer, "database-unavailable")
        said = await answers(server.url, server.media)
        assert {answer.status_code for answer in said.values()} == {200}
    assert_stops(server, signal.SIGTERM)


async def test_a_server_stops_in_time_while_its_database_hangs(
    cluster: Cluster, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=cluster.url)
    async with client_of(server) as client:
        assert (await client.get("/getchatts")).status_code == 200
        with cluster.hanging():
            get = asyncio.create_task(client.get("/getchatts"))
            await until(lambda: not get.done())
            assert_stops(server, signal.SIGTERM)
        await asyncio.gather(get, return_exceptions=True)


# --- Uploads


async def test_an_upload_that_stops_coming_is_answered_and_leaves_nothing(
    start_server: StartServer,
) -> None:
    server = start_server(UPLOAD_TIMEOUT="1")
    form = encode(*fields(), image(JPEG + bytes(4 * 2**20)))
    type_line = f"Content-Type: {form_type()['Content-Type']}"
    for length_line, whole in (
        (f"Content-Length: {len(form)}", True),
        ("Transfer-Encoding: chunked", False),
    ):
        async with connect(server.url) as wire:
            await wire.request("POST", "/postimages", length_line, type_line)
            part = form[: 2 * 2**20]
            await (wire.send(part) if whole else wire.send_chunk(part))
            await until(lambda: files(server.media) != [])
            answer = await wire.answer("POST")
        assert answer.status_code == 408
        assert_problem(answer, "request-timeout")
        await until(lambda: files(server.media) == [])
    assert httpx2.get(f"{server.url}/getchatts").status_code == 200


# --- Many at once


async def test_posts_of_64_connections_are_all_there_once_and_in_the_order_of_the_log(
    server: Server, client: httpx2.AsyncClient, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    async def post(number: int) -> None:
        async with connect(server.url) as wire:
            for spelling, path in (("name", "/postchatt"), ("username", "/postchatt/")):
                body = json.dumps({spelling: "ann", "message": f"{number} {spelling}"}).encode()
                await wire.request("POST", path, f"Content-Length: {len(body)}")
                await wire.send(body)
                answer = await wire.answer("POST")
                assert (answer.status_code, answer.content) == (200, b"{}")

    await asyncio.gather(*(post(number) for number in range(64)))
    feed = [row[1] for row in (await client.get("/getchatts")).json()]
    assert sorted(feed) == sorted(
        f"{number} {spelling}" for number in range(64) for spelling in ("name", "username")
    )
    log = [row[0] for row in await database.fetch("SELECT message FROM chatts ORDER BY seq")]
    assert feed == log


# --- The log


async def test_the_log_holds_nothing_that_people_wrote_and_no_password(
    cluster: Cluster, start_server: StartServer
) -> None:
    marker = "MARKER-7f3a"
    url = make_url(cluster.url).set(password=PASSWORD).render_as_string(hide_password=False)
    server = start_server(DATABASE_URL=url, OLLAMA_URL="http://127.0.0.1:1")
    refused = "CHECK (message NOT LIKE '%MARKER%' AND name NOT LIKE '%MARKER%') NOT VALID"
    marked = {"name": marker, "message": marker}
    bodies = [
        json.dumps(marked),
        json.dumps({"name": "ann", "message": marker}),
        json.dumps({"name": marker, "message": marker * 1000}),
        json.dumps({"name": marker * 30, "message": marker}),
        json.dumps(marked | {marker: marker}),
        json.dumps({"name": marker, "message": f"{marker}\0"}),
        f'{{"name": "{marker}", "message": "\\ud800 {marker}"}}',
        f'{{"name": "{marker}", "message": "{marker}',
        json.dumps({"name": "", "message": marker}),
        json.dumps(marked) + " " * 70000,
    ]
    form = encode(*fields(marker, marker), image(JPEG))
    async with client_of(server) as client:

        async def post_all() -> list[int]:
            statuses = [
                (await client.post("/postchatt", content=body)).status_code for body in bodies
            ]
            for content in (form, form[:-10], encode(*fields(marker * 30, marker), image(JPEG))):
                answer = await client.post("/postimages", content=content, headers=form_type())
                statuses.append(answer.status_code)
            statuses.append((await client.post("/llmprompt", content=marker)).status_code)
            statuses.append((await client.get(f"/{marker}?a={marker}")).status_code)
            return statuses

        await cluster.execute(f"ALTER TABLE chatts ADD CONSTRAINT refused {refused}")
        try:
            statuses = await post_all()
            assert statuses[:2] == [422, 422]
            assert set(statuses) <= {400, 404, 413, 422, 502}
        finally:
            await cluster.execute("ALTER TABLE chatts DROP CONSTRAINT refused")
        cluster.stop()
        assert (await post_all())[:2] == [503, 503]
    assert not any(marker in name for name in files(server.media))
    assert server.stop() == 0
    assert "CheckViolation" in server.log, "somebody must be able to find the fault"
    assert "MARKER" not in server.log
    assert PASSWORD not in server.log


# --- Other ways to start it


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def get(url: str) -> httpx2.Response | None:
    try:
        return httpx2.get(url, timeout=5)
    except httpx2.TransportError:
        return None


def test_hypercorn_serves_the_application_by_itself(tmp_path: Path, own_database: str) -> None:
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hypercorn", "chatterd.app:app", "--bind", f"127.0.0.1:{port}"],
            cwd=tmp_path,
            env=environment(tmp_path, DATABASE_URL=own_database),
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: get(f"{url}/getchatts") is not None)
        chatt = {"name": "ann", "message": "by hypercorn"}
        assert httpx2.post(f"{url}/postchatt", json=chatt).content == b"{}"
        assert httpx2.get(f"{url}/getchatts").json()[-1][:2] == ["ann", "by hypercorn"]
        assert httpx2.get(f"{url}/nowhere").json()["code"] == "not-found"
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_hypercorn_without_a_database_url_is_told_what_to_do(tmp_path: Path) -> None:
    bind = f"127.0.0.1:{free_port()}"
    done = run(tmp_path, "chatterd.app:app", "--bind", bind, program="hypercorn")
    # Starlette and Hypercorn put what the lifespan raises at the end of a traceback, in quotes.
    said = (done.stdout + done.stderr).rstrip("'\n").splitlines()
    assert "DATABASE_URL is not set" in said[-1]
    assert "chatterd serve" in said[-1]


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_reload_restarts_on_a_change_and_ends_with_everything(open_path: Path, how: str) -> None:
    for name in ("chatterd", "alembic"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, open_path / name, ignore=ignored)
    url = f"http://127.0.0.1:{free_port()}"
    with (open_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatterd", "serve", "--reload", "--port", url.split(":")[2]],
            cwd=open_path,
            env=environment(open_path),
            stdout=log,
            stderr=log,
            start_new_session=True,  # as a terminal's job has a process group of its own
        )
    try:
        wait_until(lambda: get(f"{url}/getchatts") is not None)
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
        source = open_path / "chatterd" / "errors.py"
        text = source.read_text()
        assert "There is nothing at this address." in text
        source.write_text(text.replace("There is nothing at this address.", "It has changed."))
        wait_until(lambda: "It has changed." in getattr(get(f"{url}/nowhere"), "text", ""))
        family += psutil.Process(process.pid).children(recursive=True)
        if how == "Ctrl-C":  # which a terminal sends to everything in it
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        process.wait(20)
        psutil.wait_procs(family, timeout=5)
        assert [each for each in family if each.is_running()] == []
        assert running(open_path / "var") == []
        assert "Traceback" not in (open_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
