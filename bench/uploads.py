"""Clients that upload: many at once, without end, or without finishing.

    python -m bench.uploads PORT FORM MEDIA COUNT

uploads the pictures of the folder FORM, `COUNT` at a time, until its standard input ends, and
writes how many answers had which status. It is a process of its own so as not to slow down whoever
measures meanwhile. It keeps removing the files in the folder MEDIA.
"""

import http.client
import itertools
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, Self

from bench import pictures
from bench.pictures import FORM_TYPE, Form

_DEADLINE_SECONDS: Final = 30
_STOP_SECONDS: Final = 10
_SAMPLE_SECONDS: Final = 0.003
_CLEANING_SECONDS: Final = 0.3
# What is younger may still be worked on.
_SETTLED_SECONDS: Final = 2
# Larger files are what was uploaded; smaller ones a program made of them.
_UPLOADED_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 1 << 16
# Small, so that what is sent is nearly what the server has taken.
_SEND_BUFFER_BYTES: Final = 1 << 18
# Those that wrk sends have numbers below.
_FIRST_PICTURE: Final = 1_000_000_000


class Refusal(NamedTuple):
    """How an upload was answered before its end.

    `taken_bytes` were sent by then, `sent_bytes` by the time that the server closed the connection.
    """

    status: int
    taken_bytes: int
    sent_bytes: int


def size(folder: Path) -> int:
    """Return the bytes in all files below `folder` at this moment, finished or not."""
    return sum(count for _, count, _ in _files(folder))


def remove(folder: Path, older_than_seconds: float = 0) -> int:
    """Remove what was uploaded to `folder` before so many seconds; return how many files."""
    limit = time.time() - older_than_seconds
    old = [
        path
        for path, count, modified in _files(folder)
        if count >= _UPLOADED_BYTES and modified <= limit
    ]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """Yield path, bytes and time of change of each file, unless it goes at this moment."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found = path.stat()
            if path.is_file():
                yield path, found.st_size, found.st_mtime


class LargestSize:
    """The largest size in bytes that a folder has while the context lasts, looked at often."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self.bytes = 0
        self.looks = 0

    def __enter__(self) -> Self:
        self._watching = self._pool.submit(self._watch)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._watching.result()  # else a watch that failed would pass for an empty folder

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, size(self._folder))
            self.looks += 1


@contextmanager
def held(port: int, form: Form, count: int, sent_bytes: int) -> Iterator[None]:
    """Begin `count` uploads and send so much of each; go no further while the context lasts.

    Raises `RuntimeError` when one is answered before its end, other than by 503.
    """
    deadline = time.monotonic() + _DEADLINE_SECONDS
    with ThreadPoolExecutor(count) as pool:
        begun = [
            pool.submit(_hold, port, form, number, sent_bytes, deadline)
            for number in range(_FIRST_PICTURE, _FIRST_PICTURE + count)
        ]
    connections = [future.result() for future in begun if future.exception() is None]
    try:
        for future in begun:
            future.result()
        yield
        if select.select(connections, [], [], 0)[0]:
            raise RuntimeError("an upload was answered before its end")
    finally:
        for connection in connections:
            connection.close()


def _hold(port: int, form: Form, number: int, sent_bytes: int, deadline: float) -> socket.socket:
    body = form.body(number)
    while True:
        connection = socket.create_connection(("127.0.0.1", port), _DEADLINE_SECONDS)
        try:
            connection.sendall(_head(f"Content-Length: {len(body)}"))
            connection.sendall(memoryview(body)[:sent_bytes])
            # An upload that must wait for others is told so at once.
            if not select.select([connection], [], [], 0.5)[0]:
                return connection
            retry_seconds = _retry_seconds(connection)
        except BaseException:
            connection.close()
            raise
        connection.close()
        if time.monotonic() + retry_seconds > deadline:
            raise RuntimeError("not so many uploads at once are taken")
        time.sleep(retry_seconds)


def _retry_seconds(connection: socket.socket) -> float:
    """Read that there are too many uploads; return when to try again."""
    with http.client.HTTPResponse(connection) as answer:
        answer.begin()
        if answer.status != 503:
            raise RuntimeError(f"an upload was answered {answer.status} before its end")
        return float(answer.headers.get("Retry-After", 1))


def _head(length: str) -> bytes:
    return (
        f"POST /postimages HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: {FORM_TYPE['Content-Type']}\r\n{length}\r\n\r\n"
    ).encode()


def refused(port: int, form: Form, size: int) -> Refusal:
    """Send `size` bytes for a picture in chunks, until the server closes the connection.

    Raises `RuntimeError` when there is no answer, `OSError` when the server stops taking anything.
    """
    body = form.body(_FIRST_PICTURE)
    parts = itertools.cycle(
        _chunk(form.after[at : at + _CHUNK_BYTES])
        for at in range(0, len(form.after) - 2 * _CHUNK_BYTES, _CHUNK_BYTES)  # not the form's end
    )
    pending = memoryview(_head("Transfer-Encoding: chunked") + _chunk(body[:_CHUNK_BYTES]))
    answer, sent, taken = b"", 0, 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        connection.connect(("127.0.0.1", port))
        connection.setblocking(False)
        with suppress(ConnectionError):  # closed while there was more to send
            while sent < size:
                readable, writable, _ = select.select(
                    [connection], [connection], [], _DEADLINE_SECONDS
                )
                if not writable and not readable:
                    raise TimeoutError("the server neither takes nor refuses the upload")
                if readable:
                    received = connection.recv(_CHUNK_BYTES)
                    if not received:
                        break
                    taken = taken or sent
                    answer += received
                if writable:
                    count = connection.send(pending)
                    sent += count
                    pending = pending[count:] or memoryview(next(parts))
    if not answer:
        raise RuntimeError(f"{sent} bytes were taken, and not answered")
    return Refusal(int(answer.split(b" ", 2)[1]), taken, sent)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Endless:
    """How many answers had which status, once the uploads have ended."""

    def __init__(self) -> None:
        self.answers: dict[str, int] = {}


@contextmanager
def endless(port: int, form: Path, media: Path, count: int) -> Iterator[Endless]:
    """Keep `count` uploads running while the context lasts.

    Raises `RuntimeError` when their process fails.
    """
    found = Endless()
    with subprocess.Popen(
        [sys.executable, "-m", "bench.uploads", str(port), str(form), str(media), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C is for the bench
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():  # it has begun
                raise RuntimeError("the uploads did not begin")
            yield found
            said, _ = process.communicate(timeout=_STOP_SECONDS)
            if process.returncode != 0:
                raise RuntimeError("the uploads ended in an error")
            found.answers = json.loads(said)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("the uploads did not end") from error
        finally:
            process.kill()


def main() -> None:
    """Upload until the standard input ends."""
    port, count = int(sys.argv[1]), int(sys.argv[4])
    form, media = pictures.read(Path(sys.argv[2])), Path(sys.argv[3])
    answers: Counter[str] = Counter()
    numbers = itertools.count(_FIRST_PICTURE + int(time.time()) % 1_000_000 * 1_000)
    begun = threading.Barrier(count + 1)
    for _ in range(count):
        # They end with the process.
        threading.Thread(
            target=_upload_for_ever, args=(port, form, numbers, answers, begun), daemon=True
        ).start()
    begun.wait(_DEADLINE_SECONDS)
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], _CLEANING_SECONDS)[0]:
        remove(media, _SETTLED_SECONDS)
    print(json.dumps(dict(answers)))


def _upload_for_ever(
    port: int, form: Form, numbers: Iterator[int], answers: Counter[str], begun: threading.Barrier
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
    connection.connect()
    begun.wait(_DEADLINE_SECONDS)
    while True:
        try:
            connection.request("POST", "/postimages", form.body(next(numbers)), FORM_TYPE)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            answers[type(error).__name__] += 1
            connection.close()
            time.sleep(0.1)  # not a storm, if the server is gone
            continue
        answers[str(answer.status)] += 1
        if answer.status == 503:
            time.sleep(float(answer.headers.get("Retry-After", 1)))


if __name__ == "__main__":
    main()
