"""The server processes under load, each on a port of its own."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import psutil
from sqlalchemy.engine import URL

from bench import data
from chatterd.nginx import Site, whole

_ROOT: Final = Path(__file__).parent.parent
_START_SECONDS: Final = 30
_STOP_SECONDS: Final = 10
_SETTLE_SECONDS: Final = 10
_ANSWER_SECONDS: Final = 300
_NGINX: Final = "/usr/sbin/nginx"
# What else an Nginx needs, at places of the bench's own.
_NGINX_MAIN: Final = """\
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


class Answer(NamedTuple):
    """An answer; the names of its headers are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Program:
    """A running server; `media` is the folder for what is uploaded to it."""

    def __init__(self, name: str, port: int, process: psutil.Process, media: Path) -> None:
        self.name = name
        self.port = port
        self.media = media
        self._process = process

    def request(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Return the whole answer to one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request(method, path, body, headers=dict(headers or {}))
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def download(self, path: str) -> int:
        """Return the length in bytes of the answer, without keeping it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return sum(len(part) for part in iter(lambda: answer.read(1 << 20), b""))
        finally:
            connection.close()

    def resident_bytes(self) -> int:
        """Return the resident memory of the program's processes together."""
        return sum(process.memory_info().rss for process in self._processes())

    def server_bytes(self) -> int:
        """Return the resident memory of the server's own process, without its children."""
        rss: int = self._process.memory_info().rss
        return rss

    def cpu_seconds(self) -> float:
        """Return the processor time that the program's processes have taken so far."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(spent.user + spent.system for spent in times)

    def settle(self) -> None:
        """Wait until the program is at rest: until it has done what the load left behind."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        before = -1.0
        while (now := self.cpu_seconds()) != before and time.monotonic() < deadline:
            before = now
            time.sleep(0.03)

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


@contextmanager
def chatterd(folder: Path, url: URL, **settings: str) -> Iterator[Program]:
    """Run chatterd with its default settings, except the named ones."""
    port = _free_port()
    command = ["chatterd", "serve", "--port", str(port)]
    with _running(
        "chatterd", port, command, folder, {"DATABASE_URL": data.dsn(url)} | settings
    ) as program:
        yield program


@contextmanager
def nginx(folder: Path, behind: Program) -> Iterator[Program]:
    """Run Nginx with the configuration that `chatterd nginx` prints, in front of `behind`."""
    if not Path(_NGINX).exists():
        raise RuntimeError("nginx is missing. On Debian and Ubuntu: sudo apt-get install nginx")
    port = _free_port()
    place = folder / "nginx"
    place.mkdir(exist_ok=True)
    site = Site(("127.0.0.1",), (f"127.0.0.1:{behind.port}",), behind.media, http_port=port)
    user = "user root;" if os.geteuid() == 0 else ""
    (place / "nginx.conf").write_text(_NGINX_MAIN.format(folder=place, user=user))
    (place / "site.conf").write_text(whole(site))
    process = psutil.Popen(
        [_NGINX, "-p", str(place), "-c", str(place / "nginx.conf")],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # as below
    )
    try:
        program = Program("nginx", port, process, behind.media)
        _wait_until_it_answers(program, process, place / "error.log")
        yield program
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


@contextmanager
def tutorial(folder: Path, url: URL) -> Iterator[Program]:
    """Run the tutorial's program on Granian, with one worker and without its access log."""
    port = _free_port()
    command = ["granian", "--interface", "asgi", "--workers", "1", "--port", str(port)]
    command += ["--log-level", "warning", "bench.peers.tutorial:app"]
    settings = {"TUTORIAL_CONNINFO": data.dsn(url)}
    with _running("tutorial", port, command, folder, settings) as program:
        yield program


@contextmanager
def ceiling(folder: Path, feed: bytes) -> Iterator[Program]:
    """Run the ceiling with `feed` as its constant answer."""
    port = _free_port()
    file = folder / "feed.json"
    file.write_bytes(feed)
    command = ["bench.peers.ceiling", str(port), str(file)]
    with _running("ceiling", port, command, folder, {}) as program:
        yield program


@contextmanager
def _running(
    name: str, port: int, module: Sequence[str], folder: Path, settings: Mapping[str, str]
) -> Iterator[Program]:
    """Run `python -m module` in `folder`, whose .env it must not find, while the context lasts."""
    log = folder / f"{name}.log"
    media = folder / "media" / name
    media.mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(_ROOT),
        "MEDIA_ROOT": str(media),
    }
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *module],
            cwd=folder,
            env=environment | dict(settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # A terminal's Ctrl-C is for the bench, which then stops its servers.
            start_new_session=True,
        )
    try:
        program = Program(name, port, process, media)
        _wait_until_it_answers(program, process, log)
        yield program
    finally:
        process.terminate()
        with suppress(psutil.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(program: Program, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException):
            program.request("/")  # 404, but an answer
            return
        time.sleep(0.05)
    raise RuntimeError(f"{program.name} did not start: {log.read_text()}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
