"""The socket that a server listens on: a port, a unix socket, or one that was handed down."""

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from chatterd.lifespan import StartError

BACKLOG: Final = 1024
# What the kernel takes (macOS; Linux has 4 more), less what a temporary name adds: `.4194304`.
_PATH_BYTES: Final = 103 - 8


class Address(NamedTuple):
    """Where to listen: on the inherited descriptor `fd`, else at the path `uds`, else at a port.

    Port 0 takes a free one. TLS where both files are given.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certfile: Path | None = None
    keyfile: Path | None = None
    uds: Path | None = None
    fd: int | None = None


class Listener:
    """A socket that listens at `address` until it is closed; its file is removed then.

    Raises `StartError` where that is impossible.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._file: os.stat_result | None = None
        if address.fd is not None:
            self.socket = _inherited(address.fd)
        elif address.uds is not None:
            self.socket = self._bind(address.uds)
        else:
            self.socket = _at_port(address)

    @property
    def url(self) -> str:
        """The URL under which it answers; `unix:` and the path for a unix socket."""
        if self.socket.family == socket.AF_UNIX:
            return f"unix:{self.address.uds or self.socket.getsockname()}"
        host, port = self.socket.getsockname()[:2]
        scheme = "https" if self.address.certfile else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def refuse(self) -> None:
        """Let nobody connect any more, where the system can do that without losing anybody.

        Who has connected to a unix socket can still be accepted. At a port, there is only
        closing, which resets who waits to be accepted. And what was handed down is not ours to
        shut: others listen on it.
        """
        if self.address.fd is not None or self.socket.family != socket.AF_UNIX:
            return
        self._unlink()
        with suppress(OSError):  # macOS shuts no socket that listens
            self.socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Stop listening."""
        self._unlink()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _bind(self, path: Path) -> socket.socket:
        """Put a socket in the place of what another server has left or still listens on.

        There is no moment without a socket that listens: it is renamed when it does.
        """
        if len(bytes(path)) > _PATH_BYTES:
            raise StartError(
                f"The path {path} is too long for a socket: {len(bytes(path))} bytes, where"
                f" {_PATH_BYTES} are possible."
            )
        if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartError(f"Cannot listen on {path}: something is there, and it is no socket.")
        new = path.with_name(f"{path.name}.{os.getpid()}")
        listener = socket.socket(socket.AF_UNIX)
        try:
            new.unlink(missing_ok=True)
            listener.bind(str(new))
            # Who may connect is a matter of who may enter the folder.
            new.chmod(0o666)
            listener.listen(BACKLOG)
            self._file = new.lstat()
            new.replace(path)
        except OSError as error:
            listener.close()
            new.unlink(missing_ok=True)
            raise StartError(f"Cannot listen on {path}: {error.strerror}.") from error
        return listener

    def _unlink(self) -> None:
        """Remove the file, unless another server has put its own in its place."""
        file, self._file = self._file, None
        if file is None or self.address.uds is None:
            return
        with suppress(OSError):
            if os.path.samestat(self.address.uds.lstat(), file):
                self.address.uds.unlink()


def _at_port(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(
            f"Cannot listen on {address.host} port {address.port}: {reason}."
        ) from error


def _inherited(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise StartError(
            f"The descriptor {descriptor} is no socket that listens: {error.strerror}."
        ) from error
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise StartError(f"The descriptor {descriptor} is no socket that listens.")
    listener.set_inheritable(False)
    return listener
