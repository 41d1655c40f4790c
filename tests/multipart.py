"""Requests written by hand, byte for byte, and their answers read the same way."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path
    from typing import TypeAlias

    import asyncpg
    from anyio.abc import ByteStream

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

# What Alamofire, the HTTP client of most iOS Chatters, writes.
BOUNDARY = "alamofire.boundary.0f1e2d3c4b5a6978"
DEADLINE_SECONDS = 20
THUMBNAIL = ".thumb.webp"
"""What the name of a thumbnail's file has behind the picture's."""


class Server(Protocol):
    """What these tests use of a running `chatterd serve`."""

    @property
    def url(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def media(self) -> Path: ...


class StartServer(Protocol):
    def __call__(self, **settings: str) -> Server: ...


class Response(Protocol):
    """What an httpx2 response and an `Answer` have in common."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def content(self) -> bytes: ...


class Headers(Protocol):
    def __getitem__(self, name: str, /) -> str: ...
    def __contains__(self, name: object, /) -> bool: ...


class Part(NamedTuple):
    """One part of a form: a text field, or a file when it has a file name."""

    name: str
    data: bytes
    filename: str | None = None
    type: str | None = None
    headers: tuple[str, ...] = ()

    def head(self) -> bytes:
        disposition = f'Content-Disposition: form-data; name="{self.name}"'
        if self.filename is not None:
            disposition += f'; filename="{self.filename}"'
        lines = [disposition, *self.headers]
        if self.type is not None:
            lines.append(f"Content-Type: {self.type}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n"


def fields(name: str = "ann", message: str = "hi") -> tuple[Part, Part]:
    return Part("username", name.encode()), Part("message", message.encode())


# The file names and types are the ones that real clients send: no extension.
def image(data: bytes, filename: str = "chattImage", kind: str = "image/jpeg") -> Part:
    return Part("image", data, filename, kind)


def video(data: bytes, filename: str = "chattVideo", kind: str = "video/mp4") -> Part:
    return Part("video", data, filename, kind)


def encode(*parts: Part, boundary: str = BOUNDARY) -> bytes:
    """Write a multipart body as RFC 7578 has it."""
    opened = b"".join(
        b"--" + boundary.encode() + b"\r\n" + part.head() + part.data + b"\r\n" for part in parts
    )
    return opened + b"--" + boundary.encode() + b"--\r\n"


def form_type(boundary: str = BOUNDARY) -> dict[str, str]:
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def problem(response: Response, status: int) -> str:
    """Check that this answer is the problem document of that status; return its detail."""
    assert response.status_code == status, response.content[:500]
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["content-length"]) > 0
    document = json.loads(response.content)
    assert set(document) == {"type", "title", "status", "detail", "code", "request_id"}
    assert document["status"] == status
    assert document["request_id"] == response.headers["x-request-id"]
    texts = [document[key] for key in ("type", "title", "detail", "code")]
    assert all(isinstance(text, str) and text.strip() for text in texts), document
    assert document["type"] == "about:blank"
    assert document["title"] == TITLES[status], document
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", document["code"]), document
    assert not LEAKS.search(response.content.decode()), document
    detail = document["detail"]
    assert isinstance(detail, str)
    return detail


# With `about:blank` the title is the status's own phrase (RFC 9457 §4.2.1, RFC 9110 §15).
TITLES = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    503: "Service Unavailable",
    507: "Insufficient Storage",
}

# An exception's name, SQL, a column's type, a file's path, a traceback.
LEAKS = re.compile(
    r"\w(Error|Exception)\b|Traceback|\bSELECT\b|\bINSERT\b|\bVALUES\b|asyncpg|sqlalchemy|msgspec"
    r"|starlette|hypercorn|VARCHAR|varying|timestamptz|\.py\b|/(home|work|tmp|usr|var|root|etc)/"
)


def files(folder: Path) -> list[str]:
    """Every file below this folder, hidden and half-written ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kept(folder: Path) -> dict[str, int]:
    """The files that were uploaded and kept, with their sizes; thumbnails come when they come."""
    names = [name for name in files(folder) if not name.endswith(THUMBNAIL) and name[0] != "."]
    return {name: (folder / name).stat().st_size for name in names}


def stored_bytes(folder: Path) -> int:
    """How much disk the files below this folder use at this moment."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # Removed between the listing and the look.
    return total


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does: give it the processor until it is done or late."""
    with anyio.fail_after(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110  another process has no event to wait on
            await anyio.sleep(0.01)


class Answer(NamedTuple):
    status_code: int
    headers: dict[str, str]
    content: bytes


class Wire:
    """A connection on which a request can be sent in pieces, wrongly, or not to its end."""

    def __init__(self, stream: ByteStream, host: str) -> None:
        self._stream = stream
        self._reader = BufferedByteReceiveStream(stream)
        self.host = host

    async def send(self, data: bytes) -> None:
        await self._stream.send(data)

    async def request(self, method: str, target: str, *lines: str, host: str | None = None) -> None:
        """Send a request's head, with the target as it is: no client tidies it up."""
        start = [f"{method} {target} HTTP/1.1", f"Host: {host or self.host}", *lines]
        await self.send("\r\n".join(start).encode("latin-1") + b"\r\n\r\n")

    async def send_chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def send_until_answered(self, pieces: Iterable[bytes], limit: int) -> tuple[int, Answer]:
        """Send pieces until an answer begins; how many bytes were sent by then, and the answer."""
        sent = 0
        answers: list[Answer] = []
        async with anyio.create_task_group() as group:

            async def listen() -> None:
                answers.append(await self.answer("POST"))
                group.cancel_scope.cancel()

            group.start_soon(listen)
            for piece in pieces:
                assert sent < limit, "no answer came"
                try:
                    await self.send(piece)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    # The server closed its side: what it said before is still to be read.
                    await anyio.sleep_forever()
                sent += len(piece)
                await anyio.lowlevel.checkpoint()
        return sent, answers[0]

    async def answer(self, method: str = "GET") -> Answer:
        """Read one answer; method says whether it can have a body."""
        with anyio.fail_after(DEADLINE_SECONDS):
            head = (await self._reader.receive_until(b"\r\n\r\n", 65536)).decode("latin-1")
            start, *lines = head.split("\r\n")
            status = int(start.split(" ")[1])
            headers = {}
            for line in lines:
                name, value = line.split(":", 1)
                headers[name.lower()] = value.strip()
            body = b""
            if method != "HEAD" and status not in {204, 304}:
                body = await self._body(headers)
            return Answer(status, headers, body)

    async def closed(self) -> bool:
        """Wait until the server ends the connection."""
        with anyio.fail_after(DEADLINE_SECONDS):
            try:
                while True:
                    await self._reader.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return True

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.receive_exactly(int(headers["content-length"]))
        body = b""
        while size := int(await self._reader.receive_until(b"\r\n", 1024), 16):
            body += await self._reader.receive_exactly(size)
            await self._reader.receive_exactly(2)
        await self._reader.receive_exactly(2)
        return body


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Wire]:
    """Open a connection to the server at this URL; it is closed when the block ends."""
    address = urlsplit(url)
    assert address.hostname
    assert address.port
    stream: ByteStream = await anyio.connect_tcp(address.hostname, address.port)
    if address.scheme == "https":
        stream = await TLSStream.wrap(stream, hostname=address.hostname, standard_compatible=False)
    async with stream:
        yield Wire(stream, address.netloc)
