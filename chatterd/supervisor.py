"""Several processes that serve: started, watched, replaced one by one, and stopped together.

The supervisor holds the listening socket and hands it down; it never looks at a request. Its
workers are `chatterd serve` themselves, executed anew, so that they load the code that is there.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from prometheus_client import multiprocess

from chatterd import settings
from chatterd.listener import Listener
from chatterd.notify import notify, watchdog_seconds

logger = logging.getLogger(__name__)

# A worker that says nothing for so long is killed; where systemd watches us, for as long as it has.
_WATCHDOG_SECONDS: Final = 30.0
_START_SECONDS: Final = 90.0
# What a worker needs to stop beside SHUTDOWN_TIMEOUT, and when it is to stop at once.
_STOP_SECONDS: Final = 5.0
# How long to wait before a worker that ended soon is replaced: twice as long each time.
_PAUSE_SECONDS: Final = (0.1, 5.0)
_SOON_SECONDS: Final = 10.0


def run(
    listener: Listener, count: int, variables: Mapping[str, str], on_ready: Callable[[], None]
) -> None:
    """Keep `count` workers on `listener` until SIGINT or SIGTERM; SIGHUP replaces them.

    `variables` are added to their environment; `on_ready` is called when all of them answer. Exits
    with the status of the first when that cannot start.
    """
    with tempfile.TemporaryDirectory(prefix="chatterd-", ignore_cleanup_errors=True) as folder:
        supervisor = _Supervisor(listener, count, variables, Path(folder))
        status = asyncio.run(supervisor.run(on_ready))
    if status:
        sys.exit(status)


class _StartFailed(Exception):  # noqa: N818 - what has happened to a worker
    """A worker ended before it was ready."""

    def __init__(self, status: int) -> None:
        super().__init__(f"A worker ended before it was ready, {_described(status)}")
        self.status = status


class _Worker:
    """A process that serves, from its start to its end."""

    def __init__(self, process: Process, signs: socket.socket) -> None:
        self.pid = process.pid
        self.ready = asyncio.Event()
        self.started = self._heard = time.monotonic()
        self._process = process
        self._signs = signs
        self._is_stopping = False
        asyncio.get_running_loop().add_reader(signs, self._hear)
        self.ended = asyncio.create_task(self._watch())

    def signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signum)

    async def stop(self) -> None:
        """Have it finish what is under way and end; it is killed when it takes too long."""
        if not self._is_stopping:  # a second one would be understood as: at once
            self._is_stopping = True
            self.signal(signal.SIGTERM)
        await asyncio.wait({self.ended}, timeout=settings.SHUTDOWN_TIMEOUT + _STOP_SECONDS)
        self.signal(signal.SIGKILL)
        await asyncio.wait({self.ended})

    def _hear(self) -> None:
        """Take what it says by sd_notify: each is a sign of life."""
        self._heard = time.monotonic()
        if b"READY=1" in self._signs.recv(4096).split(b"\n"):
            self.ready.set()

    async def _watch(self) -> int:
        """Return its exit status; kill it when it is silent for too long."""
        end = asyncio.create_task(self._process.wait())
        watchdog = watchdog_seconds() or _WATCHDOG_SECONDS
        while not end.done():
            patience = watchdog if self.ready.is_set() else _START_SECONDS
            left = self._heard + patience - time.monotonic()
            if left <= 0:
                logger.error("Worker %d was silent for %g s, and is killed", self.pid, patience)
                self.signal(signal.SIGKILL)
                await asyncio.wait({end})
            else:
                await asyncio.wait({end}, timeout=min(left, watchdog))
        asyncio.get_running_loop().remove_reader(self._signs)
        self._signs.close()
        return end.result()


class _Supervisor:
    def __init__(
        self, listener: Listener, count: int, variables: Mapping[str, str], folder: Path
    ) -> None:
        self._listener = listener
        self._count = count
        self._folder = folder
        self._environment = {
            **os.environ,
            **variables,
            "PROMETHEUS_MULTIPROC_DIR": str(folder),
            "WATCHDOG_USEC": str(int((watchdog_seconds() or _WATCHDOG_SECONDS) * 1_000_000)),
        }
        self._environment.pop("WATCHDOG_PID", None)  # systemd's, which is ours
        self._running: set[_Worker] = set()
        self._places: list[_Worker] = []
        self._locks = [asyncio.Lock() for _ in range(count)]
        self._started = 0
        self._asked = asyncio.Event()
        self._hurried_by = 0
        self._hurried = asyncio.Event()
        self._renewal = asyncio.Event()

    async def run(self, on_ready: Callable[[], None]) -> int:
        """Return the exit status."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._take, signum)
        loop.add_signal_handler(signal.SIGHUP, self._renewal.set)
        serving = asyncio.create_task(self._serve(on_ready))
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        asked.cancel()
        await self._stop()
        try:
            await serving
        except _StartFailed as error:
            return error.status if error.status > 0 else 128 - error.status
        except asyncio.CancelledError:
            pass
        return 128 + self._hurried_by if self._hurried_by else 0

    def _take(self, signum: int) -> None:
        if self._asked.is_set():
            self._hurried_by = signum
            self._hurried.set()
        self._asked.set()

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        # What is wrong with all of them is said once, by the first.
        first = await self._start()
        others = (self._start_patiently() for _ in range(1, self._count))
        self._places = [first, *await asyncio.gather(*others)]
        on_ready()
        notify("READY=1")
        self._ping()
        keeping = [self._keep(place) for place in range(self._count)]
        await asyncio.gather(*keeping, self._renew_when_asked())

    async def _start(self) -> _Worker:
        """Start a worker and wait until it answers; raises `_StartFailed`."""
        self._started += 1
        address = self._folder / f"{self._started}.sock"
        signs = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        signs.bind(str(address))
        signs.setblocking(False)
        descriptor = self._listener.socket.fileno()
        command = [sys.executable, "-m", "chatterd", "serve", "--fd", str(descriptor)]
        if self._listener.address.certfile:
            command += ["--certfile", str(self._listener.address.certfile)]
            command += ["--keyfile", str(self._listener.address.keyfile)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE,  # it ends when we do: nobody else holds the other end
            env=self._environment | {"NOTIFY_SOCKET": str(address)},
            pass_fds=[descriptor],
            start_new_session=True,  # a terminal's Ctrl-C is for us alone
        )
        worker = _Worker(process, signs)
        self._running.add(worker)
        worker.ended.add_done_callback(lambda _: self._forget(worker, address))
        await _first(worker.ready.wait(), asyncio.wait({worker.ended}))
        if worker.ended.done():
            raise _StartFailed(worker.ended.result())
        return worker

    def _forget(self, worker: _Worker, address: Path) -> None:
        self._running.discard(worker)
        address.unlink(missing_ok=True)
        # Its gauges are no more; what it counted stays.
        multiprocess.mark_process_dead(worker.pid, str(self._folder))  # type: ignore[no-untyped-call] # theirs

    async def _start_patiently(self) -> _Worker:
        pause, longest = _PAUSE_SECONDS
        while True:
            try:
                return await self._start()
            except _StartFailed as error:
                logger.error("%s", error)  # noqa: TRY400 - its traceback says nothing
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _keep(self, place: int) -> None:
        """Replace the worker in a place whenever it ends."""
        pause, longest = _PAUSE_SECONDS
        while True:
            worker = self._places[place]
            await asyncio.wait({worker.ended})
            status = worker.ended.result()
            async with self._locks[place]:
                if self._places[place] is not worker:
                    continue  # it was replaced, and then told to end
                logger.error(
                    "Worker %d ended, %s; another takes its place", worker.pid, _described(status)
                )
                if time.monotonic() - worker.started < _SOON_SECONDS:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
                else:
                    pause = _PAUSE_SECONDS[0]
                self._places[place] = await self._start_patiently()

    async def _renew_when_asked(self) -> None:
        while True:
            await self._renewal.wait()
            self._renewal.clear()
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                for place in range(self._count):
                    await self._renew(place)
                logger.info("All workers are new")
            except _StartFailed as error:
                logger.error("%s; those before it stay", error)  # noqa: TRY400 - its traceback says nothing
            notify("READY=1")

    async def _renew(self, place: int) -> None:
        """Put a new worker into a place; raises `_StartFailed`, and leaves the old one there."""
        async with self._locks[place]:
            new = await self._start()
            old, self._places[place] = self._places[place], new
        await old.stop()

    def _ping(self) -> None:
        """Tell systemd from time to time that we are well: that there is somebody who answers."""
        if seconds := watchdog_seconds():
            if any(worker in self._running for worker in self._places):
                notify("WATCHDOG=1")
            asyncio.get_running_loop().call_later(seconds / 2, self._ping)

    async def _stop(self) -> None:
        """Have all workers finish what is under way and end; a second signal ends them at once."""
        notify("STOPPING=1")
        self._listener.close()
        stopping = [asyncio.create_task(worker.stop()) for worker in self._running]
        everyone = asyncio.gather(*stopping)
        await _first(asyncio.wait({everyone}), self._hurried.wait())
        if not everyone.done():
            for worker in self._running:
                worker.signal(signal.SIGTERM)
            await asyncio.wait({everyone}, timeout=_STOP_SECONDS)
        for worker in self._running:
            worker.signal(signal.SIGKILL)
        await everyone


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them ends."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _described(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with status {status}"
