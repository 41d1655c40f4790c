"""Hypercorn's connections, which do as much for less.

Hypercorn has no setting for this: `install` puts ours in place of its own. Where a later version
does not use the names, speed is lost, connections whose client has left stay for
keep_alive_timeout, WebSockets take compressed frames, and a server that stops cuts connections.
"""

import asyncio
import select
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeAlias, cast

from h2 import events as h2_events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hypercorn import protocol as protocols
from hypercorn.asyncio import run, tcp_server
from hypercorn.events import Event, RawData
from hypercorn.protocol import events as protocol_events
from hypercorn.protocol import h2, h11, ws_stream
from hypercorn.typing import AppWrapper
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection

from chatterd.stream_http import SEND_CHUNK

_IDLE_SECONDS: Final = 0.2
# What the head of a request may take, how long a new connection may wait with it, and how often
# that is looked at.
_HEAD_SECONDS = 30.0
_LOOK_SECONDS = 5.0
# How long an idle connection stays when the server stops, less _IDLE_SECONDS: a proxy that has
# just begun to send a request is to get its answer.
_LAST_SECONDS: Final = 0.8
_CLOSE_SECONDS: Final = 30.0
# Up to here, what is sent within one turn of the event loop goes out in one write. A large part
# goes alone: behind a head it would not begin on a page, and its copying took half as long again.
_HELD_SIZE: Final = 32 * 1024

_Action: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class Connections:
    """Those that are open, and their end when the server stops."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        """Set when each is to be closed as soon as it is idle and nothing more comes."""
        self._open: set[Connection] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()

    def install(self) -> None:
        """Make Hypercorn use connections of our kind."""
        run.TCPServer = partial(Connection, self)  # type: ignore[attr-defined, assignment] # makes one of a subclass
        protocols.H2Protocol = HTTP2  # type: ignore[attr-defined] # a subclass of it
        for module in (h11, h2):
            module.WSStream = WebSocket  # type: ignore[attr-defined] # a subclass of it

    def add(self, connection: "Connection") -> None:
        """Count one that has been opened."""
        self._open.add(connection)
        self._none_open.clear()

    def remove(self, connection: "Connection") -> None:
        """Count it no more."""
        self._open.discard(connection)
        if not self._open:
            self._none_open.set()

    async def none_open(self) -> None:
        """Wait until the last one is closed."""
        await self._none_open.wait()

    def abort(self) -> None:
        """Close all at once, whatever is still to be sent."""
        for connection in list(self._open):
            connection.writer.transport.abort()


class Connection(tcp_server.TCPServer):
    """Sends an answer's head, body and end at once, where Hypercorn sends one by one."""

    def __init__(self, connections: Connections, *args: Any) -> None:  # noqa: ANN401 - Hypercorn's own
        super().__init__(*args)
        self._connections = connections
        self.idle_task = LateTask(self.loop)  # type: ignore[assignment] # same methods
        self.app = _Offering(self.app, self._send_chunk)  # type: ignore[assignment] # called alike
        self._held: list[bytes] = []
        self._held_size = 0

    async def run(self) -> None:
        """Serve the client until either side closes."""
        self._connections.add(self)
        await super().run()

    async def protocol_send(self, event: Event) -> None:
        """Send what the protocol says, in order; wait while the client takes no more."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        is_large = self._held_size + len(event.data) > _HELD_SIZE
        if is_large or self.writer.transport.get_write_buffer_size():
            self._release()
            await super().protocol_send(event)  # waits, and notices a lost connection
        elif event.data:
            if not self._held:
                self.loop.call_soon(self._release)
            self._held.append(event.data)
            self._held_size += len(event.data)

    def _send_chunk(self, chunk: bytes) -> bool:
        """Send a chunk of the answer under way past Hypercorn, if all before has been sent.

        To send it through Hypercorn takes twice as long, which counts where many wait for it.
        """
        transport = self.writer.transport
        if self._held or transport.is_closing() or transport.get_write_buffer_size():
            return False
        transport.write(chunk)
        return True

    def _release(self) -> None:
        """Hand what is held to the transport."""
        if self._held:
            held, self._held, self._held_size = self._held, [], 0
            # The reading side notices a lost connection, too.
            with suppress(ConnectionError, RuntimeError):
                self.writer.writelines(held)

    async def _idle_timeout(self) -> None:
        """Close it when it has been idle for too long, or is and the server stops."""
        idle = waiting = 0.0
        draining = self._connections.draining
        while (
            not draining.is_set()
            and idle < self.config.keep_alive_timeout
            and waiting < _HEAD_SECONDS
        ):
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await draining.wait()
            idle += _LOOK_SECONDS
            is_new = self.protocol.protocol.keep_alive_requests == 0
            waiting = waiting + _LOOK_SECONDS if is_new or self._head_has_begun() else 0.0
        if draining.is_set():
            await self._say_goodbye()
            has_more = True
            while has_more:
                await asyncio.sleep(_LAST_SECONDS)
                has_more = await self._has_more()
        await asyncio.shield(self._initiate_server_close())

    async def _say_goodbye(self) -> None:
        """Tell a client of HTTP/2 which requests were answered: others it may send elsewhere."""
        protocol = self.protocol.protocol
        if isinstance(protocol, h2.H2Protocol):
            protocol.connection.close_connection()
            await self.protocol_send(RawData(protocol.connection.data_to_send()))

    def _head_has_begun(self) -> bool:
        protocol = self.protocol.protocol
        return isinstance(protocol, h11.H11Protocol) and protocol.connection.trailing_data[0] != b""

    async def _has_more(self) -> bool:
        """Tell whether a request has begun to come, be it only to the socket."""
        transport = cast("asyncio.Transport", self.writer.transport)  # one for both ways
        if transport.is_closing():
            return False
        transport.pause_reading()
        has_more = True
        try:
            # What has been read comes to the protocol, which ends this if it is a request.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            unread = select.poll()
            unread.register(self.writer.get_extra_info("socket").fileno(), select.POLLIN)
            has_more = self._head_has_begun() or unread.poll(0) != []
        finally:
            if has_more and not transport.is_closing():
                transport.resume_reading()
        return has_more

    async def _close(self) -> None:
        self._release()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS) as deadline:
                await super()._close()  # ends without an error also when it is cancelled
            if deadline.expired():  # the client takes no more of what was sent
                self.writer.transport.abort()
        finally:
            # Not when `run` ends: Hypercorn's next ping of a WebSocket is waited for there.
            self._connections.remove(self)


class HTTP2(h2.H2Protocol):
    """Takes no harm from a client that sends on after its request was answered and forgotten."""

    async def _handle_events(self, events: list[h2_events.Event]) -> None:
        for event in events:
            if isinstance(event, h2_events.DataReceived) and event.stream_id not in self.streams:
                # Hypercorn would not find the request, and all others would end with it.
                self._refuse(event)
                await self._flush()
            else:
                await super()._handle_events([event])

    def _refuse(self, event: h2_events.DataReceived) -> None:
        """Have the client send no more of a request that has its answer (RFC 9113 §8.1)."""
        assert event.stream_id is not None
        with suppress(ProtocolError):  # it has just ended it itself
            self.connection.acknowledge_received_data(
                event.flow_controlled_length or 0, event.stream_id
            )
            self.connection.reset_stream(event.stream_id, ErrorCodes.NO_ERROR)


class WebSocket(ws_stream.WSStream):
    """Takes nothing that is compressed, and nothing more once it has said goodbye."""

    async def handle(self, event: protocol_events.Event) -> None:
        """Take what comes from the client."""
        if isinstance(event, protocol_events.Request):
            # A frame of 64 KiB would become 64 MiB before anybody looks how long it is; and what
            # compresses takes 100 KB for each connection.
            headers = [
                (name, value)
                for name, value in event.headers
                if name.lower() != b"sec-websocket-extensions"
            ]
            event = replace(event, headers=headers)
        await super().handle(event)

    async def _handle_events(self) -> None:
        if self.connection.state is not ConnectionState.LOCAL_CLOSING:
            await super()._handle_events()
        if self.connection.state is ConnectionState.LOCAL_CLOSING:
            # Hypercorn stumbles over the rest of a message that is too long, and never comes to
            # the client's goodbye behind it.
            for event in self.connection.events():
                if isinstance(event, CloseConnection):
                    await self.send(protocol_events.StreamClosed(stream_id=self.stream_id))


class _Offering:
    """The application, to which a connection of HTTP/1.1 offers to send chunks."""

    def __init__(self, app: AppWrapper, send_chunk: Callable[[bytes], bool]) -> None:
        self._app = app
        self._send_chunk = send_chunk

    def __call__(self, scope: Any, *rest: Any) -> Coroutine[Any, Any, None]:  # noqa: ANN401 - Hypercorn's own
        if scope["http_version"] == "1.1":
            scope["extensions"][SEND_CHUNK] = self._send_chunk
        return self._app(scope, *rest)


class LateTask:
    """A connection's watch over its idleness, `hypercorn.typing.SingleTask`, begun a little later.

    Hypercorn begins a task after each answer and ends it with the next request. Under load that
    one comes at once, and the task is a seventh of what a small request costs. And it is a task of
    its own here: Hypercorn's keeps the connection of a client that has left until it ends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._action: _Action | None = None
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def restart(self, _task_group: object, action: _Action) -> None:
        """Run `action` in a moment, in place of what was run before."""
        await self.stop()
        self._action = action
        self._idle_since = self._loop.time()
        # A timer for each request would cost more than the one that looks now and then.
        if self._timer is None:
            self._timer = self._loop.call_later(_IDLE_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._action is None:
            return
        left = self._idle_since + _IDLE_SECONDS - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._task = self._loop.create_task(self._action())

    async def stop(self) -> None:
        """End it."""
        self._action = None
        if self._task:
            task, self._task = self._task, None
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
