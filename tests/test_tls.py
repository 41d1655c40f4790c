"""TLS: HTTP/2 and HTTP/1.1 on one port, chosen by ALPN, and files that cannot be used."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

import httpx2
import pytest
import trustme

from tests.multipart import THUMBNAIL, encode, fields, files, form_type, image, until
from tests.ollama import lines
from tests.process import Server, assert_refused, run
from tests.samples import JPEG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import asyncpg

    from tests.conftest import StartServer
    from tests.ollama import FakeOllama

    Situation: TypeAlias = Callable[[httpx2.AsyncClient, Server], AbstractAsyncContextManager[None]]

STOP_SECONDS = 3
MEDIA_LIMIT = 100_000
VERSIONS = ["HTTP/2", "HTTP/1.1"]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pem(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cert.pem and key.pem for 127.0.0.1, other.pem, the key of another, and more."""
    folder = tmp_path_factory.mktemp("pem")
    certificate, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    (folder / "cert.pem").write_bytes(
        b"".join(each.bytes() for each in certificate.cert_chain_pems)
    )
    (folder / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    (folder / "other.pem").write_bytes(other.private_key_pem.bytes())
    (folder / "no.pem").write_text("This is no certificate.\n")
    (folder / "empty.pem").touch()
    return folder


@pytest.fixture(scope="module")
def tls_options(pem: Path) -> tuple[str, ...]:
    return "--certfile", str(pem / "cert.pem"), "--keyfile", str(pem / "key.pem")


@pytest.fixture(scope="module")
def tls_server(
    tls_options: tuple[str, ...],
    database_url: str,
    ollama: FakeOllama,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("tls"),
        *tls_options,
        DATABASE_URL=database_url,
        OLLAMA_URL=ollama.url,
        MEDIA_MAX_SIZE=str(MEDIA_LIMIT),
    ) as server:
        yield server
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(params=VERSIONS)
async def tls_client(
    request: pytest.FixtureRequest,
    tls_server: Server,
    trusting: ssl.SSLContext,
    database: asyncpg.Connection[asyncpg.Record],
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that speaks the newest version it was allowed, on a server without chatts."""
    await database.execute("TRUNCATE chatts")
    async with httpx2.AsyncClient(
        base_url=tls_server.url, verify=trusting, http2=request.param == "HTTP/2", timeout=30
    ) as client:
        yield client
        answer = await client.get("/getchatts")
        assert answer.http_version == request.param


def test_the_address_is_printed_as_https(tls_server: Server) -> None:
    assert tls_server.greeting[0].partition(" answers at ")[2].startswith("https://127.0.0.1:")


def test_a_client_that_does_not_trust_the_certificate_gets_no_answer(tls_server: Server) -> None:
    with pytest.raises(httpx2.ConnectError, match=r"(?i)certificate"):
        httpx2.get(f"{tls_server.url}/getchatts")


def test_plain_http_gets_no_answer_and_does_no_harm(
    tls_server: Server, trusting: ssl.SSLContext
) -> None:
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{tls_server.url}/getchatts".replace("https", "http"))
    assert httpx2.get(f"{tls_server.url}/getchatts", verify=trusting).status_code == 200


async def test_every_route_answers(tls_server: Server, tls_client: httpx2.AsyncClient) -> None:
    client = tls_client
    chatt = {"name": "ann", "message": "日本語"}
    assert (await client.post("/postchatt", json=chatt)).content == b"{}"
    form = encode(*fields("bob", "look"), image(JPEG))
    answer = await client.post("/postimages", content=form, headers=form_type())
    assert (answer.status_code, answer.content) == (200, b"{}")
    rows = (await client.get("/getchatts")).json()
    assert [row[:2] for row in rows] == [["ann", "日本語"], ["bob", "look"]]
    images = (await client.get("/getimages")).json()
    assert [row[:4] for row in images] == rows
    url = images[1][4]
    assert url.startswith(f"{tls_server.url}/media/")
    assert (await client.get(url)).content == JPEG
    part = await client.get(url, headers={"Range": "bytes=0-1"})
    assert (part.status_code, part.content) == (206, JPEG[:2])
    prompt = await client.post("/llmprompt", json={"model": "echo", "prompt": "hi"})
    assert prompt.content == b"".join(lines("hi"))
    assert (await client.post("/llmprompt", json={"model": "missing"})).status_code == 404
    for path in ("/getchatts", "/getimages", url):
        head = await client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    for method, path, code in (
        ("GET", "/nowhere", "not-found"),
        ("GET", "/postchatt", "method-not-allowed"),
        ("POST", "/postchatt", "json-invalid"),
    ):
        refused = await client.request(method, path)
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == code


async def test_lines_of_the_model_arrive_one_by_one(
    tls_client: httpx2.AsyncClient, ollama: FakeOllama
) -> None:
    prompt = {"model": "slow", "prompt": "hi"}
    async with tls_client.stream("POST", "/llmprompt", json=prompt) as answer:
        received = []
        async for line in answer.aiter_lines():
            received.append(json.loads(line))
            ollama.release()
    assert [line["done"] for line in received] == [False, False, True]


async def endless() -> AsyncIterator[bytes]:
    """A form whose picture does not stop before twenty times the limit."""
    yield encode(*fields(), image(JPEG)).rpartition(b"\r\n--")[0]
    for _ in range(20):
        yield bytes(MEDIA_LIMIT)


UPLOADS = {
    "declared": (encode(*fields(), image(JPEG + bytes(20 * MEDIA_LIMIT))), form_type(), 413),
    "not declared": (None, form_type(), 413),
    "no form": (bytes(20 * MEDIA_LIMIT), {"Content-Type": "image/jpeg"}, 422),
}


@pytest.mark.parametrize("kind", UPLOADS)
async def test_a_refused_upload_does_not_disturb_its_connection(
    tls_server: Server, tls_client: httpx2.AsyncClient, ollama: FakeOllama, kind: str
) -> None:
    body, headers, status = UPLOADS[kind]
    client = tls_client
    before = set(files(tls_server.media))

    async def upload() -> None:
        content = endless() if body is None else body
        answer = await client.post("/postimages", content=content, headers=headers)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"

    async def read_and_write(number: int) -> None:
        for step in range(5):
            chatt = {"name": "ann", "message": f"{number}-{step}"}
            assert (await client.post("/postchatt", json=chatt)).content == b"{}"
            assert (await client.get("/getchatts")).status_code == 200

    async with client.stream("POST", "/llmprompt", json={"model": "slow", "prompt": "a"}) as answer:
        received = answer.aiter_lines()
        await anext(received)
        await asyncio.gather(
            upload(), *(read_and_write(number) for number in range(4)), upload(), upload()
        )
        ollama.release()
        await anext(received)
        ollama.release()
        assert json.loads([line async for line in received][-1])["done"] is True
    assert len((await client.get("/getchatts")).json()) == 20
    # Of those before, a half-written one may have gone, and a picture may have got its thumbnail.
    await until(
        lambda: all(name in before or name.endswith(THUMBNAIL) for name in files(tls_server.media))
    )


@asynccontextmanager
async def idle(_client: httpx2.AsyncClient, _server: Server) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def reading(client: httpx2.AsyncClient, _server: Server) -> AsyncIterator[None]:
    prompt = {"model": "slow", "prompt": "hi"}
    with suppress(httpx2.TransportError):
        async with client.stream("POST", "/llmprompt", json=prompt) as answer:
            received = answer.aiter_lines()
            await anext(received)
            yield
            async for _ in received:
                pass


@asynccontextmanager
async def sending(client: httpx2.AsyncClient, server: Server) -> AsyncIterator[None]:
    async def form() -> AsyncIterator[bytes]:
        yield encode(*fields(), image(JPEG + bytes(2**20))).rpartition(b"\r\n--")[0]
        while server.process.poll() is None:
            yield bytes(100)
            await asyncio.sleep(0)

    async def upload() -> None:
        with suppress(httpx2.TransportError):
            await client.post("/postimages", content=form(), headers=form_type())

    uploading = asyncio.create_task(upload())
    await until(lambda: files(server.media) != [])
    yield
    await uploading
    assert files(server.media) == []


@pytest.mark.parametrize("http2", [True, False], ids=VERSIONS)
@pytest.mark.parametrize("situation", [idle, reading, sending])
async def test_a_signal_stops_the_server_within_three_seconds(  # noqa: PLR0913, PLR0917 - fixtures
    start_server: StartServer,
    tls_options: tuple[str, ...],
    trusting: ssl.SSLContext,
    ollama: FakeOllama,
    situation: Situation,
    http2: bool,  # noqa: FBT001 - a parameter of the table
) -> None:
    server = start_server(*tls_options, OLLAMA_URL=ollama.url, SHUTDOWN_TIMEOUT="1")
    async with httpx2.AsyncClient(
        base_url=server.url, verify=trusting, http2=http2, timeout=30
    ) as client:
        assert (await client.get("/getchatts")).status_code == 200
        async with situation(client, server):
            started = time.monotonic()
            server.process.terminate()
            # Not Server.wait: a client that reads and writes goes on meanwhile.
            await until(lambda: server.process.poll() is not None)
            assert time.monotonic() - started < STOP_SECONDS
    assert server.wait() == 0, server.log
    assert "Traceback" not in server.log, server.log


async def test_a_connection_of_http_2_has_no_end_of_requests(
    tls_server: Server, trusting: ssl.SSLContext
) -> None:
    async with httpx2.AsyncClient(verify=trusting, http2=True, timeout=30) as client:
        # Hypercorn ends it after 1000, and loses the request that is one too many.
        for _ in range(1010):
            answer = await client.get(f"{tls_server.url}/v1/limits")
            assert (answer.status_code, answer.http_version) == (200, "HTTP/2")


# What is given, and what has to be said of it.
UNUSABLE = {
    "only the certificate": (("--certfile", "cert.pem"), "--keyfile"),
    "only the key": (("--keyfile", "key.pem"), "--certfile"),
    "no such certificate": (("--certfile", "gone.pem", "--keyfile", "key.pem"), "certificate"),
    "no such key": (("--certfile", "cert.pem", "--keyfile", "gone.pem"), "key"),
    "a folder": (("--certfile", ".", "--keyfile", "key.pem"), "certificate"),
    "no certificate": (("--certfile", "no.pem", "--keyfile", "key.pem"), "certificate"),
    "an empty file": (("--certfile", "empty.pem", "--keyfile", "key.pem"), "certificate"),
    "no key": (("--certfile", "cert.pem", "--keyfile", "no.pem"), "key"),
    "the key of another": (("--certfile", "cert.pem", "--keyfile", "other.pem"), "key"),
    "swapped": (("--certfile", "key.pem", "--keyfile", "cert.pem"), "certificate"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_files_that_cannot_be_used_end_the_start_with_one_line(
    pem: Path, database_url: str, case: str
) -> None:
    options, word = UNUSABLE[case]
    done = run(pem, "serve", "--port", "0", *options, DATABASE_URL=database_url)
    assert_refused(done, word)
