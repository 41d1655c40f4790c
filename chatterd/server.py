"""Serving the application with Hypercorn: sockets, TLS, start and stop."""

import asyncio
import gc
import logging
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import hypercorn.asyncio
import uvloop
from hypercorn.config import Config
from hypercorn.utils import LifespanFailureError

from chatterd import connection, settings
from chatterd.edge import Edge
from chatterd.lifespan import StartError

logger = logging.getLogger(__name__)

# Ctrl-C stops everything within 3 seconds; the embedded database needs its part of them.
_GRACE_SECONDS: Final = 1.5
_STOP_SECONDS: Final = 2.2
# How long a TLS connection that we close waits for the client's own goodbye; asyncio's 30 seconds
# would outlast the stop.
_TLS_GOODBYE_SECONDS: Final = 0.2
_BACKLOG: Final = 1024
_PING_SECONDS: Final = 20.0
# Objects made and not yet freed, after which Python looks for garbage; its own default is 700.
_GARBAGE_THRESHOLD: Final = 20_000


class Address(NamedTuple):
    """Where to listen. Port 0 takes a free one. TLS where both files are given."""

    host: str
    port: int
    certfile: Path | None = None
    keyfile: Path | None = None


def listen(address: Address) -> socket.socket:
    """Return a socket that listens at `address`; raises `StartError` where that is impossible."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(
            f"Cannot listen on {address.host} port {address.port}: {reason}."
        ) from error


def url_of(listener: socket.socket, address: Address) -> str:
    """Return the URL under which `listener` answers."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if address.certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def run(app: Edge, listener: socket.socket, address: Address, on_ready: Callable[[], None]) -> None:
    """Run `serve` in an event loop of its own."""
    _allow_descriptors()
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(serve(app, listener, address, on_ready))


def _allow_descriptors() -> None:
    """Allow as many open connections and files as the system lets us: each takes a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says "no limit" and means another
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Loop(uvloop.Loop):
    """Says to a TLS server what Hypercorn has no setting for.

    uvloop, and not asyncio's own: a small request takes 4 to 9 % less time.
    """

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:  # noqa: ANN401 - asyncio's signature
        if options.get("ssl"):
            options.setdefault("ssl_shutdown_timeout", _TLS_GOODBYE_SECONDS)
        return await super().create_server(*args, **options)  # type: ignore[return-value] # has all of its methods


async def serve(
    app: Edge, listener: socket.socket, address: Address, on_ready: Callable[[], None]
) -> None:
    """Serve `app` until SIGINT or SIGTERM; `on_ready` is called when requests will be answered.

    Requests under way get a moment to finish. Raises whatever the application's lifespan raises
    at start.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_loop_error)
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stopping.set)

    async def until_stopped() -> None:
        """Begin when Hypercorn listens; it stops when this returns."""
        # What has been imported stays; looking through it for garbage again and again would take
        # a third of the application's own time. A request leaves little garbage in cycles: it
        # need not be looked for after every few of them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GARBAGE_THRESHOLD)
        on_ready()
        await stopping.wait()
        await app.finish_requests(_GRACE_SECONDS)

    connection.install()
    config = _config(listener, address)
    server = asyncio.create_task(
        hypercorn.asyncio.serve(app, config, shutdown_trigger=until_stopped)  # type: ignore[arg-type] # its own ASGI types
    )
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({server, stopped}, return_when=asyncio.FIRST_COMPLETED)
    # A client that neither reads nor leaves can keep Hypercorn waiting for ever.
    _, late = await asyncio.wait({server}, timeout=_STOP_SECONDS)
    for task in (stopped, *late):
        task.cancel()
    await _outcome(server, was_stopped=stopping.is_set())


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


def _config(listener: socket.socket, address: Address) -> Config:
    config = _Config()
    config.bind = [f"fd://{listener.detach()}"]  # Hypercorn's from here on
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
    # Also the time a request's head may take.
    config.keep_alive_timeout = 5
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
