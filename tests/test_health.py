"""/livez and /readyz, with every part that can fail made to fail."""

from __future__ import annotations

import json
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.conftest import client_of, connected, database_at_head, database_away, waiting_for
from tests.multipart import LEAKS, connect
from tests.process import Server
from tests.streams import stream_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import httpx2
    from sqlalchemy.engine import URL

    from tests.conftest import StartServer

ALL_OK = dict.fromkeys(("database", "schema", "media", "disk", "stopping"), "ok")
FLOOR = 2**20


@pytest.fixture(scope="module")
def database_url(postgres_url: URL) -> Iterator[str]:
    """A database that these tests may take away."""
    with database_at_head(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def server(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, DATABASE_URL=database_url) as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server that is ready."""
    async with client_of(server) as client:
        await becomes(client, ALL_OK)
        yield client


async def becomes(client: httpx2.AsyncClient, checks: dict[str, str]) -> httpx2.Response:
    """Wait until /readyz says this: what it has found is kept for a moment."""
    with anyio.fail_after(20):
        while checks_of(response := await client.get("/readyz")) != checks:  # noqa: ASYNC110 - another process has no event to wait on
            await anyio.sleep(0.05)
    return response


def checks_of(response: httpx2.Response) -> Any:  # noqa: ANN401 - it is compared
    document = response.json()
    states = set(document["checks"].values())
    if response.status_code == 200:
        assert set(document) == {"status", "checks"}
        assert document["status"] == "ok"
        assert states <= {"ok", "newer"}
    else:
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["retry-after"] == "1"
        assert document["code"] == "not-ready"
        assert document["request_id"] == response.headers["x-request-id"]
        assert "failed" in states
        assert not LEAKS.search(response.text)
    return document["checks"]


async def test_a_server_is_alive_and_ready(client: httpx2.AsyncClient) -> None:
    response = await client.get("/livez")
    assert (response.status_code, response.content) == (200, b'{"status":"ok"}')
    assert response.headers["cache-control"] == "no-store"
    response = await client.get("/readyz/")
    assert checks_of(response) == ALL_OK
    assert response.headers["cache-control"] == "no-store"
    assert (await client.head("/readyz")).status_code == 200


async def test_it_is_alive_and_not_ready_without_its_database(
    client: httpx2.AsyncClient, server: Server, database_url: str, postgres_url: URL
) -> None:
    async with database_away(database_url, postgres_url):
        response = await becomes(client, ALL_OK | {"database": "failed", "schema": "unknown"})
        assert response.json()["detail"] == "Not ready: the database does not answer."
        assert (await client.get("/livez")).status_code == 200
        assert "the database is not available" in server.log
    await becomes(client, ALL_OK)


@asynccontextmanager
async def at_revision(revision: str, database_url: str) -> AsyncIterator[None]:
    """Have the database say that its schema is another one."""
    update = "UPDATE alembic_version SET version_num = $1"
    async with connected(database_url) as psql:
        head = await psql.fetchval("SELECT version_num FROM alembic_version")
        await psql.execute(update, revision)
        try:
            yield
        finally:
            await psql.execute(update, head)


async def test_it_is_not_ready_on_a_schema_that_is_behind(
    client: httpx2.AsyncClient, server: Server, database_url: str
) -> None:
    async with at_revision("0001", database_url):
        response = await becomes(client, ALL_OK | {"schema": "failed"})
        assert "schema" in response.json()["detail"]
        assert "chatterd migrate" in server.log
    await becomes(client, ALL_OK)


async def test_it_stays_ready_while_a_newer_version_has_migrated(
    client: httpx2.AsyncClient, database_url: str
) -> None:
    async with at_revision("newer", database_url):
        response = await becomes(client, ALL_OK | {"schema": "newer"})
        assert response.status_code == 200
        answer = await client.post("/v1/chatts", json={"name": "ann", "message": "hi"})
        assert (await client.get(f"/v1/chatts/{answer.json()['id']}")).status_code == 200


async def test_those_who_ask_at_once_share_one_check_which_has_a_time_limit(
    client: httpx2.AsyncClient, database_url: str
) -> None:
    async with connected(database_url) as psql, anyio.create_task_group() as group:
        answers: list[httpx2.Response] = []

        async def ask() -> None:
            answers.append(await client.get("/readyz"))

        transaction = psql.transaction()
        await transaction.start()
        await psql.execute("LOCK TABLE alembic_version")
        with anyio.fail_after(20):
            while await waiting_for("alembic_version", psql) == 0:
                group.start_soon(ask)
                await anyio.sleep(0.02)
        answers.clear()
        for _ in range(30):
            group.start_soon(ask)
        with anyio.fail_after(20):
            while len(answers) < 30:
                assert await waiting_for("alembic_version", psql) <= 1
                await anyio.sleep(0.1)
        await transaction.rollback()
    failed = ALL_OK | {"database": "failed", "schema": "unknown"}
    assert all(checks_of(answer) == failed for answer in answers)


async def test_it_is_not_ready_when_the_media_folder_is_a_file(
    client: httpx2.AsyncClient, server: Server
) -> None:
    aside = server.media.with_name("aside")
    server.media.rename(aside)
    server.media.touch()
    response = await becomes(client, ALL_OK | {"media": "failed", "disk": "unknown"})
    assert response.json()["detail"] == "Not ready: the media folder is not usable."
    assert "the media folder is not usable: Not a directory" in server.log
    server.media.unlink()
    aside.rename(server.media)
    await becomes(client, ALL_OK)
    assert [path for path in server.media.rglob("*") if path.is_file()] == []


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/bin/mount", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=4m", "chatterd-test", str(folder))
    if mounted.returncode != 0:
        pytest.skip(f"this account may not mount a disk: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", str(folder)], check=True)


async def test_it_is_not_ready_when_the_media_disk_is_read_only_or_has_too_little_free(
    disk: Path, start_server: StartServer
) -> None:
    server = start_server(MEDIA_ROOT=str(disk), MEDIA_FREE_FLOOR=str(FLOOR))
    async with client_of(server) as client:
        await becomes(client, ALL_OK)
        (disk / "large").write_bytes(bytes(3 * 2**20 + 1))
        response = await becomes(client, ALL_OK | {"disk": "failed"})
        assert "MEDIA_FREE_FLOOR" in response.json()["detail"]
        (disk / "large").unlink()
        await becomes(client, ALL_OK)
        assert mount("-o", "remount,ro", str(disk)).returncode == 0
        await becomes(client, ALL_OK | {"media": "failed", "disk": "unknown"})
        assert "Read-only file system" in server.log
        assert mount("-o", "remount,rw", str(disk)).returncode == 0
        await becomes(client, ALL_OK)


async def test_it_is_not_ready_while_it_stops_and_a_post_is_under_way(
    start_server: StartServer,
) -> None:
    server = start_server()
    body = b'{"name": "ann", "message": "hi"}'
    async with (
        connect(server.url) as upload,
        connect(server.url) as asking,
        client_of(server) as client,
        stream_of(client) as stream,
    ):
        await stream.begin()
        await upload.request("POST", "/postchatt", f"Content-Length: {len(body)}")
        await upload.send(body[:20])
        await asking.send(b"GET /readyz HTTP/1.1\r\n")
        server.process.terminate()
        while await stream.block():
            pass  # streams end first
        await asking.send(f"Host: {asking.host}\r\n\r\n".encode())
        answer = await asking.answer()
        assert answer.status_code == 503
        document = json.loads(answer.content)
        assert document["checks"] == ALL_OK | {"stopping": "failed"}
        assert document["detail"] == "Not ready: the server is stopping."
        await upload.send(body[20:])
        assert (await upload.answer("POST")).status_code == 200
    assert server.wait() == 0
