"""Clients that ask one request after the other, as proxies do, and send nothing twice."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import h11

from tests.multipart import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Closed(Exception):  # noqa: N818 - what it is to a client, which may be no error
    """The server has ended the connection."""


class Client:
    """A connection to a port or, at `unix:PATH`, to a unix socket."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = h11.Connection(h11.CLIENT)

    async def open(self) -> None:
        if self._url.startswith("unix:"):
            path = self._url.removeprefix("unix:")
            self._reader, self._writer = await asyncio.open_unix_connection(path)
        else:
            address = urlsplit(self._url)
            host, port = address.hostname, address.port
            self._reader, self._writer = await asyncio.open_connection(host, port)

    @property
    def port(self) -> int:
        """Our end of it, where it leads to a port."""
        name: tuple[str, int] = self._writer.get_extra_info("sockname")
        return name[1]

    @property
    def is_over(self) -> bool:
        """Whether the server has ended it, or said that it will."""
        return self._reader.at_eof() or self._http.our_state is h11.MUST_CLOSE

    def begin(self, part: bytes) -> None:
        """Send the beginning of a request's head."""
        self._writer.write(part)

    def send(self, method: str, target: str, body: bytes = b"", begun: bytes = b"") -> None:
        """Send a request, or what comes behind its beginning."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        lines = [("Host", "localhost"), ("Content-Length", str(len(body)))]
        data = self._http.send(h11.Request(method=method, target=target, headers=lines)) or b""
        data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        assert data.startswith(begun)
        self._writer.write(data[len(begun) :])

    async def answer(self) -> tuple[int, bytes]:
        """Return an answer's status and body; raises `Closed`."""
        status, body = 0, b""
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif event is h11.NEED_DATA:
                try:
                    data = await self._reader.read(2**16)
                except ConnectionError as error:
                    raise Closed from error
                if not data:
                    raise Closed
                self._http.receive_data(data)

    async def rest(self) -> bytes:
        """Return what comes until the server ends it."""
        async with asyncio.timeout(30):
            return await self._reader.read()

    def close(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def opened(url: str, count: int) -> AsyncIterator[list[Client]]:
    """Open so many connections, on none of which anything is asked yet."""
    clients = [Client(url) for _ in range(count)]
    try:
        for client in clients:
            await client.open()
        yield clients
    finally:
        for client in clients:
            client.close()


# Between one request and the next: the processors are for the server, too.
_PACE_SECONDS = 0.02


class Load:
    """Clients that post and read, each with a connection that it keeps as long as it can.

    Of several servers, one that takes no connection is passed over, as proxies do.
    """

    def __init__(self, *urls: str) -> None:
        self._urls = urls
        self.open: dict[int, Client] = {}
        self.answered = 0
        self.posted: list[str] = []
        self.failed: list[str] = []
        """What went wrong, by the number of the client."""
        self.cut: set[int] = set()
        """Clients that may lose the request they are at, once."""

    @asynccontextmanager
    async def going_on(self, count: int) -> AsyncIterator[Load]:
        """Have so many clients go on while the block lasts."""
        self._ended = False
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(self._ask(number))
                try:
                    yield self
                finally:
                    self._ended = True
        finally:
            for client in self.open.values():
                client.close()

    async def more(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + count
        await until(lambda: self.answered >= wanted)

    async def _ask(self, number: int) -> None:
        step = 0
        while not self._ended:
            await asyncio.sleep(_PACE_SECONDS)
            step += 1
            message = f"{number}-{step}"
            try:
                async with asyncio.timeout(30):
                    client = await self._client(number)
                    await self._one(client, message, is_post=step % 2 == 0)
            except (Closed, OSError) as error:
                if number in self.open:
                    self.open.pop(number).close()
                if number in self.cut:
                    self.cut.discard(number)
                else:
                    self.failed.append(f"{message}: {error!r}")

    async def _client(self, number: int) -> Client:
        client = self.open.get(number)
        if client is not None and client.is_over:
            self.open.pop(number).close()
            client = None
        if client is None:
            client = self.open[number] = await self._connected(number)
        return client

    async def _connected(self, number: int) -> Client:
        first = number % len(self._urls)
        refusal = None
        for url in self._urls[first:] + self._urls[:first]:
            client = Client(url)
            try:
                await client.open()
            except OSError as error:
                refusal = error
            else:
                return client
        assert refusal is not None
        raise refusal

    async def _one(self, client: Client, message: str, *, is_post: bool) -> None:
        body = json.dumps({"name": "ann", "message": message}).encode() if is_post else b""
        client.send(
            "POST" if is_post else "GET", "/postchatt" if is_post else "/getchatts?limit=1", body
        )
        status, _ = await client.answer()
        if status == 200:
            self.answered += 1
            if is_post:
                self.posted.append(message)
        else:
            self.failed.append(f"{message}: {status}")
