"""Hypercorn's connections, which do as much for less.

Hypercorn has no setting for this: `install` puts ours in place of its own. Where a later version
does not use the names, speed is lost, connections whose client has left stay for
keep_alive_timeout, and WebSockets take compressed frames.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, TypeAlias

from hypercorn.asyncio import run, tcp_server
from hypercorn.events import Event, RawData
from hypercorn.protocol import events as protocol_events
from hypercorn.protocol import h2, h11, ws_stream
from hypercorn.typing import AppWrapper
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection

from chatterd.stream_http import SEND_CHUNK

_IDLE_SECONDS: Final = 0.2
_CLOSE_SECONDS: Final = 30.0
# Up to here, what is sent within one turn of the event loop goes out in one write. A large part
# goes alone: behind a head it would not begin on a page, and its copying took half as long again.
_HELD_SIZE: Final = 32 * 1024

_Action: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def install() -> None:
    """Make Hypercorn use connections of this kind."""
    run.TCPServer = Connection  # type: ignore[attr-defined, assignment] # a subclass of it
    for protocol in (h11, h2):
        protocol.WSStream = WebSocket  # type: ignore[attr-defined] # a subclass of it


class Connection(tcp_server.TCPServer):
    """Sends an answer's head, body and end at once, where Hypercorn sends one by one."""

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - Hypercorn's own
        super().__init__(*args)
        self.idle_task = LateTask(self.loop)  # type: ignore[assignment] # same methods
        self.app = _Offering(self.app, self._send_chunk)  # type: ignore[assignment] # called alike
        self._held: list[bytes] = []
        self._held_size = 0

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

    async def _close(self) -> None:
        self._release()
        async with asyncio.timeout(_CLOSE_SECONDS) as deadline:
            await super()._close()  # ends without an error also when it is cancelled
        if deadline.expired():  # the client takes no more of what was sent
            self.writer.transport.abort()


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
