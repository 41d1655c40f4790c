"""Serving the application with Hypercorn: TLS, start and stop."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final

import hypercorn.asyncio
import uvloop
from hypercorn.config import Config
from hypercorn.utils import LifespanFailureError

from chatterd import settings
from chatterd.connection import Connections
from chatterd.edge import Edge
from chatterd.lifespan import StartError
from chatterd.listener import BACKLOG, Address, Listener
from chatterd.notify import notify, watchdog_seconds
from chatterd.proxy import KEEP_ALIVE_SECONDS

logger = logging.getLogger(__name__)

# Requests whose client has left, or that have been ended, get a moment for it.
_CUT_SECONDS: Final = 0.3
# What the application may take to close, when all connections are. Whatever is posted is stored by
# then, unless the database hangs.
_CLOSE_SECONDS: Final = 2.0
# What has just been accepted has become a connection after a few turns of the event loop, however
# long they take; with TLS, when both sides have shaken hands.
_OPENING_TURNS: Final = 20
_TLS_OPENING_SECONDS: Final = 1.0
# How long a TLS connection that we close waits for the client's own goodbye; asyncio's 30 seconds
# would outlast the stop.
_TLS_GOODBYE_SECONDS: Final = 0.2
_PING_SECONDS: Final = 20.0
# Objects made and not yet freed, after which Python looks for garbage; its own default is 700.
_GARBAGE_THRESHOLD: Final = 20_000


def run(app: Edge, listener: Listener, on_ready: Callable[[], None]) -> None:
    """Run `serve` in an event loop of its own. Exits as a shell reports it when cut short."""
    _allow_descriptors()
    with asyncio.Runner(loop_factory=_Loop) as runner:
        signum = runner.run(serve(app, listener, on_ready))
    if signum:
        sys.exit(128 + signum)


def _allow_descriptors() -> None:
    """Allow as many open connections and files as the system lets us: each takes a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says "no limit" and means another
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Loop(uvloop.Loop):
    """Says to a server what Hypercorn has no setting for, and lets it stop before its connections.

    uvloop, and not asyncio's own: a small request takes 4 to 9 % less time.
    """

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:  # noqa: ANN401 - asyncio's signature
        """Begin to accept connections on the socket `sock` of the options."""
        if options.get("ssl"):
            options.setdefault("ssl_shutdown_timeout", _TLS_GOODBYE_SECONDS)
        if options["sock"].family == socket.AF_UNIX:
            server = await super().create_unix_server(args[0], **options)
        else:
            server = await super().create_server(args[0], **options)
        how = {name: value for name, value in options.items() if name.startswith("ssl")}
        self._server, self._adopt = server, partial(self.connect_accepted_socket, args[0], **how)
        return server  # type: ignore[return-value] # has all of its methods

    def stop_accepting(self, listener: Listener) -> None:
        """Accept those who have connected, and nobody after them."""
        self._server.close()
        listener.refuse()
        listener.socket.setblocking(False)
        accepted = []
        with suppress(OSError):  # that was the last one
            # At a port, or where others accept, too, more may come all the time.
            for _ in range(BACKLOG):
                accepted.append(listener.socket.accept()[0])  # noqa: PERF401 - what came before the error counts
        listener.close()
        # One who has left, or shakes no hands, is no fault.
        self._adopted = asyncio.gather(*map(self._adopt, accepted), return_exceptions=True)

    async def adopted(self) -> None:
        """Wait until whoever was accepted last has become a connection."""
        await asyncio.wait({self._adopted}, timeout=_TLS_OPENING_SECONDS)
        for _ in range(_OPENING_TURNS):
            await asyncio.sleep(0)


class _Stop:
    """The signals that have come: the first asks to stop, the second to stop at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.hurried_by = 0
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has SIGHUP ignored. Shells do so with SIGINT for what is in the background.
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, self._take, signum)

    def _take(self, signum: int) -> None:
        if self.asked.is_set():
            self.hurried_by = signum
            self.hurried.set()
        self.asked.set()


async def serve(app: Edge, listener: Listener, on_ready: Callable[[], None]) -> int:
    """Serve `app` until SIGINT, SIGTERM or SIGHUP; `on_ready` is called when it answers.

    Then nobody new is accepted, and what is under way gets SHUTDOWN_TIMEOUT to finish, unless a
    second signal comes: it is returned, else 0. Raises what the application's lifespan raises at
    start.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    loop.set_exception_handler(_log_loop_error)
    stop = _Stop(loop)
    connections = Connections()
    connections.install()
    away = asyncio.Event()  # set while no connection is looked after
    away.set()
    _begin_pings(loop)
    if listener.address.fd is not None:
        _stop_with_supervisor(loop, stop.asked)

    async def until_stopped() -> None:
        """Begin when Hypercorn listens; it stops when this returns."""
        away.clear()
        # What has been imported stays; looking through it for garbage again and again would take
        # a third of the application's own time. A request leaves little garbage in cycles: it
        # need not be looked for after every few of them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GARBAGE_THRESHOLD)
        on_ready()
        notify("READY=1")
        await stop.asked.wait()
        notify("STOPPING=1")
        app.stopping.set()
        connections.draining.set()
        loop.stop_accepting(listener)
        await loop.adopted()
        await asyncio.sleep(_TLS_OPENING_SECONDS if listener.address.certfile else 0)
        await _first(
            connections.none_open(), stop.hurried.wait(), seconds=settings.SHUTDOWN_TIMEOUT
        )
        await app.finish_requests(_CUT_SECONDS)
        await _first(connections.none_open(), seconds=_CUT_SECONDS)
        connections.abort()
        away.set()

    server = asyncio.create_task(
        hypercorn.asyncio.serve(app, _config(listener), shutdown_trigger=until_stopped)  # type: ignore[arg-type] # its own ASGI types
    )
    await _first(_end(server), stop.asked.wait())
    await _first(_end(server), away.wait())
    # A database that hangs can keep Hypercorn waiting for the lifespan.
    _, late = await asyncio.wait({server}, timeout=_CLOSE_SECONDS)
    for task in late:
        task.cancel()
    await _outcome(server, was_stopped=stop.asked.is_set())
    return stop.hurried_by


async def _first(*waits: Coroutine[Any, Any, object], seconds: float | None = None) -> None:
    """Wait until one of them ends, at most for so many seconds."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _end(task: asyncio.Task[None]) -> None:
    """Wait for the end of a task, which is neither cancelled nor asked for its outcome."""
    await asyncio.wait({task})


def _begin_pings(loop: asyncio.AbstractEventLoop) -> None:
    """Say from time to time that the event loop turns, where whoever started us asks for it."""
    seconds = watchdog_seconds()
    if seconds is None:
        return

    def ping() -> None:
        notify("WATCHDOG=1")
        loop.call_later(seconds / 2, ping)

    ping()


def _stop_with_supervisor(loop: asyncio.AbstractEventLoop, asked: asyncio.Event) -> None:
    """Stop when the supervisor is gone, which holds the other end of the standard input."""

    def stop() -> None:
        loop.remove_reader(0)
        asked.set()

    loop.add_reader(0, stop)


async def _outcome(server: asyncio.Task[None], *, was_stopped: bool) -> None:
    """Raise what made the server end, unless it was told to."""
    try:
        with suppress(asyncio.CancelledError):
            await server
    except LifespanFailureError as error:
        # What the lifespan raised; the rest is a wrapping of its traceback as text.
        raise error.__context__ or error from None
    except Exception as error:
        if not was_stopped:
            raise
        # What a connection met while it was closed, such as a client that went on sending: no
        # fault of the server's, which has stopped.
        logger.warning("A connection ended in an error: %s", type(error).__name__)


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log in one line what a client did to its own connection, such as sending on after its end."""
    error = context.get("exception")
    # What we ended: a connection, which Python 3.11 takes for an error, or, when a client kept the
    # server from stopping, the lifespan, which has cleaned up by then.
    if isinstance(error, asyncio.CancelledError | TimeoutError | LifespanFailureError):
        return
    if "client_connected_cb" in context["message"]:
        logger.warning("A connection ended in an error: %r", error)
    else:
        loop.default_exception_handler(context)


class _Config(Config):
    """Makes the Date header, the only one here, once a second and not for each answer."""

    _date: tuple[int, list[tuple[bytes, bytes]]] = (0, [])

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Return the headers that the server itself puts into each answer."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = (second, super().response_headers(protocol))
        return self._date[1]


def _config(listener: Listener) -> Config:
    address = listener.address
    config = _Config()
    # A descriptor of Hypercorn's own: ours listens on for a moment when that is closed.
    config.bind = [f"fd://{os.dup(listener.socket.fileno())}"]
    # Through our own handler, and only once.
    config.errorlog = logging.getLogger("hypercorn.error")
    config.errorlog.setLevel(logging.WARNING)  # the start is announced in our own words
    # Parts of a body that wait for the application, of 64 KiB each. With room for two, Hypercorn
    # was seen to wait for itself and to keep connections whose client had left.
    config.max_app_queue_size = 4
    config.websocket_max_message_size = settings.JSON_MAX_SIZE
    # Who has gone without a word is noticed, and proxies do not hang up.
    config.websocket_ping_interval = _PING_SECONDS
    config.include_server_header = False
    config.graceful_timeout = 0.5  # requests had their time before
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    # Past it, Hypercorn ends a connection of HTTP/2 with the requests that are under way on it.
    config.keep_alive_max_requests = sys.maxsize
    if address.certfile:
        config.certfile = str(address.certfile)
        config.keyfile = str(address.keyfile)
    return config


def check_tls(address: Address) -> None:
    """Raise `StartError` unless the certificate and its key can be read and belong together."""
    if (address.certfile is None) != (address.keyfile is None):
        raise StartError("TLS needs both --certfile and --keyfile.")
    if address.certfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            address.certfile, address.keyfile
        )
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error
        raise StartError(
            f"The certificate {address.certfile} with the key {address.keyfile} cannot be used:"
            f" {reason}."
        ) from error
