"""The outermost layer of the application: what holds for every request, whatever answers it.

Each request gets an id, must name a host that is served, is told of an error as a problem, and
never leaves its connection in a state the server cannot clean up.
"""

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from functools import lru_cache
from http import HTTPStatus
from time import perf_counter
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatterd import logs, metrics, proxy
from chatterd.errors import BrokenAnswer, Problem, problem_of, problem_response
from chatterd.stream_http import SENT_PAST

logger = logging.getLogger(__name__)

# How long and how much a client may go on sending after its request was answered early.
_DRAIN_SECONDS: Final = 30.0
_DRAIN_MAX_BYTES: Final = 64 * 2**20

_SANE_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Edge:
    """An ASGI application around another.

    `allowed_hosts` are lower-case host names, `*.example.com` for every name below one, `*` for
    any. `stopping` is set when the server is told to stop: what would go on for ever ends then.
    `templates` are the routes of endpoints.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: tuple[str, ...],
        stopping: asyncio.Event,
        templates: Mapping[object, str],
    ) -> None:
        self.app = app
        self._allowed_hosts = allowed_hosts
        self.stopping = stopping
        self._counted = metrics.RequestTable(templates)
        self._requests: set[asyncio.Task[None]] = set()
        self._discards: set[asyncio.Task[None]] = set()
        # Unique like a UUID for each request would be, in a tenth of the time.
        self._id_prefix = b"%b-" % secrets.token_hex(8).encode()
        self._id_counter = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: C901, PLR0915 - its steps share the id, the body and whether the answer has begun
        """Answer one request, or pass the lifespan on."""
        if scope["type"] == "websocket":
            await self._serve_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        proxy.restore(scope)
        host, request_id, has_body = _head(scope)
        if not request_id or not _SANE_REQUEST_ID.fullmatch(request_id):
            request_id = self._new_id()
        logs.request_id.set(request_id)
        status = size = 0
        is_whole = False
        body = None
        if has_body:
            body = _RequestBody(receive)
            receive = body.receive

        # No coroutine of its own: it is called for every part of an answer.
        def send_answer(message: Message) -> Awaitable[None]:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                # A proxy uses up the connections it keeps, instead of losing a request on one.
                if self.stopping.is_set() and scope["http_version"] != "2":
                    message["headers"].append((b"connection", b"close"))
                return send(message)
            size += len(message.get("body", b""))
            if body and not body.ended and not message.get("more_body", False):
                return self._end_early(body, message, send)
            return send(message)

        app = self.app
        if not _names_one_of(self._allowed_hosts, host):
            app = problem_response(_host_not_allowed(), request_id.decode())
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        metrics.IN_FLIGHT.value += 1
        try:
            await app(scope, receive, send_answer)
            is_whole = True
        except BrokenAnswer as error:
            # Returning without the end of the answer makes the server close the connection.
            logger.warning("Broke off an answer (request %s): %s", request_id.decode(), error)
        except ClientDisconnect:
            pass  # before its request was complete: there is nobody to answer
        except Exception as error:
            if status:
                raise
            problem = problem_of(error, scope["method"])
            await problem_response(problem, request_id.decode())(scope, receive, send_answer)
            is_whole = True
            if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise  # the server logs it with its traceback
        finally:
            self._requests.discard(task)
            if body:
                self._discard_rest(body)
            self._note_end(scope, request_id, status, size, started, is_whole)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a WebSocket be served, or refuse it by a problem as long as it is not accepted."""
        started = perf_counter()
        proxy.restore(scope)
        host, request_id, _ = _head(scope)
        if not request_id or not _SANE_REQUEST_ID.fullmatch(request_id):
            request_id = self._new_id()
        logs.request_id.set(request_id)
        scope["request_id"] = request_id.decode()
        scope[logs.WAITS] = "websocket"
        status = size = 0
        is_whole = False

        async def send_answer(message: Message) -> None:
            nonlocal status, size
            size += len(message.get("text") or message.get("body") or b"")
            if message["type"] in {"websocket.accept", "websocket.http.response.start"}:
                status = message.get("status", HTTPStatus.SWITCHING_PROTOCOLS)
                headers = [*message.get("headers", []), (b"x-request-id", request_id)]
                message = {**message, "headers": headers}
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        metrics.IN_FLIGHT.value += 1
        app = self.app
        if not _names_one_of(self._allowed_hosts, host):
            app = problem_response(_host_not_allowed(), scope["request_id"])
        try:
            await app(scope, receive, send_answer)
            is_whole = True
        except Exception as error:
            if status:
                raise
            problem = problem_of(error, "WebSockets")
            await problem_response(problem, scope["request_id"])(scope, receive, send_answer)
            is_whole = True
            if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
        finally:
            self._requests.discard(task)
            self._note_end(scope, request_id, status, size, started, is_whole)

    def _note_end(  # noqa: PLR0913, PLR0917 - a request has so many sides
        self,
        scope: Scope,
        request_id: bytes,
        status: int,
        size: int,
        started: float,
        is_whole: bool,  # noqa: FBT001 - by position is fastest
    ) -> None:
        """Count and log a request. `status` is 0 where there was no answer."""
        metrics.IN_FLIGHT.value -= 1
        seconds = perf_counter() - started
        size += scope.get(SENT_PAST, 0)
        waits = scope.get(logs.WAITS)
        method = scope.get("method", "GET")  # WebSockets have none
        counted = self._counted.find(scope.get("endpoint"), method, status)
        counted.ended(size, None if waits else seconds)
        if logs.requests is not None:
            logs.requests.write(
                scope, request_id, counted.route, status, size, seconds, waits, is_whole
            )

    def _new_id(self) -> bytes:
        return b"%b%x" % (self._id_prefix, next(self._id_counter))

    async def finish_requests(self, grace_seconds: float) -> None:
        """Give the requests under way `grace_seconds` to end, then end them."""
        if self._requests:
            await asyncio.wait(set(self._requests), timeout=grace_seconds)
        for task in self._requests:
            task.cancel()
        if self._requests:
            logger.warning("Ended %d requests that were still under way", len(self._requests))

    async def _end_early(self, body: "_RequestBody", message: Message, send: Send) -> None:
        """Send the end of an answer to a client that has not sent all of its request."""
        # The client has its whole answer before it is asked to finish its request.
        await send({**message, "more_body": True})
        await body.drain()
        self._discard_rest(body)
        await send({"type": "http.response.body", "body": b""})

    def _discard_rest(self, body: "_RequestBody") -> None:
        if not body.ended and not body.is_discarded:
            body.is_discarded = True
            task = asyncio.create_task(body.discard())
            self._discards.add(task)
            task.add_done_callback(self._discards.discard)


def _head(scope: Scope) -> tuple[bytes, bytes, bool]:
    """Return the host that a request names, the id it brings, and whether it may have a body."""
    host = request_id = b""
    # HTTP/1.1 announces a body (RFC 9112 §6); HTTP/2 need not.
    has_body = not scope["http_version"].startswith("1")
    for name, value in scope["headers"]:
        if name == b"host":
            host = value
        elif name == b"x-request-id":
            request_id = value
        elif name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            has_body = True
    return host, request_id, has_body


def _host_not_allowed() -> Problem:
    return Problem("host-not-allowed", "This server does not answer under this name.")


@lru_cache(256)
def _names_one_of(allowed_hosts: tuple[str, ...], host: bytes) -> bool:
    """Tell whether the Host header's value `host` names one of `allowed_hosts`."""
    match = _HOST.fullmatch(host.decode("latin-1"))
    if match is None:
        return False
    name = match[1].lower().strip("[]")
    return any(
        allowed in {"*", name} or (allowed[:2] == "*." and name.endswith(allowed[1:]))
        for allowed in allowed_hosts
    )


class _RequestBody:
    """What the client sends, and whether all of it has been received.

    A server such as Hypercorn puts a body's chunks into a bounded queue. When the application
    answers without emptying it, the server's own tasks wait for room in it for ever, and the
    connection stays although the client has gone. So what the application leaves is received
    here.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._disconnected = False
        self.ended = False
        self.is_discarded = False

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
