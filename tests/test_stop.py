"""The end of a server under load: nobody who was let in goes without an answer."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import stat
import sys
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx2
import psutil
import pytest

from chatterd.listener import Address, Listener
from tests.load import Client, Load, opened
from tests.multipart import until
from tests.process import Server, assert_refused, open_folder, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartServer
    from tests.multipart import Connection

CLIENTS = 40
POST = json.dumps({"name": "ann", "message": "hi"}).encode()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket's."""
    with open_folder() as folder:
        yield folder


def where(kind: str, folder: Path) -> tuple[str, ...]:
    return ("--uds", str(folder / "s")) if kind == "unix" else ()


@pytest.mark.parametrize("kind", ["port", "unix"])
async def test_who_has_connected_when_the_signal_comes_is_answered(
    folder: Path, start_server: StartServer, kind: str
) -> None:
    server = start_server(*where(kind, folder))
    process = psutil.Process(server.pid)
    process.suspend()
    async with opened(server.url, CLIENTS) as clients:
        for client in clients:
            client.send("POST", "/postchatt", POST)
        server.process.send_signal(signal.SIGTERM)
        process.resume()
        await assert_last(clients)
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.log, server.log


# An idle connection stays longer than the second it has, for the tests' own slowness.
SLOWER = """
from chatterd import connection
connection._LAST_SECONDS = 3
from chatterd.cli import main
main()
"""


async def test_a_request_that_comes_on_a_kept_connection_after_the_signal_is_answered(
    tmp_path: Path, database_url: str
) -> None:
    with Server(tmp_path, program=("-c", SLOWER), DATABASE_URL=database_url) as server:
        process = psutil.Process(server.pid)
        async with opened(server.url, 5) as soon, opened(server.url, 5) as late:
            await answered([*soon, *late])
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: not accepts(server))
            for client in soon:
                client.send("POST", "/postchatt", POST)
            await assert_last(soon)
            # Those that come in the moment of closing: the time is over, and what they sent waits.
            process.suspend()
            await asyncio.sleep(3.5)
            for client in late:
                client.send("POST", "/postchatt", POST)
            process.resume()
            await assert_last(late)
        assert await asyncio.to_thread(server.wait) == 0


async def assert_last(clients: list[Client]) -> None:
    """Check that each gets an answer to its post, which says that it is the last."""
    for client in clients:
        assert await client.answer() == (200, b"{}")
        assert client.is_over
        assert await client.rest() == b""


def accepts(server: Server) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=30).close()
    except ConnectionError:
        return False
    return True


async def answered(clients: list[Client]) -> None:
    """Make kept connections of new ones."""
    for client in clients:
        client.send("GET", "/getchatts?limit=1")
        assert (await client.answer())[0] == 200
        assert not client.is_over


async def test_a_request_whose_head_has_begun_is_waited_for(start_server: StartServer) -> None:
    server = start_server()
    async with opened(server.url, 2) as clients, opened(server.url, 1) as (idle,):
        await answered([clients[0], idle])
        begun = b"POST /postchatt HTTP/1.1\r\n"
        for client in clients:
            client.begin(begun)
        server.process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        for client in clients:
            client.send("POST", "/postchatt", POST, begun=begun)
            assert await client.answer() == (200, b"{}")
            assert client.is_over
    assert await asyncio.to_thread(server.wait) == 0


# --- Unix sockets


def test_a_unix_socket_is_for_whoever_may_enter_its_folder(
    folder: Path, start_server: StartServer
) -> None:
    server = start_server("--uds", str(folder / "s"))
    assert server.greeting[0].endswith(f" answers at unix:{folder / 's'}")
    assert stat.S_IMODE((folder / "s").stat().st_mode) == 0o666
    assert sorted(path.name for path in folder.iterdir()) == ["s"]
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(folder / "s"))) as client:
        assert client.get("http://localhost/getchatts").status_code == 200
    assert server.stop() == 0
    assert list(folder.iterdir()) == []


async def test_a_server_takes_the_place_of_another_without_a_moment_between(
    folder: Path, own_database: str, psql: Connection, start_server: StartServer
) -> None:
    path = folder / "s"
    old = start_server("--uds", str(path), DATABASE_URL=own_database)
    async with Load(old.url).going_on(8) as load:
        await load.more(50)
        new = await asyncio.to_thread(start_server, "--uds", str(path), DATABASE_URL=own_database)
        assert await asyncio.to_thread(old.stop) == 0
        assert path.exists(), "the file is the other's by now"
        await load.more(50)
    assert load.failed == []
    rows = await psql.fetch("SELECT message FROM chatts")
    assert sorted(row["message"] for row in rows) == sorted(load.posted)
    assert await asyncio.to_thread(new.stop) == 0
    assert not path.exists()


def test_the_path_leads_to_a_socket_that_listens_at_every_moment(folder: Path) -> None:
    address = Address(uds=folder / "s")
    over = threading.Event()
    refused: list[OSError] = []

    def connect() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(str(address.uds))
                except OSError as error:
                    refused.append(error)

    with ExitStack() as listeners:
        listeners.enter_context(Listener(address))
        connecting = threading.Thread(target=connect)
        connecting.start()
        for _ in range(100):
            listeners.enter_context(Listener(address))
        over.set()
        connecting.join()
    assert refused == []
    assert list(folder.iterdir()) == []


def test_what_a_killed_server_left_is_replaced(folder: Path, start_server: StartServer) -> None:
    killed = start_server("--uds", str(folder / "s"))
    killed.kill()
    assert (folder / "s").exists()
    server = start_server("--uds", str(folder / "s"))
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(folder / "s"))) as client:
        assert client.get("http://localhost/getchatts").status_code == 200
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a-file", ["a-file", "no socket"]),
        ("none/s", ["none/s", "No such file"]),
        ("x" * 108, ["too long", "95"]),
    ],
)
def test_a_path_that_cannot_be_a_socket_s_is_refused(
    folder: Path, database_url: str, path: str, words: list[str]
) -> None:
    (folder / "a-file").write_text("kept")
    done = run(folder, "serve", "--uds", path, DATABASE_URL=database_url)
    assert_refused(done, *words)
    assert (folder / "a-file").read_text() == "kept"


def test_a_descriptor_that_does_not_listen_is_refused(folder: Path, database_url: str) -> None:
    for descriptor in ("0", "99"):
        done = run(folder, "serve", "--fd", descriptor, DATABASE_URL=database_url)
        assert_refused(done, f"descriptor {descriptor}")


# --- What whoever started it is told


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_it_says_when_it_is_ready_alive_and_stopping(
    folder: Path, start_server: StartServer, kind: str
) -> None:
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has abstract sockets")
    address = str(folder / "notify") if kind == "path" else f"\0{folder}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as signs:
        signs.bind(address)
        signs.settimeout(30)
        server = start_server(NOTIFY_SOCKET=address.replace("\0", "@"), WATCHDOG_USEC="1000000")
        said = [signs.recv(4096) for _ in range(4)]
        assert said.count(b"READY=1") == 1
        assert said.count(b"WATCHDOG=1") == 3
        server.process.terminate()
        while (word := signs.recv(4096)) == b"WATCHDOG=1":
            pass
        assert word == b"STOPPING=1"
    assert server.wait() == 0
    assert server.log == ""


# --- Connections on which nothing comes


IMPATIENT = """
from chatterd import connection, server
connection._HEAD_SECONDS, connection._LOOK_SECONDS = 1, 0.25
server.KEEP_ALIVE_SECONDS = 3
from chatterd.cli import main
main()
"""


def test_a_head_has_less_time_than_a_kept_connection(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, program=("-c", IMPATIENT), DATABASE_URL=database_url) as server:
        host, port = server.url.removeprefix("http://").split(":")

        def life(first: bytes, then: bytes) -> float:
            """How long a connection stays on which this is sent, and then that, bit by bit."""
            with socket.create_connection((host, int(port)), timeout=0.2) as client:
                client.sendall(first)
                begin = time.monotonic()
                for byte in then * 100:
                    try:
                        while data := client.recv(65_536):
                            assert data.startswith(b"HTTP/1.1 200")
                        break
                    except TimeoutError:
                        client.sendall(bytes([byte]))
                    except ConnectionError:
                        break
                return time.monotonic() - begin

        request = b"HEAD /getchatts HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert 0.5 < life(b"GET", b" ") < 3
        assert 0.5 < life(request, b"G") < 3
        assert 2.5 < kept_for(host, int(port), request) < 10
        assert server.stop() == 0


def kept_for(host: str, port: int, request: bytes) -> float:
    with socket.create_connection((host, port), timeout=30) as client:
        client.sendall(request)
        begin = time.monotonic()
        while client.recv(65_536):
            pass
        return time.monotonic() - begin
