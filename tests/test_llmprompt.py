"""POST /llmprompt, as contract §1 has it, against a real server that speaks Ollama's NDJSON."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import httpx2
import pytest

from tests.multipart import DEADLINE_SECONDS, connect, problem
from tests.ollama import BROKEN, INVALID, MISSING, FakeOllama, lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.multipart import Server, StartServer

SLASHES = ["/llmprompt", "/llmprompt/"]


@pytest.fixture(autouse=True)
def _fresh(ollama: FakeOllama) -> None:
    ollama.forget()


@pytest.fixture
def unused_url() -> Iterator[str]:
    """An address where nobody listens, and nobody else can begin to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def prompt(model: str, text: str = "why is the sky blue?") -> bytes:
    return json.dumps({"model": model, "prompt": text}).encode()


async def requested(ollama: FakeOllama) -> bool:
    return await anyio.to_thread.run_sync(ollama.wait_for_request, DEADLINE_SECONDS)


async def disconnected(ollama: FakeOllama) -> bool:
    return await anyio.to_thread.run_sync(ollama.wait_for_disconnect, DEADLINE_SECONDS)


@pytest.mark.parametrize("path", SLASHES)
async def test_the_lines_of_ollama_are_the_answer(
    client: httpx2.AsyncClient, ollama: FakeOllama, path: str
) -> None:
    response = await client.post(path, content=prompt("echo", "日本語 😀"))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.content == b"".join(lines("日本語 😀"))
    assert (ollama.method, ollama.path, ollama.requests) == ("POST", "/api/generate", 1)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"model":"echo","prompt":"hi"}', 200, id="a prompt"),
        pytest.param(
            b' {"stream": true,\r\n "prompt":"\\u65e5 \xe6\x97\xa5","model":"echo" }\n ',
            200,
            id="in another order with blanks",
        ),
        pytest.param(
            b'{"model":"echo","prompt":"a","prompt":"b","options":{"seed":1e400,"x":[]}}',
            200,
            id="keys we do not know",
        ),
        pytest.param(prompt("echo", "long " * 40000), 200, id="longer than a chatt may be"),
        pytest.param(b"hello", 400, id="not JSON"),
        pytest.param(b'{"model":"echo"', 400, id="truncated JSON"),
        pytest.param(bytes(range(256)), 400, id="binary"),
        pytest.param(b"", 400, id="empty"),
    ],
)
async def test_the_body_goes_to_ollama_untouched(
    client: httpx2.AsyncClient, ollama: FakeOllama, body: bytes, status: int
) -> None:
    response = await client.post("/llmprompt", content=body)
    assert ollama.body == body
    assert response.status_code == status
    if status == 400:
        assert response.content == INVALID


async def test_a_body_that_comes_in_pieces_goes_to_ollama_whole(
    client: httpx2.AsyncClient, ollama: FakeOllama
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model":"echo",'
        yield b'"prompt":"in pieces"}'

    response = await client.post("/llmprompt", content=pieces())
    assert response.content == b"".join(lines("in pieces"))
    assert ollama.body == b'{"model":"echo","prompt":"in pieces"}'


async def read_line(chunks: AsyncIterator[bytes]) -> bytes:
    line = b""
    with anyio.fail_after(DEADLINE_SECONDS):
        while not line.endswith(b"\n"):
            line += await anext(chunks)
    return line


async def test_each_line_arrives_before_the_next_one_is_made(
    client: httpx2.AsyncClient, ollama: FakeOllama
) -> None:
    first, second, third = lines("slowly")
    async with client.stream("POST", "/llmprompt", content=prompt("slow", "slowly")) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        chunks = response.aiter_raw()
        assert await read_line(chunks) == first
        # Meanwhile others are answered.
        assert (await client.get("/getchatts")).content == b"[]"
        ollama.release()
        assert await read_line(chunks) == second
        ollama.release()
        assert await read_line(chunks) == third
        assert [chunk async for chunk in chunks] == []


@pytest.mark.parametrize(
    ("model", "status", "body"),
    [("missing", 404, MISSING), ("broken", 500, BROKEN)],
)
@pytest.mark.parametrize("path", SLASHES)
async def test_an_error_of_ollama_is_passed_on_with_its_status_and_body(
    client: httpx2.AsyncClient, path: str, model: str, status: int, body: bytes
) -> None:
    response = await client.post(path, content=prompt(model))
    assert (response.status_code, response.content) == (status, body)
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]


async def test_an_ollama_that_is_away_is_a_bad_gateway(
    start_server: StartServer, unused_url: str
) -> None:
    server = start_server(OLLAMA_URL=unused_url)
    async with httpx2.AsyncClient(base_url=server.url, timeout=DEADLINE_SECONDS) as client:
        response = await client.post("/llmprompt", content=prompt("echo"))
        detail = problem(response, 502)
        # Where our Ollama lives is nothing for strangers.
        assert unused_url.removeprefix("http://") not in detail
        # The rest of the server does not need it.
        assert (await client.get("/getchatts")).status_code == 200


async def test_an_ollama_that_hangs_up_before_its_answer_is_a_bad_gateway(
    client: httpx2.AsyncClient, ollama: FakeOllama
) -> None:
    problem(await client.post("/llmprompt", content=prompt("hangup")), 502)
    assert ollama.body == prompt("hangup")


async def test_an_answer_that_ollama_cuts_does_not_end_as_if_it_were_whole(
    client: httpx2.AsyncClient,
) -> None:
    received: list[bytes] = []

    async def ask() -> None:
        async with client.stream("POST", "/llmprompt", content=prompt("cut", "x")) as response:
            assert response.status_code == 200
            async for chunk in response.aiter_raw():
                received.append(chunk)  # noqa: PERF401  what came before the error is kept

    with pytest.raises(httpx2.TransportError):
        await ask()
    first, second, _ = lines("x")
    answer = b"".join(received)
    assert answer.startswith(first)
    assert (first + second).startswith(answer)
    # The next one is answered as ever.
    whole = await client.post("/llmprompt", content=prompt("echo", "x"))
    assert whole.content == b"".join(lines("x"))


@pytest.mark.direct(reason="over HTTP/2, httpx2 does not tell", through="nginx-h2")
async def test_a_client_that_leaves_between_lines_cancels_the_request_to_ollama(
    client: httpx2.AsyncClient, ollama: FakeOllama
) -> None:
    async with client.stream("POST", "/llmprompt", content=prompt("slow", "x")) as response:
        assert await read_line(response.aiter_raw()) == lines("x")[0]
    assert await disconnected(ollama)


@pytest.mark.usefixtures("client")
async def test_a_client_that_leaves_before_the_first_line_cancels_the_request_to_ollama(
    server: Server, ollama: FakeOllama
) -> None:
    body = prompt("silent")
    async with connect(server.url) as wire:
        await wire.request("POST", "/llmprompt", f"Content-Length: {len(body)}")
        await wire.send(body)
        assert await requested(ollama)
    assert await disconnected(ollama)


@pytest.mark.direct(reason="over HTTP/2, httpx2 does not tell", through="nginx-h2")
async def test_a_client_that_gives_up_waiting_cancels_the_request_to_ollama(
    client: httpx2.AsyncClient, ollama: FakeOllama
) -> None:
    async with anyio.create_task_group() as group:

        async def ask() -> None:
            with suppress(httpx2.TransportError):
                await client.post("/llmprompt", content=prompt("silent"))

        group.start_soon(ask)
        assert await requested(ollama)
        group.cancel_scope.cancel()
    assert await disconnected(ollama)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
@pytest.mark.parametrize("path", SLASHES)
async def test_only_post_reaches_ollama(
    client: httpx2.AsyncClient, ollama: FakeOllama, path: str, method: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert ollama.requests == 0
