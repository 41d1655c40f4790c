"""What an uploaded picture is like: its size and a thumbnail, decoded where it can do no harm."""

import asyncio
import logging
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeVar

from anyio import BrokenWorkerProcess, CapacityLimiter, to_process

from chatterd.errors import Problem

logger = logging.getLogger(__name__)

_QUEUE_LIMIT: Final = 64
_START_SECONDS: Final = 30.0
_PROCESSOR_SECONDS: Final = 20.0
# Before proxies give up, for 75 seconds are what they have (deploy/nginx).
_DEADLINE_SECONDS: Final = 60.0
# Address space of the worker. Before it decodes it has 130 MB; a pixel takes 17 bytes in a WebP,
# which is the hungriest, and fewer than 10 in the other formats.
_BASE_BYTES: Final = 384 * 2**20
_PIXEL_BYTES: Final = 20


T = TypeVar("T")


class Size(NamedTuple):
    """A picture's size in pixels, right way up."""

    width: int
    height: int


class PictureReader:
    """Decodes pictures, one at a time, in a worker process that may die of them.

    `max_pixels` is the most that a picture may have, `processor_seconds` the most of a processor's
    time that decoding it may take. Where others have the processors, it is given up for the moment
    after `deadline_seconds`. The worker is started for the first picture, and anew after it has
    died; it ends with the event loop.

    The worker bounds memory and time. It is no sandbox: who takes it over has the server's rights.
    """

    def __init__(
        self,
        max_pixels: int,
        processor_seconds: float = _PROCESSOR_SECONDS,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> None:
        self._max_pixels = max_pixels
        self._processor_seconds = processor_seconds
        self._deadline_seconds = deadline_seconds
        # One picture at a time: the memory for one is bounded and that for several would be a
        # multiple, and a second processor is better left to the server and the database.
        self._turn = CapacityLimiter(1)
        self._worker = CapacityLimiter(1)
        self._starting: asyncio.Task[None] | None = None

    async def measure(self, path: Path) -> Size:
        """Return the size of the picture in the file at `path`, of which no pixel is decoded.

        Cancelling ends the work on it. Raises `Problem` 413 when it has too many pixels, 415 when
        it cannot be decoded within the worker's limits, 503 when too many pictures are waiting or
        the worker does not get a processor; `OSError` when there is no file, `BrokenWorkerProcess`
        when there can be no worker.
        """
        return await self._ask(_measured, path)

    async def thumbnail(self, path: Path) -> bytes:
        """Return its thumbnail, a WebP of at most 512 pixels on a side; as `measure` does."""
        return await self._ask(_reduced, path)

    async def _ask(self, question: "_Question[T]", path: Path) -> T:
        if self._turn.statistics().tasks_waiting >= _QUEUE_LIMIT:
            raise _too_many()
        async with self._turn:
            outcome = await self._try(question, path)
            if outcome is None:  # that may have been an accident: what comes first out of memory
                outcome = await self._try(question, path) or _UNDECODABLE
        if isinstance(outcome, _Refusal):
            raise outcome.problem()
        return outcome

    async def _try(self, question: "_Question[T]", path: Path) -> "T | _Refusal | None":
        """Ask a worker that runs; None when it died."""
        # anyio forgets a worker, without ending it, when it is cancelled while this starts.
        self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        return await self._decode(question, path)

    async def _start(self) -> None:
        """Start the worker unless it runs, and have it set its limits."""
        try:
            await self._limit()
        except BrokenWorkerProcess:  # it was killed while it had nothing to do
            await self._limit()

    async def _limit(self) -> None:
        memory = _BASE_BYTES + _PIXEL_BYTES * self._max_pixels
        try:
            async with asyncio.timeout(_START_SECONDS):  # more than anyio takes to give up a start
                await to_process.run_sync(_limit, memory, cancellable=True, limiter=self._worker)
        except TimeoutError:
            raise _no_processor() from None

    async def _decode(self, question: "_Question[T]", path: Path) -> "T | _Refusal | None":
        """Let the worker look at the picture; None when it died, but for its limit of time."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline_seconds):
                return await to_process.run_sync(
                    question,
                    path,
                    _Limits(self._max_pixels, self._processor_seconds, self._deadline_seconds),
                    cancellable=True,
                    limiter=self._worker,
                )
        except TimeoutError:  # the worker has been killed
            raise _no_processor() from None
        except BrokenWorkerProcess:
            # Before, it cannot have used up its time.
            if time.monotonic() - begun < self._processor_seconds:
                logger.warning("The process that decodes pictures died at one")
                return None
            logger.warning("A picture took more than %g s to decode", self._processor_seconds)
            return _UNDECODABLE


def _no_processor() -> Problem:
    logger.warning("The process that decodes pictures did not get a processor in time")
    return _too_many()


def _too_many() -> Problem:
    return Problem(
        "too-many-uploads",
        "Too many pictures at the moment; try again in a moment.",
        {"Retry-After": "1"},
    )


class _Refusal(NamedTuple):
    """A `Problem` as the worker sends it: exceptions of our own cannot be pickled."""

    code: str
    detail: str

    def problem(self) -> Problem:
        return Problem(self.code, self.detail)


_UNDECODABLE: Final = _Refusal(
    "image-undecodable", "image cannot be decoded; it is damaged, or asks too much of a decoder."
)


class _Limits(NamedTuple):
    """Those of one picture, as `PictureReader` has them."""

    pixels: int
    processor_seconds: float
    deadline_seconds: float


_Question: TypeAlias = Callable[[Path, _Limits], T | _Refusal]


# What follows runs in the worker. Its questions raise `OSError` when there is no file.


def _limit(memory: int) -> None:
    """Bound the worker's address space to so many bytes. May be called again."""
    # The server's signals reach its whole process group, and a request under way may finish.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    # Nobody reads what a decoder may complain about; anyio's pipe would fill up with it.
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError):  # there is a lower limit already, or macOS, which knows none
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # When memory runs out all the same, Linux is to kill the worker rather than the server.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _measured(path: Path, limits: _Limits) -> Size | _Refusal:
    from chatterd import thumbnails  # noqa: PLC0415 - brings Pillow, which is the worker's alone

    with _life_of(limits), path.open("rb") as file:
        return _looked_at(lambda: Size(*thumbnails.measured(file, limits.pixels)), limits.pixels)


def _reduced(path: Path, limits: _Limits) -> bytes | _Refusal:
    from chatterd import thumbnails  # noqa: PLC0415 - brings Pillow, which is the worker's alone

    with (
        _life_of(limits),
        path.open("rb") as file,
        # Of its own, since a thread that has stepped back cannot come forward again: sizes are
        # waited for.
        ThreadPoolExecutor(1, initializer=_step_back) as thread,
    ):
        look = partial(thumbnails.reduced, file, limits.pixels)
        return thread.submit(_looked_at, look, limits.pixels).result()


def _step_back() -> None:
    """Let the server and what else runs go first."""
    with suppress(OSError):  # only on Linux has a thread a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


@contextmanager
def _life_of(limits: _Limits) -> Iterator[None]:
    """Have the kernel end the worker when it has used up its time of a processor.

    Also a moment after the deadline, which is the server's to keep, for the server may be killed.
    """
    signal.setitimer(signal.ITIMER_PROF, limits.processor_seconds)
    signal.alarm(math.ceil(limits.deadline_seconds) + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _looked_at(look: Callable[[], T], max_pixels: int) -> T | _Refusal:
    from chatterd.thumbnails import TooManyPixels  # noqa: PLC0415 - as above

    try:
        return look()
    except TooManyPixels as error:
        return _Refusal(
            "image-too-many-pixels",
            f"image has {error.pixels} pixels, more than the limit of {max_pixels}.",
        )
    except MemoryError:
        # Not a state to go on from: a leak would have the worker refuse every picture.
        os._exit(1)
    except Exception:  # noqa: BLE001 - decoders raise whatever a broken file makes them meet
        return _UNDECODABLE
