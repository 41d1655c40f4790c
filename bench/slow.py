"""Clients that send a byte a second, in a process of their own.

    python -m bench.slow PORT COUNT

keeps `COUNT` connections open until its standard input ends. A third is within a request's head, a
third within a JSON body, a third within a form with a picture. Who is cut begins anew.
"""

import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from bench.pictures import FORM_TYPE

_BYTE_SECONDS: Final = 1.0
_DEADLINE_SECONDS: Final = 60
_HEAD: Final = (
    b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %b\r\nContent-Length: 5000\r\n"
)
_JSON: Final = _HEAD % (b"/postchatt", b"application/json") + b"\r\n{"
_BOUNDARY: Final = FORM_TYPE["Content-Type"].partition("boundary=")[2].encode()
_FORM: Final = (
    _HEAD % (b"/postimages", FORM_TYPE["Content-Type"].encode())
    + b'\r\n--%b\r\nContent-Disposition: form-data; name="message"\r\n\r\n' % _BOUNDARY
)
_KINDS: Final = (_HEAD % (b"/postchatt", b"application/json") + b"X-Slow: ", _JSON, _FORM)


@contextmanager
def slow_clients(port: int, count: int) -> Iterator[None]:
    """Have `count` of them while the context lasts; raises `RuntimeError` when they fail."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.slow", str(port), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C is for the bench
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():  # they are there
                raise RuntimeError(f"{count} slow clients did not connect")
            yield
            process.communicate(timeout=_DEADLINE_SECONDS)
            if process.returncode != 0:
                raise RuntimeError("the slow clients ended in an error")
        finally:
            process.kill()


class _Client:
    """One of them; `number` decides what it is slow at."""

    def __init__(self, port: int, number: int) -> None:
        self._port = port
        self._begin = _KINDS[number % len(_KINDS)]
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), _DEADLINE_SECONDS)
        self._socket.sendall(self._begin)
        self._socket.setblocking(False)

    def send(self) -> None:
        """Send the next byte; connect anew where the server has hung up or has answered."""
        with suppress(BlockingIOError):
            with suppress(ConnectionError):
                self._socket.recv(1 << 16)  # an answer, or the end
            self._socket.close()
            self._connect()
        with suppress(ConnectionError):  # it is noticed at the next byte
            self._socket.send(b"x")


def main() -> None:
    """Be slow until the standard input ends."""
    port, count = int(sys.argv[1]), int(sys.argv[2])
    clients = [_Client(port, number) for number in range(count)]
    print("begun", flush=True)
    stdin = sys.stdin.fileno()
    due = time.monotonic()
    while True:
        for client in clients:
            due += _BYTE_SECONDS / count
            ready, _, _ = select.select([stdin], [], [], max(0.0, due - time.monotonic()))
            if ready:
                return
            client.send()


if __name__ == "__main__":
    main()
