"""A small real HTTP server that speaks Ollama's NDJSON; the prompt's `model` says what it does.

`echo` answers three lines at once, `slow` makes each further line only when `release()` is called,
`silent` never answers, `missing` and `broken` are Ollama's own errors, `cut` stops in the middle of
a line and `hangup` before any answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import TracebackType

MISSING = b"""{"error":"model 'missing' not found"}"""
BROKEN = b'{"error":"llama runner process has terminated: signal: killed"}'
INVALID = b'{"error":"invalid character in the body"}'
REFUSALS = {
    "missing": ("404 Not Found", MISSING),
    "broken": ("500 Internal Server Error", BROKEN),
}

START_SECONDS = 10.0


class FakeOllama:
    """Serves on a free loopback port in a thread of its own while the `with` block lasts."""

    def __init__(self) -> None:
        self.url = ""
        self.method = ""
        self.path = ""
        self.headers: dict[str, str] = {}
        self.body = b""
        self.requests = 0
        self._requested = threading.Event()
        self._disconnected = threading.Event()
        self._started = threading.Event()
        self._released = asyncio.Semaphore(0)
        self._stopping: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="ollama")

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(START_SECONDS):
            raise TimeoutError("the Ollama stand-in did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(START_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError("the Ollama stand-in did not stop")

    def forget(self) -> None:
        """Forget the requests seen so far, so that the two waits below mean the next one."""
        self._requested.clear()
        self._disconnected.clear()
        self.method = self.path = ""
        self.headers = {}
        self.body = b""
        self.requests = 0

    def release(self) -> None:
        """Let the slow answer in progress make its next line."""
        self._loop.call_soon_threadsafe(self._released.release)

    def wait_for_request(self, timeout_seconds: float) -> bool:
        """Whether a whole request came within that time."""
        return self._requested.wait(timeout_seconds)

    def wait_for_disconnect(self, timeout_seconds: float) -> bool:
        """Whether the client of a slow or silent answer went away within that time."""
        return self._disconnected.wait(timeout_seconds)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                connections.add(task)
                task.add_done_callback(connections.discard)
            try:
                await self._converse(reader, writer)
            except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
                # The client's end, or ours: an idle connection is cancelled when the block ends.
                pass
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            self.url = f"http://{host}:{port}"
            self._started.set()
            await self._stopping.wait()
            server.close()
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one kept-alive connection."""
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ", 2)
            fields = (line.split(":", 1) for line in head[1:] if line)
            headers = {name.lower(): value.strip() for name, value in fields}
            body = await _read_body(reader, headers)
            self.method, self.path, self.headers, self.body = method, path, headers, body
            self.requests += 1
            self._released = asyncio.Semaphore(0)
            self._requested.set()
            if not await self._answer(reader, writer):
                return

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer what was asked; whether the connection can be used again."""
        try:
            question = json.loads(self.body)
            model, prompt = question["model"], question.get("prompt", "")
        except (ValueError, TypeError, KeyError, AttributeError):
            return await _whole(writer, "400 Bad Request", INVALID)
        if refusal := REFUSALS.get(model):
            return await _whole(writer, *refusal)
        if model == "silent":
            await self._or_disconnect(reader, self._released.acquire())
        if model in {"silent", "hangup"}:
            return False
        return await self._stream(reader, writer, model, lines(prompt))

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        model: str,
        answer: list[bytes],
    ) -> bool:
        await _send(
            writer,
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n",
        )
        for number, line in enumerate(answer):
            waits = number > 0 and model == "slow"
            if waits and not await self._or_disconnect(reader, self._released.acquire()):
                return False
            if number > 0 and model == "cut":
                await _send(writer, b"%x\r\n%b" % (len(line), line[: len(line) // 2]))
                return False
            await _send(writer, b"%x\r\n%b\r\n" % (len(line), line))
        await _send(writer, b"0\r\n\r\n")
        return True

    async def _or_disconnect(self, reader: asyncio.StreamReader, event: Awaitable[object]) -> bool:
        """Wait for the event; False when the client went away before it."""
        happened = asyncio.ensure_future(event)
        gone = asyncio.ensure_future(_end(reader))
        try:
            await asyncio.wait({happened, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self._disconnected.set()
                return False
            return True
        finally:
            happened.cancel()
            gone.cancel()
            await asyncio.gather(happened, gone, return_exceptions=True)


def lines(prompt: str) -> list[bytes]:
    """The NDJSON lines of an answer: the prompt, a word, and the last with `done`."""
    parts = [
        {"model": "echo", "response": prompt, "done": False},
        {"model": "echo", "response": " 日本語", "done": False},
        {"model": "echo", "response": "", "done": True, "done_reason": "stop"},
    ]
    return [json.dumps(part, ensure_ascii=False).encode() + b"\n" for part in parts]


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


async def _end(reader: asyncio.StreamReader) -> None:
    """Return when the client closes or resets its connection."""
    with suppress(ConnectionError):
        while await reader.read(65536):
            pass


async def _whole(writer: asyncio.StreamWriter, status: str, body: bytes) -> bool:
    await _send(
        writer,
        f"HTTP/1.1 {status}\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body,
    )
    return True


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
