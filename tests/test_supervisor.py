"""Several processes: one that dies, hangs or is replaced takes no request of the others with it."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.conftest import connected, database_at_head
from tests.load import Load, opened
from tests.multipart import until
from tests.process import Server, assert_refused, open_folder, run, running, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from sqlalchemy.engine import URL

    from tests.multipart import Connection

WORKERS = 2
CLIENTS = 8


def workers(server: Server) -> list[psutil.Process]:
    """The processes that serve; each stays the same object as long as it runs."""
    found = []
    for child in psutil.Process(server.pid).children():
        with suppress(psutil.Error):  # it has just ended
            if "--fd" in child.cmdline():
                found.append(child)
    return found


def is_alive(worker: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return worker.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def database_of_all(postgres_url: URL) -> Iterator[str]:
    with database_at_head(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def supervised(database_of_all: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of several processes, which must still be there after these tests."""
    folder = tmp_path_factory.mktemp("supervised")
    with Server(folder, "--workers", str(WORKERS), DATABASE_URL=database_of_all) as server:
        yield server
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture
async def rows(database_of_all: str) -> AsyncIterator[Connection]:
    async with connected(database_of_all) as connection:
        await connection.execute("TRUNCATE chatts")
        yield connection


async def assert_stored(rows: Connection, load: Load) -> None:
    """Check that each answered post is there once; who was cut may have posted, or not."""
    stored = [row["message"] for row in await rows.fetch("SELECT message FROM chatts")]
    assert set(load.posted) <= set(stored)
    assert len(stored) == len(set(stored))


async def test_a_worker_that_is_killed_is_replaced_and_others_do_not_notice(
    supervised: Server, rows: Connection
) -> None:
    victim, *others = workers(supervised)
    async with Load(supervised.url).going_on(CLIENTS) as load:
        await load.more(100)
        victim.suspend()  # so that nobody else comes to it
        its_peers = {each.raddr.port for each in victim.net_connections("tcp") if each.raddr}
        load.cut = {number for number, one in load.open.items() if one.port in its_peers}
        victim.kill()
        await until(lambda: len(workers(supervised)) == WORKERS)
        await load.more(100)
    assert load.failed == []
    assert set(others) < set(workers(supervised))
    await assert_stored(rows, load)
    await until(lambda: f"Worker {victim.pid} ended" in supervised.log)


async def test_sighup_replaces_all_workers_without_a_failed_request(
    supervised: Server, rows: Connection
) -> None:
    before = workers(supervised)
    async with Load(supervised.url).going_on(CLIENTS) as load:
        await load.more(100)
        supervised.process.send_signal(signal.SIGHUP)
        await until(lambda: not set(before) & set(workers(supervised)))
        await until(lambda: len(workers(supervised)) == WORKERS)
        await load.more(100)
    assert load.failed == []
    await assert_stored(rows, load)


async def test_workers_stay_when_those_after_them_cannot_start(supervised: Server) -> None:
    before = workers(supervised)
    settings = supervised.folder / ".env"
    settings.write_text("UPLOADS_MAX=many\n")
    try:
        supervised.process.send_signal(signal.SIGHUP)
        await until(lambda: "those before it stay" in supervised.log)
    finally:
        settings.unlink()
    assert "UPLOADS_MAX" in supervised.log
    assert workers(supervised) == before
    async with opened(supervised.url, 1) as (client,):
        client.send("GET", "/getchatts?limit=1")
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("kind", ["port", "unix"])
async def test_who_has_connected_when_the_signal_comes_is_answered_by_the_last_worker(
    database_of_all: str, kind: str
) -> None:
    with open_folder() as folder:
        where = ("--uds", str(folder / "s")) if kind == "unix" else ()
        server = Server(folder, "--workers", "2", *where, DATABASE_URL=database_of_all)
        with server:
            all_of_them = workers(server)
            for worker in all_of_them:
                worker.suspend()
            async with opened(server.url, 40) as clients:
                for client in clients:
                    client.send("GET", "/getchatts?limit=1")
                server.process.terminate()
                for worker in all_of_them:
                    worker.resume()
                for client in clients:
                    assert (await client.answer())[0] == 200
            assert await asyncio.to_thread(server.wait) == 0
            assert server.log == ""
        assert not (folder / "s").exists()
        assert not any(is_alive(worker) for worker in all_of_them)


def test_a_worker_that_hangs_is_killed_and_replaced_and_systemd_is_told_of_all(
    database_url: str,
) -> None:
    with open_folder() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as signs:
        signs.bind(str(folder / "notify"))
        signs.settimeout(60)
        settings = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "5000000"}
        server = Server(folder, "--workers", "2", DATABASE_URL=database_url, **settings)
        with server:
            assert [signs.recv(4096) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
            hanging, other = workers(server)
            hanging.suspend()
            wait_until(lambda: f"Worker {hanging.pid} was silent for 5 s" in server.log)
            wait_until(lambda: not is_alive(hanging) and len(workers(server)) == 2)
            assert other in workers(server)
            server.process.send_signal(signal.SIGHUP)
            said = [b"WATCHDOG=1"]
            while said[-1] == b"WATCHDOG=1":
                said.append(signs.recv(4096))
            assert said[-1].startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            while said[-1] != b"READY=1":
                said.append(signs.recv(4096))
            assert server.stop() == 0
            while said[-1] != b"STOPPING=1":
                said.append(signs.recv(4096))


def test_a_supervisor_that_is_killed_leaves_nothing_running() -> None:
    with open_folder() as folder, Server(folder, "--workers", "2") as server:
        assert server.greeting[1].startswith("database: embedded PostgreSQL")
        left = workers(server)
        assert len(left) == 2
        assert len(running(folder)) > 0
        server.kill()
        wait_until(lambda: not any(is_alive(worker) for worker in left))
        wait_until(lambda: running(folder) == [])


def test_a_second_signal_ends_all_workers_at_once(database_url: str) -> None:
    with open_folder() as folder:
        server = Server(folder, "--workers", "2", DATABASE_URL=database_url)
        host, port = server.url.removeprefix("http://").split(":")
        with server, socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(b"GET / HTTP/1.1\r\n")  # and no more: it is waited for
            all_of_them = workers(server)
            assert len(all_of_them) == 2
            wait_until(lambda: any(one.net_connections("tcp") for one in all_of_them))
            server.process.terminate()
            wait_until(lambda: sum(is_alive(worker) for worker in all_of_them) == 1)
            server.process.terminate()
            assert server.wait() == 128 + signal.SIGTERM
            assert not any(is_alive(worker) for worker in all_of_them)


def test_what_is_wrong_with_all_of_them_is_said_once(tmp_path: Path, database_url: str) -> None:
    done = run(
        tmp_path, "serve", "--workers", "3", "--port", "0", DATABASE_URL=database_url,
        MEDIA_ROOT="/proc/media",
    )  # fmt: skip
    assert_refused(done, "/proc/media")


@pytest.mark.parametrize("count", ["0", "-1", "257", "two"])
def test_what_is_no_number_of_workers_is_a_wrong_call(tmp_path: Path, count: str) -> None:
    done = run(tmp_path, "serve", "--workers", count)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--workers" in done.stderr
