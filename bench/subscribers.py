"""Many clients that follow the event stream, in a process of their own.

    python -m bench.subscribers PORT COUNT MODE

opens `COUNT` streams and reads what comes until its standard input ends and nothing more comes.
MODE is `times`, to look at each chatt, or `discard`. It costs little, so as not to slow down the
server that is measured: it looks only for the number in each message that begins with `POST `.
"""

import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_DEADLINE_SECONDS: Final = 60
_PATIENCE_SECONDS: Final = 1.0
_CHUNK_BYTES: Final = 1 << 16
_NUMBER: Final = re.compile(rb'"message":"POST (\d+) ')
_LONGEST_NUMBER: Final = 40
_REQUEST: Final = b"GET /v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class Found:
    """What the subscribers saw, once they have ended.

    arrivals: of each chatt by its number, when the subscribers got it, by the monotonic clock.
    strays: chatts that came twice, out of order, or behind one that did not come.
    ended: streams that did not last.
    """

    def __init__(self) -> None:
        self.arrivals: dict[int, list[float]] = {}
        self.strays = 0
        self.ended = 0


@contextmanager
def subscribed(port: int, count: int, *, times: bool = False) -> Iterator[Found]:
    """Keep `count` streams open while the context lasts; with `times`, note each arrival.

    Raises `RuntimeError` when their process fails.
    """
    found = Found()
    mode = "times" if times else "discard"
    with subprocess.Popen(
        [sys.executable, "-m", "bench.subscribers", str(port), str(count), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C is for the bench
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():  # they have begun
                raise RuntimeError(f"{count} streams did not begin")
            yield found
            said, _ = process.communicate(timeout=_DEADLINE_SECONDS)
            if process.returncode != 0:
                raise RuntimeError("the subscribers ended in an error")
            summary = json.loads(said)
            found.arrivals = {int(number): times for number, times in summary["arrivals"].items()}
            found.strays, found.ended = summary["strays"], summary["ended"]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("the subscribers did not end") from error
        finally:
            process.kill()


class _Subscribers:
    """Streams and what has come over them."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._streams: dict[int, socket.socket] = {}
        self._next: dict[int, int] = {}
        self._half: dict[int, bytes] = {}
        self.found = Found()

    def open(self, port: int) -> None:
        """Open a stream, wait until it has begun, and follow it."""
        stream = socket.create_connection(("127.0.0.1", port), _DEADLINE_SECONDS)
        stream.sendall(_REQUEST)
        head = b""
        while b"\nid: " not in head:
            received = stream.recv(_CHUNK_BYTES)
            if not received or not head.startswith(b"HTTP/1.1 200 "[: len(head)]):
                raise RuntimeError(f"a stream did not begin: {head[:500]!r}")
            head += received
        stream.setblocking(False)
        descriptor = stream.fileno()
        self._streams[descriptor] = stream
        self._next[descriptor] = 0
        self._half[descriptor] = b""
        self._epoll.register(descriptor, select.EPOLLIN)

    def follow(self, *, times: bool) -> None:
        """Read until the standard input ends, and then what is on its way."""
        stdin = sys.stdin.fileno()
        self._epoll.register(stdin, select.EPOLLIN)
        patience_seconds = None
        while ready := self._epoll.poll(patience_seconds):
            for descriptor, _ in ready:
                if descriptor == stdin:
                    self._epoll.unregister(stdin)
                    patience_seconds = _PATIENCE_SECONDS
                else:
                    self._read(descriptor, times=times)

    def _read(self, descriptor: int, *, times: bool) -> None:
        data = b""
        with suppress(ConnectionError):
            data = self._streams[descriptor].recv(_CHUNK_BYTES)
        if not data:
            self._epoll.unregister(descriptor)
            self._streams.pop(descriptor).close()
            self.found.ended += 1
        elif times:
            self._note(descriptor, data, time.monotonic())

    def _note(self, descriptor: int, data: bytes, now: float) -> None:
        data = self._half[descriptor] + data
        end = 0
        for match in _NUMBER.finditer(data):
            end = match.end()
            number = int(match[1])
            self.found.strays += number != self._next[descriptor]
            self._next[descriptor] = number + 1
            self.found.arrivals.setdefault(number, []).append(now)
        self._half[descriptor] = data[end:][-_LONGEST_NUMBER:]


def main() -> None:
    """Subscribe until the standard input ends; write what was seen as one line of JSON."""
    port, count, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    subscribers = _Subscribers()
    for _ in range(count):
        subscribers.open(port)
    print("begun", flush=True)
    subscribers.follow(times=mode == "times")
    print(json.dumps(vars(subscribers.found)))


if __name__ == "__main__":
    main()
