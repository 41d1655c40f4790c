"""The log: a line for each request, in both formats, with nothing in it that people wrote."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from websockets.asyncio.client import connect as connect_websocket

from chatterd.logs import LINES_MAX, Output
from tests.conftest import client_of, connected, database_at_head, waiting_for
from tests.multipart import connect, encode, fields, form_type, image, until
from tests.process import Server, environment
from tests.samples import JPEG
from tests.streams import stream_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import httpx2
    from sqlalchemy.engine import URL

    from tests.conftest import StartServer

MARKER = "MARKER-7f3a"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(scope="module")
def database_url(postgres_url: URL) -> Iterator[str]:
    with database_at_head(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def server(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings = {"LOG_LEVEL": "debug", "SLOW_QUERY_MILLISECONDS": "200"}
    with Server(folder, DATABASE_URL=database_url, **settings) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(server) as client:
        yield client


def logged(server: Server) -> list[dict[str, Any]]:
    """Every line, each of which is one object."""
    found = [json.loads(line) for line in server.log.splitlines()]
    for line in found:
        assert TIME.fullmatch(line["time"])
        assert line["level"] in {"debug", "info", "warning", "error"}
        assert line["logger"]
    return found


async def line_of(server: Server, request_id: str) -> dict[str, Any]:
    """Wait for the line of a request; there is just one."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = [
            line
            for line in logged(server)
            if line["logger"] == "chatterd.requests" and line["request_id"] == request_id
        ]
        return found != []

    await until(is_there)
    assert len(found) == 1
    return found[0]


async def test_a_request_has_one_line(client: httpx2.AsyncClient, server: Server) -> None:
    name = uuid.uuid4().hex
    headers = {"X-Request-Id": name}
    response = await client.get(f"/v1/chatts/{name}/?{MARKER}", headers=headers)
    line = await line_of(server, name)
    assert 0 < line.pop("milliseconds") < 60_000
    assert TIME.fullmatch(line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "chatterd.requests",
        "request_id": name,
        "client": "127.0.0.1",
        "method": "GET",
        "path": f"/v1/chatts/{name}/",
        "route": "/v1/chatts/{id}",
        "status": 404,
        "bytes": len(response.content),
    }


async def test_a_form_that_is_wrong_has_its_one_line_and_no_warning(
    client: httpx2.AsyncClient, server: Server
) -> None:
    answer = await client.post("/postimages", content=b"--?", headers=form_type())
    assert answer.status_code == 422
    request_id = answer.headers["x-request-id"]
    await line_of(server, request_id)
    lines = [line for line in logged(server) if line.get("request_id") == request_id]
    assert [line["logger"] for line in lines] == ["chatterd.requests"]


async def test_what_waits_says_so(client: httpx2.AsyncClient, server: Server) -> None:
    stream, wait, socket = (uuid.uuid4().hex for _ in range(3))
    cursor = (await client.get("/v1/chatts")).json()["cursor"]
    async with stream_of(client, **{"X-Request-Id": stream}) as events:
        await events.begin()
        await client.post("/postchatt", json={"name": "ann", "message": "hi"})
        event = await events.event()
    query = {"since": cursor, "wait": "1"}
    await client.get("/v1/chatts", params=query, headers={"X-Request-Id": wait})
    url = f"{server.url.replace('http', 'ws', 1)}/v1/ws"
    async with connect_websocket(url, additional_headers={"X-Request-Id": socket}) as connected_:
        await connected_.send('{"since": null}')
        ready = await connected_.recv()
    line = await line_of(server, stream)
    assert (line["waits"], line["route"], line["status"]) == ("stream", "/v1/stream", 200)
    assert line["bytes"] > len(event.data)
    line = await line_of(server, wait)
    assert (line["waits"], line["route"], line["status"]) == ("long poll", "/v1/chatts", 200)
    line = await line_of(server, socket)
    assert (line["waits"], line["route"], line["status"]) == ("websocket", "/v1/ws", 101)
    assert line["bytes"] == len(ready)


async def test_a_request_whose_client_leaves_before_its_answer_has_a_line(server: Server) -> None:
    name = uuid.uuid4().hex
    async with connect(server.url) as wire:
        await wire.request("POST", "/postchatt", "Content-Length: 9", f"X-Request-Id: {name}")
    line = await line_of(server, name)
    assert (line["route"], line["status"], line["bytes"]) == ("/postchatt", None, 0)
    assert line["aborted"] is True


async def test_nothing_that_people_wrote_is_logged(
    client: httpx2.AsyncClient, server: Server
) -> None:
    marked = {"name": MARKER, "message": MARKER}
    secret = {"Authorization": MARKER, "Cookie": MARKER, "User-Agent": MARKER, "Referer": MARKER}
    key = {"Idempotency-Key": MARKER}
    form = encode(*fields(MARKER, MARKER), image(JPEG, filename=MARKER))
    tokens = []
    for headers in (secret, key, key):
        answer = await client.post("/v1/chatts", json=marked, headers=headers)
        tokens.append(answer.json()["delete_token"])
    await client.post("/postimages", content=form, headers=form_type())
    await client.post("/postchatt", json=marked | {MARKER: MARKER})
    await client.get(f"/getchatts?{MARKER}={MARKER}")
    token = {"Chatterd-Delete-Token": MARKER}
    await client.delete(f"/v1/chatts/{answer.json()['id']}", headers=token)
    await client.post("/llmprompt", content=MARKER)
    # One that cannot be taken for an id is not the request's.
    await client.get("/livez", headers={"X-Request-Id": f"{MARKER} {MARKER}"})
    name = uuid.uuid4().hex
    await client.get("/livez", headers={"X-Request-Id": name})
    await line_of(server, name)
    assert MARKER not in server.log
    assert not any(token in server.log for token in tokens)


FORGED = '"} {"time":"2026-01-01T00:00:00.000Z"'
TARGETS = {
    "/%0A%0D%1B[2J": "/%0A%0D%1B[2J",
    '/\\u000a"},{': '/\\u000a"},{',
    "/" + "a" * 5000: "/" + "a" * 199 + "...",
}


@pytest.mark.parametrize("form", ["json", "text"])
async def test_no_client_can_forge_a_line(start_server: StartServer, form: str) -> None:
    server = start_server(LOG_LEVEL="info", LOG_FORMAT=form)
    for target in TARGETS:
        async with connect(server.url) as wire:
            await wire.request("A" * 100, target, f"X-Request-Id: {FORGED}")
            assert (await wire.answer()).status_code == 404
    assert server.stop() == 0
    for line, shown in zip(server.log.splitlines(), TARGETS.values(), strict=True):
        assert len(line) < 600
        if form == "json":
            assert json.loads(line)["path"] == shown
            assert json.loads(line)["method"] == "A" * 50 + "..."
        else:
            assert f" 127.0.0.1 {'A' * 50}... {shown} 404, " in line


async def test_the_text_is_for_people(start_server: StartServer) -> None:
    server = start_server(LOG_LEVEL="info", LOG_FORMAT="text")
    async with client_of(server) as client:
        await client.get("/livez?a=b", headers={"X-Request-Id": "some-id"})
    assert server.stop() == 0
    words = r" INFO 127\.0\.0\.1 GET /livez 200, 15 bytes, \d+\.\d ms \[some-id\]\n"
    assert re.fullmatch(TIME.pattern + words, server.log)


async def test_a_slow_statement_is_logged_without_its_values(
    client: httpx2.AsyncClient, server: Server, database_url: str
) -> None:
    name, unknown = uuid.uuid4().hex, str(uuid.uuid4())

    def statements(verb: str) -> list[dict[str, Any]]:
        begin = f"ms: {verb} "
        return [line for line in logged(server) if begin in line.get("message", "")]

    async with connected(database_url) as psql, anyio.create_task_group() as group:
        transaction = psql.transaction()
        await transaction.start()
        await psql.execute("LOCK TABLE chatts IN ACCESS EXCLUSIVE MODE")
        group.start_soon(
            lambda: client.post("/postchatt", json={"name": MARKER, "message": MARKER})
        )
        group.start_soon(
            lambda: client.get(f"/v1/chatts/{unknown}", headers={"X-Request-Id": name})
        )
        with anyio.fail_after(20):
            while await waiting_for("chatts", psql) < 2:  # noqa: ASYNC110 - the database's doing
                await anyio.sleep(0.01)
        await anyio.sleep(0.3)  # it is about time: more than SLOW_QUERY_MILLISECONDS
        await transaction.rollback()
    # One goes past SQLAlchemy, the other through it.
    await until(lambda: statements("INSERT") != [] and statements("SELECT") != [])
    for line in (statements("INSERT")[-1], statements("SELECT")[-1]):
        assert line["level"] == "warning"
        assert re.search(r"A statement took \d+ ms: ", line["message"])
        assert "$1" in line["message"]
    assert [line for line in statements("SELECT") if line.get("request_id") == name]
    assert MARKER not in server.log
    assert unknown not in str(statements("SELECT"))


def run_python(script: str, folder: Path, **settings: str) -> str:
    """What a script writes to its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(folder, **settings),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


SCRIPT = """
import logging
from chatterd import logs
logs.configure("info", {form!r})
logs.request_id.set(b"some-id")
logger = logging.getLogger("chatterd.test")
try:
    raise ValueError("one\\ntwo\\x1b\\ud800")
except ValueError as error:
    logger.exception("It failed: %s", error)
"""


def test_an_error_has_its_traceback_and_its_requests_id(tmp_path: Path) -> None:
    (line,) = run_python(SCRIPT.format(form="json"), tmp_path).splitlines()
    found = json.loads(line)
    assert found["message"] == "It failed: one\ntwo\x1b\\ud800"
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    assert found["request_id"] == "some-id"
    assert (found["level"], found["logger"]) == ("error", "chatterd.test")
    first, *rest = run_python(SCRIPT.format(form="text"), tmp_path).splitlines()
    words = r" ERROR chatterd\.test: It failed: one\\u000atwo\\u001b\\ud800 \[some-id\]"
    assert re.fullmatch(TIME.pattern + words, first)
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in "".join(rest)


def test_it_is_text_on_a_terminal_and_json_elsewhere(tmp_path: Path) -> None:
    script = SCRIPT.format(form="auto")
    assert run_python(script, tmp_path).startswith("{")
    ours, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment(tmp_path), stderr=terminal
    ) as process:
        os.close(terminal)
        assert b" ERROR chatterd.test: It failed" in os.read(ours, 4096)
        process.wait(20)
    os.close(ours)


def test_a_log_that_nobody_reads_holds_nothing_up_and_is_bounded() -> None:
    reading, writing = os.pipe()
    output = Output(writing)
    line = b"x" * 99 + b"\n"
    began = time.monotonic()
    for _ in range(3 * LINES_MAX):
        output.put(line)
    output.finish()
    # Some are in the pipe, and with whoever writes into it.
    assert 0 < output.dropped < 3 * LINES_MAX
    assert time.monotonic() - began < 20
    left = 3 * LINES_MAX - output.dropped
    received = 0
    while received < left * len(line):
        data = os.read(reading, 65536)
        received += len(data)
    assert received == left * len(line)
    output.finish()  # nobody writes any more
    os.close(writing)
    os.close(reading)
