"""The log: a line for each record and for each request, as text for people or JSON for programs.

A request's line is built here and written in the background: with `logging` it would take a tenth
of a small request's time. docs/decisions/0015-observability.md says more.
"""

import logging
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from typing import Final
from urllib.parse import quote

import msgspec
from starlette.types import Scope

request_id: Final[ContextVar[bytes]] = ContextVar("request_id", default=b"")
"""The id of the request that is being answered."""

WAITS: Final = "chatterd.waits"
"""Where a scope says for what kind of wait a request is: its time tells nothing of the server."""

_WRITE_SECONDS: Final = 0.2
_FINISH_SECONDS: Final = 0.5
LINES_MAX: Final = 20_000
_WORD_MAX: Final = 50
_PATH_MAX: Final = 200
# What would end a line, or move a terminal's cursor: ASCII's controls, and those of Unicode that
# some programs take for the end of a line.
_CONTROLS: Final = {
    code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)
}


class _Record(msgspec.Struct, omit_defaults=True):
    time: str
    level: str
    logger: str
    message: str
    request_id: str = ""
    traceback: str = ""


class Output:
    """Lines on their way to a file descriptor, a bounded number; may be used in any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.dropped = 0
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # no thread goes along

    def _begin(self) -> None:
        self._lines: deque[bytes] = deque()
        self._writing = threading.Lock()
        self._is_wanted = threading.Event()
        self._is_last = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, line: bytes) -> None:
        """Have a line written soon; drop it if those before it do not go."""
        if len(self._lines) >= LINES_MAX:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._is_wanted.is_set():
            self._is_wanted.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="log", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Write what is there, unless somebody is writing, who is left to do it."""
        if not self._writing.acquire(blocking=False):
            self._is_wanted.set()
            return
        try:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            for data in [b"".join(lines)] if self._is_file else _pieces(lines):
                left = data
                while left:
                    left = left[os.write(self._descriptor, left) :]
        except OSError:  # there is nobody to tell
            pass
        finally:
            self._writing.release()

    def finish(self) -> None:
        """Have everything written, if that does not take long: a process must come to its end."""
        self._is_last.set()
        deadline = time.monotonic() + _FINISH_SECONDS
        while (self._lines or self._writing.locked()) and time.monotonic() < deadline:
            self._is_wanted.set()
            time.sleep(0.001)
        self._is_last.clear()

    def _write(self) -> None:
        while True:
            self._is_wanted.wait()
            self._is_last.wait(_WRITE_SECONDS)
            self._is_wanted.clear()
            self.flush()


def _pieces(lines: list[bytes]) -> list[bytes]:
    """Join lines up to the size in which a pipe takes them without mixing in another process's."""
    pieces = [b""]
    for line in lines:
        if len(pieces[-1]) + len(line) > select.PIPE_BUF:
            pieces.append(line)
        else:
            pieces[-1] += line
    return pieces


class _Handler(logging.Handler):
    """Passes records on, and has them written at once: what follows them may be the end."""

    def __init__(self, output: Output, line_of: Callable[[_Record], bytes]) -> None:
        super().__init__()
        self._output = output
        self._line_of = line_of

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            traceback = ""
            if record.exc_info:
                traceback = logging.Formatter().formatException(record.exc_info)
            facts = _Record(
                _stamp(int(record.created * 1000)),
                record.levelname.lower(),
                record.name,
                _encodable(record.getMessage()),
                request_id.get().decode(),
                _encodable(traceback),
            )
            self._output.put(self._line_of(facts))
            self._output.flush()
        except Exception:  # noqa: BLE001 - logging's own way for what a handler meets
            self.handleError(record)

    def flush(self) -> None:
        """Have everything written; `logging` calls it at the end of the process."""
        self._output.finish()


class Requests:
    """Writes a line for each request: nothing that people wrote, no query and no header.

    As JSON: time, level, logger, request_id, client, method, path, route (null for none), status
    (null where there was no answer), bytes (of the answer's body), milliseconds; waits where the
    client waited for something, as in a stream; aborted where the answer did not come to its end.
    """

    def __init__(self, output: Output, *, is_json: bool) -> None:
        self._output = output
        self._is_json = is_json

    def write(  # noqa: PLR0913, PLR0917 - a request has so many sides
        self,
        scope: Scope,
        request_id: bytes,
        route: str | None,
        status: int,
        size: int,
        seconds: float,
        waits: str | None,
        is_whole: bool,  # noqa: FBT001 - by position is fastest
    ) -> None:
        """Write the line of a request that has ended; `status` 0 if there was no answer."""
        client = scope.get("client")
        # Other servers may not give the path as it came.
        path = scope.get("raw_path") or scope["path"].encode(errors="replace")
        described = _described_as_json if self._is_json else _described
        request = described(client and client[0], scope.get("method", "GET"), path, route, status)
        now = _stamp(int(time.time() * 1000))
        # The id is sane, the rest ours: nothing is to be escaped.
        if self._is_json:
            line = (
                f'{{"time":"{now}","level":"info","logger":"chatterd.requests","request_id":'
                f'"{request_id.decode()}",{request},"bytes":{size},"milliseconds":'
                f"{seconds * 1000:.3f}"
            )
            if waits:
                line += f',"waits":"{waits}"'
            line += "}\n" if is_whole else ',"aborted":true}\n'
        else:
            line = f"{now} INFO {request}, {size} bytes, {seconds * 1000:.1f} ms"
            if waits:
                line += f", {waits}"
            line += f"{'' if is_whole else ', aborted'} [{request_id.decode()}]\n"
        self._output.put(line.encode())


# Most requests are like one that was a moment ago: what is said of them is kept.
@lru_cache(1024)
def _described_as_json(
    client: str | None, method: str, path: bytes, route: str | None, status: int
) -> str:
    facts = {
        "client": client and _shown(client.encode(errors="replace"), _WORD_MAX),
        "method": _shown(method.encode(errors="replace"), _WORD_MAX),
        "path": _shown(path, _PATH_MAX),
        "route": route,
        "status": status or None,
    }
    return msgspec.json.encode(facts).decode()[1:-1]


@lru_cache(1024)
def _described(
    client: str | None, method: str, path: bytes, _route: str | None, status: int
) -> str:
    words = (client or "unix").encode(errors="replace"), method.encode(errors="replace")
    shown = [*(_shown(word, _WORD_MAX) for word in words), _shown(path, _PATH_MAX)]
    return " ".join([*shown, str(status or "no answer")])


requests: Requests | None = None
"""Where requests are logged; None where they are not."""
_outputs: Final[list[Output]] = []


def configure(level: str, form: str) -> None:
    """Log to the standard error from now on.

    `level` and `form` are as LOG_LEVEL and LOG_FORMAT have them; `requests` is there for info.
    """
    global requests  # noqa: PLW0603 - as logging's own, it is the process's
    output = Output(sys.stderr.fileno())
    _outputs[:] = [output]
    is_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    handler = _Handler(output, _as_json if is_json else _as_text)
    logging.basicConfig(handlers=[handler], level=max(logging.INFO, _number(level)), force=True)
    # What libraries say while they are looked into would hold addresses and headers.
    logging.getLogger("chatterd").setLevel(_number(level))
    # It warns of each form that is wrong, with what stands there: the answer tells that, to whom it
    # concerns.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    is_wanted = _number(level) <= logging.INFO
    requests = Requests(output, is_json=is_json) if is_wanted else None


def take_dropped() -> int:
    """Return how many lines were dropped since the last call."""
    count = 0
    for output in _outputs:
        count, output.dropped = output.dropped, 0
    return count


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _as_json(record: _Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _as_text(record: _Record) -> bytes:
    line = f"{record.time} {record.level.upper()} {record.logger}: {record.message}"
    if record.request_id:
        line += f" [{record.request_id}]"
    lines = [line, *(f"  {line}" for line in record.traceback.split("\n") if line)]
    return "\n".join(line.translate(_CONTROLS) for line in lines).encode() + b"\n"


@lru_cache(8)  # under load, several lines have the same
def _stamp(milliseconds: int) -> str:
    """Return a time as RFC 3339 has it, in UTC."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:03d}Z"


def _shown(word: bytes, limit: int) -> str:
    """Return what a client sent, so that it is one word of visible ASCII, and not long."""
    if len(word) > limit:
        word = word[:limit] + b"..."
    text = word.decode("latin-1")
    if text.isascii() and text.isprintable() and " " not in text:
        return text
    return quote(word, safe="%/:?#[]@!$&'()*+,;=")


def _encodable(text: str) -> str:
    # A lone surrogate has no UTF-8.
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
