"""A refused upload leaves nothing behind: no connection, no task, no descriptor, no memory."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import asynccontextmanager, suppress
from itertools import cycle, islice, product
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

import h2.connection
import h2.events
import h2.exceptions
import hypercorn.asyncio
import hypercorn.protocol
import psutil
import pytest
from hypercorn.config import Config
from sqlalchemy.engine import make_url

from chatterd import settings
from chatterd.app import create_app
from chatterd.connection import HTTP2
from tests.multipart import encode, fields, files, form_type, image
from tests.samples import JPEG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.conftest import StartServer
    from tests.process import Server

UPLOADS = 50
UPLOAD_SIZE = 50 * 2**20
AT_ONCE = 10
# Well past what is taken of a request that has been answered, which is 64 MiB.
TOO_MUCH = 80 * 2**20
DEADLINE_SECONDS = 30
# The allocator's, not ours: one upload that stays costs about a MiB, so fifty cost fifty.
MEMORY_SLACK = 12 * 2**20

ZEROS = memoryview(bytes(2**20))
# A form that is right in all but its size: the zeros are its picture's, and it never ends.
PICTURE = encode(*fields(), image(JPEG)).rpartition(b"\r\n--")[0]


class Refusal(NamedTuple):
    """A request that is refused before its body has ended."""

    method: str
    path: str
    content_type: str
    start: bytes
    status: int


FORM = form_type()["Content-Type"]
REFUSALS = {
    "file over the limit": Refusal("POST", "/postimages", FORM, PICTURE, 413),
    "no form": Refusal("POST", "/postimages", "image/jpeg", b"", 422),
    "no such route": Refusal("POST", "/nowhere", FORM, PICTURE, 404),
    "wrong method": Refusal("PUT", "/getchatts", FORM, PICTURE, 405),
    "JSON over the limit": Refusal("POST", "/postchatt", "application/json", b"", 413),
}


class Upload(NamedTuple):
    """How one client sends what is refused."""

    refusal: Refusal
    declared: bool
    """Whether it says how much will come; else HTTP/1.1 sends it in chunks."""
    polite: bool
    """Whether it sends all of it, whatever it is told; else it leaves with its answer."""


# Every kind, in every way; most clients leave, because most of the bytes are the polite ones'.
WAYS = [(True, True), (False, False), (True, False), (False, True), (True, False), (False, False)]
EVERY_UPLOAD = [Upload(refusal, *way) for way, refusal in product(WAYS, REFUSALS.values())]


class Client(Protocol):
    async def __call__(self, address: tuple[str, int], upload: Upload) -> int:
        """Send one upload on a connection of its own; return the status of the answer."""


async def http_1(address: tuple[str, int], upload: Upload) -> int:
    refusal, declared, polite = upload
    reader, writer = await asyncio.open_connection(*address)
    try:
        length = f"Content-Length: {UPLOAD_SIZE}" if declared else "Transfer-Encoding: chunked"
        writer.write(
            f"{refusal.method} {refusal.path} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: {refusal.content_type}\r\n{length}\r\n\r\n".encode()
        )

        async def send_all() -> None:
            sent = 0
            # A server that has heard enough may close: what it has said can still be read.
            with suppress(ConnectionError):
                while sent < UPLOAD_SIZE:
                    start = refusal.start if sent == 0 else b""
                    piece = ZEROS[: min(len(ZEROS), UPLOAD_SIZE - sent) - len(start)]
                    size = len(start) + len(piece)
                    if not declared:
                        writer.write(b"%x\r\n" % size)
                    writer.writelines((start, piece))
                    if not declared:
                        writer.write(b"\r\n")
                    await writer.drain()
                    sent += size
                if not declared:
                    writer.write(b"0\r\n\r\n")
                    await writer.drain()

        sending = asyncio.create_task(send_all())
        try:
            if polite:
                await sending
            head = await reader.readuntil(b"\r\n\r\n")
            return int(head.split(b" ", 2)[1])
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    finally:
        # At once, with whatever was still to be sent: as an app that is closed.
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def http_2(address: tuple[str, int], upload: Upload) -> int:
    """HTTP/2 without TLS, as a client that knows beforehand (RFC 9113 §3.3)."""
    refusal, declared, polite = upload
    reader, writer = await asyncio.open_connection(*address)
    try:
        connection = h2.connection.H2Connection()
        connection.initiate_connection()
        headers = [
            (":method", refusal.method),
            (":scheme", "http"),
            (":authority", "localhost"),
            (":path", refusal.path),
            ("content-type", refusal.content_type),
        ]
        if declared:
            headers.append(("content-length", str(UPLOAD_SIZE)))
        connection.send_headers(1, headers)
        connection.send_data(1, refusal.start)
        sent, status, ended = len(refusal.start), 0, False
        while not (status and (not polite or sent == UPLOAD_SIZE or ended)):
            window = connection.local_flow_control_window(1)
            while window and sent < UPLOAD_SIZE and not ended:
                size = min(window, connection.max_outbound_frame_size, UPLOAD_SIZE - sent)
                connection.send_data(
                    1, ZEROS[:size].tobytes(), end_stream=sent + size == UPLOAD_SIZE
                )
                sent += size
                window = connection.local_flow_control_window(1)
            writer.write(connection.data_to_send())
            await writer.drain()
            received = await reader.read(2**16)
            assert received, "the connection ended without an answer"
            for event in connection.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                ended = ended or isinstance(event, h2.events.StreamEnded | h2.events.StreamReset)
        return status
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


CLIENTS = pytest.mark.parametrize("client", [http_1, http_2], ids=["HTTP/1.1", "HTTP/2"])


async def refuse(client: Client, address: tuple[str, int], uploads: list[Upload]) -> None:
    """Send these uploads, some at once, and check each answer."""
    waiting = iter(uploads)

    async def send_some() -> None:
        for upload in waiting:
            assert await client(address, upload) == upload.refusal.status, upload

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(send_some())


async def settles(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time; whoever asks says what was seen instead."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110 - another's state has no event
        await asyncio.sleep(0.05)
    return condition()


def address_of(server: Server) -> tuple[str, int]:
    url = urlsplit(server.url)
    assert url.hostname
    assert url.port
    return url.hostname, url.port


@CLIENTS
async def test_the_process_holds_no_more_than_before(
    start_server: StartServer, client: Client
) -> None:
    server = start_server()
    process, port = psutil.Process(server.pid), address_of(server)[1]
    descriptors = process.num_fds()
    # What is made once, at first use, is made: threads, buffers, a warm allocator.
    await refuse(client, address_of(server), EVERY_UPLOAD[:AT_ONCE])
    memory = process.memory_info().rss
    await refuse(client, address_of(server), list(islice(cycle(EVERY_UPLOAD), UPLOADS)))
    assert await settles(lambda: not clients(process, port)), clients(process, port)
    assert await settles(lambda: process.num_fds() <= descriptors), process.open_files()
    grown = process.memory_info().rss - memory
    assert await settles(lambda: process.memory_info().rss - memory < MEMORY_SLACK), grown
    assert files(server.media) == []
    assert "Traceback" not in server.log


async def test_over_http_2_who_sends_on_for_ever_is_told_to_end_and_loses_no_other_request(
    server: Server,
) -> None:
    reader, writer = await asyncio.open_connection(*address_of(server))
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    common = [(":scheme", "http"), (":authority", "127.0.0.1")]
    connection.send_headers(1, [(":method", "POST"), (":path", "/nowhere"), *common])
    statuses: dict[int, int] = {}
    is_told = False
    sent = 0
    while 3 not in statuses:
        assert sent < TOO_MUCH, "it is never told"
        while not is_told and (window := connection.local_flow_control_window(1)):
            size = min(window, connection.max_outbound_frame_size)
            connection.send_data(1, ZEROS[:size].tobytes())
            sent += size
        writer.write(connection.data_to_send())
        await writer.drain()
        received = await asyncio.wait_for(reader.read(2**16), DEADLINE_SECONDS)
        assert received, "the connection has ended"
        for event in connection.receive_data(received):
            match event:
                case h2.events.ResponseReceived(stream_id=int(stream), headers=headers):
                    statuses[stream] = int(dict(headers or [])[b":status"])
                case h2.events.DataReceived(stream_id=int(stream), flow_controlled_length=length):
                    connection.acknowledge_received_data(length or 0, stream)
                case h2.events.StreamReset(stream_id=1, error_code=0):
                    is_told = True
                    connection.send_headers(
                        3, [(":method", "GET"), (":path", "/livez"), *common], end_stream=True
                    )
    assert statuses == {1: 404, 3: 200}
    writer.transport.abort()


def clients(process: psutil.Process, port: int) -> list[object]:
    """The clients of `port` that the process is still connected to; the database is none."""
    every = process.net_connections("inet")
    return [each for each in every if each.status != psutil.CONN_LISTEN and each.laddr[1] == port]


@CLIENTS
async def test_no_task_is_left(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    monkeypatch.setattr(settings, "MEDIA_ROOT", tmp_path)
    # Hypercorn's own ends a connection whose client sends longer than we take it, as on a machine
    # that has much else to do.
    monkeypatch.setattr(hypercorn.protocol, "H2Protocol", HTTP2)
    async with serving(database_url) as address:
        before = len(asyncio.all_tasks())
        await refuse(client, address, EVERY_UPLOAD)
        settled = await settles(lambda: len(asyncio.all_tasks()) <= before)
        assert settled, [repr(task) for task in asyncio.all_tasks()]
        assert files(tmp_path) == []


@asynccontextmanager
async def serving(database_url: str) -> AsyncIterator[tuple[str, int]]:
    """Run Hypercorn in this loop, where its tasks can be counted."""
    listener = socket.create_server(("127.0.0.1", 0))
    address: tuple[str, int] = listener.getsockname()
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "ERROR"
    stop = asyncio.Event()
    app = create_app(make_url(database_url))
    server = asyncio.create_task(
        hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait)  # type: ignore[arg-type]  # its own ASGI types
    )
    try:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /getchatts HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
        yield address
    finally:
        stop.set()
        await server
