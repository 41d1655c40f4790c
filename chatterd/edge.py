"""The outermost layer of the application: what holds for every request, whatever answers it.

Each request gets an id, must name a host that is served, and never leaves its connection in a
state the server cannot clean up.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatterd.errors import BrokenAnswer, Problem, problem_response

logger = logging.getLogger(__name__)

# How long and how much a client may go on sending after its request was answered early.
_DRAIN_SECONDS: Final = 30.0
_DRAIN_MAX_BYTES: Final = 64 * 2**20

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Edge:
    """An ASGI application around another.

    `allowed_hosts` are lower-case host names, `*.example.com` for every name below one, `*` for
    any.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        self.app = app
        self._allowed_hosts = allowed_hosts
        self._requests: set[asyncio.Task[None]] = set()
        self._discards: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the lifespan on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            await self._answer(scope, receive, send)
        finally:
            self._requests.discard(task)

    async def finish_requests(self, grace_seconds: float) -> None:
        """Give the requests under way `grace_seconds` to end, then end them.

        Python 3.12 and later wait for every open connection when a server stops: without this,
        one endless answer would keep the server from stopping.
        """
        if self._requests:
            await asyncio.wait(set(self._requests), timeout=grace_seconds)
        for task in self._requests:
            task.cancel()
        if self._requests:
            logger.warning("Ended %d requests that were still under way", len(self._requests))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _SANE_REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope["state"]["request_id"] = request_id
        body = _RequestBody(scope, headers, receive)
        id_header = (b"x-request-id", request_id.encode())

        async def send_answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], id_header]
            elif not message.get("more_body", False) and not body.ended:
                # The client has its whole answer before it is asked to finish its request.
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body", "body": b""}
                self._discard_rest(body)
            await send(message)

        app = self.app
        if not self._allows(headers.get("host", "")):
            problem = Problem("host-not-allowed", "This server does not answer under this name.")
            app = problem_response(problem, request_id)
        try:
            await app(scope, body.receive, send_answer)
        except BrokenAnswer as error:
            # Returning without the end of the answer makes the server close the connection.
            logger.warning("Broke off an answer (request %s): %s", request_id, error)
            self._discard_rest(body)
        except BaseException:
            self._discard_rest(body)
            raise

    def _discard_rest(self, body: "_RequestBody") -> None:
        if not body.ended:
            task = asyncio.create_task(body.discard())
            self._discards.add(task)
            task.add_done_callback(self._discards.discard)

    def _allows(self, host: str) -> bool:
        """Tell whether the Host header's value names this server."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower().strip("[]")
        return any(
            allowed in {"*", name} or (allowed[:2] == "*." and name.endswith(allowed[1:]))
            for allowed in self._allowed_hosts
        )


class _RequestBody:
    """What the client sends, and whether all of it has been received.

    A server such as Hypercorn puts a body's chunks into a bounded queue. When the application
    answers without emptying it, the server's own tasks wait for room in it for ever, and the
    connection stays although the client has gone. So what the application leaves is received
    here.
    """

    def __init__(self, scope: Scope, headers: Headers, receive: Receive) -> None:
        self._receive = receive
        # HTTP/1.1 announces a body (RFC 9112 §6); HTTP/2 need not.
        self.ended = scope["http_version"].startswith("1") and not (
            "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        )
        self._disconnected = False

    async def receive(self) -> Message:
        """Receive as the application does, noting the end."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._disconnected = self.ended = True
        elif not message.get("more_body", False):
            self.ended = True
        return message

    async def drain(self) -> None:
        """Receive and forget the rest, within limits.

        Closing at once would reset the connection under a client that is still sending, and
        most clients would then report a broken connection instead of the answer.
        """
        count = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self.ended and count < _DRAIN_MAX_BYTES:
                    count += len((await self.receive()).get("body", b""))

    async def discard(self) -> None:
        """Keep the queue empty while the server closes the connection, until it says so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._disconnected:
                    await self.receive()
