"""What is counted and measured, as `/metrics` tells it to Prometheus.

docs/metrics.md lists all of it. Where a supervisor runs several processes it names a folder in
PROMETHEUS_MULTIPROC_DIR, in which each keeps its numbers, and each then answers for all.
docs/decisions/0015-observability.md says why it is as it is.
"""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

# When each was begun, beside each counter: twice as many lines for what nobody asks.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # prometheus-client's

_registry: Final = CollectorRegistry()
IS_ONE_OF_SEVERAL: Final = "PROMETHEUS_MULTIPROC_DIR" in os.environ
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER: Final = "other"
_NO_ANSWER: Final = "none"


class _Histogram(prometheus_client.Histogram):
    """Takes what was counted elsewhere."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add so many observations to each bucket; `total` is their sum."""
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)


_counter: Final = partial(prometheus_client.Counter, registry=_registry)
_histogram: Final = partial(_Histogram, registry=_registry)
# Several processes' are added up, those of ended ones left out.
_gauge: Final = partial(prometheus_client.Gauge, registry=_registry, multiprocess_mode="livesum")

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_REQUESTS: Final = _counter(
    "chatterd_requests_total", "Requests that have ended.", ("route", "method", "status")
)
_REQUEST_SECONDS: Final = _histogram(
    "chatterd_request_seconds",
    "From a request's head to the end of its answer, but for those that wait for something.",
    ("route", "method"),
    buckets=_SECONDS,
)
_RESPONSE_BYTES: Final = _counter(
    "chatterd_response_bytes_total", "Bytes of the bodies of answers.", ("route", "method")
)
_IN_FLIGHT: Final = _gauge("chatterd_requests_in_flight", "Requests, streams and WebSockets open.")

BATCH_SIZE: Final = _histogram(
    "chatterd_post_batch_size",
    "Posts that one commit has stored.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
)
COMMIT_SECONDS: Final = _histogram(
    "chatterd_commit_seconds", "From sending a batch of posts to its commit.", buckets=_SECONDS
)
POSTS_WAITING: Final = _gauge("chatterd_posts_waiting", "Posts that wait for the next commit.")

FEED_CHECKS: Final = _counter(
    "chatterd_feed_checks_total", "Times that the database was asked whether the feed has changed."
)
_FEED_ANSWERS: Final = _counter(
    "chatterd_feed_answers_total", "Answers to requests for the feed, by where it was.", ("source",)
)
FEED_BYTES: Final = _gauge("chatterd_feed_memory_bytes", "Bytes of the feed kept in memory.")

SUBSCRIBERS: Final = _gauge(
    "chatterd_subscribers", "Streams, WebSockets and waiting requests that follow the log."
)
_EVENTS_READ: Final = _counter("chatterd_events_read_total", "Events read for the subscribers.")
_EVENTS_DELIVERED: Final = _counter(
    "chatterd_events_delivered_total", "Events handed to subscribers, each counted for each."
)

POOL_SIZE: Final = _gauge("chatterd_pool_size", "Connections that may be open to the database.")
POOL_IN_USE: Final = _gauge("chatterd_pool_in_use", "Connections to the database in use.")
POOL_WAITING: Final = _gauge("chatterd_pool_waiting", "Users that wait for a connection.")
DATABASE_UP: Final = _gauge(
    "chatterd_database_up",
    "1 when the database has answered last, 0 when it is away; of several processes the least.",
    multiprocess_mode="livemin",
)
SLOW_STATEMENTS: Final = _counter(
    "chatterd_slow_statements_total", "Statements that took longer than SLOW_QUERY_MILLISECONDS."
)

UPLOADS_IN_FLIGHT: Final = _gauge("chatterd_uploads_in_flight", "Forms that are arriving.")
_UPLOAD_BYTES: Final = _counter("chatterd_upload_bytes_total", "Bytes of files that have arrived.")
UPLOAD_FILES: Final = _counter("chatterd_upload_files_total", "Files that were kept.", ("kind",))
for _kind in ("image", "video"):
    UPLOAD_FILES.labels(_kind)
UPLOADS_REFUSED: Final = _counter(
    "chatterd_uploads_refused_total", "Forms that were refused, by the error's code.", ("code",)
)

SWEPT_STATES: Final = ("orphaned", "temporary", "restored")
SWEPT_FILES: Final = _counter(
    "chatterd_swept_files_total", "Files that sweeps have removed or put back.", ("state",)
)
SWEPT_BYTES: Final = _counter("chatterd_swept_bytes_total", "Bytes of those files.", ("state",))
for _state in SWEPT_STATES:
    SWEPT_FILES.labels(_state)
    SWEPT_BYTES.labels(_state)
SWEPT_RECORDS: Final = _counter(
    "chatterd_swept_records_total", "Rows of the table media that sweeps have removed."
)
UNKNOWN_FILES: Final = _gauge(
    "chatterd_unknown_files",
    "Files of others in the media folder, as the last sweep has seen.",
    multiprocess_mode="mostrecent",
)
UNKNOWN_BYTES: Final = _gauge(
    "chatterd_unknown_bytes", "Bytes of those files.", multiprocess_mode="mostrecent"
)
LAST_SWEEP: Final = _gauge(
    "chatterd_last_sweep_timestamp_seconds",
    "When a sweep came to its end last; 0 when none did since the start.",
    multiprocess_mode="max",
)

LOG_LINES_DROPPED: Final = _counter(
    "chatterd_log_lines_dropped_total", "Lines that the log did not take fast enough."
)
MEMORY: Final = _gauge("chatterd_resident_memory_bytes", "Resident memory.")
CPU: Final = _counter("chatterd_cpu_seconds_total", "Processor time, of all threads.")
DESCRIPTORS: Final = _gauge("chatterd_open_descriptors", "Open files and connections.")
PROCESSES: Final = _gauge("chatterd_processes", "Processes that serve.")
START_TIME: Final = _gauge(
    "chatterd_start_time_seconds",
    "When the process was started; of several the first.",
    multiprocess_mode="livemin",
)
BUILD_INFO: Final = _gauge(
    "chatterd_build_info", "Always 1.", ("version", "python"), multiprocess_mode="livemax"
)


class Tally:
    """A counter for what happens with every request: `count` grows in plain Python.

    prometheus-client would take 0.6 µs each time, and 2 µs beside other processes.
    """

    __slots__ = ("_counter", "count")

    def __init__(self, counter: prometheus_client.Counter) -> None:
        self._counter = counter
        self.count = 0
        _handed_over.append(self)

    def hand_over(self) -> None:
        """Let prometheus-client have it."""
        if self.count:
            self._counter.inc(self.count)
            self.count = 0


class Level:
    """A gauge for what happens with every request."""

    __slots__ = ("_gauge", "value")

    def __init__(self, gauge: prometheus_client.Gauge) -> None:
        self._gauge = gauge
        self.value = 0
        _handed_over.append(self)

    def hand_over(self) -> None:
        """Let prometheus-client have it."""
        self._gauge.set(self.value)


class Timing:
    """A histogram of seconds for what happens with every request."""

    __slots__ = ("_counts", "_histogram", "_total")

    def __init__(self, histogram: _Histogram) -> None:
        self._histogram = histogram
        self._counts = [0] * (len(_SECONDS) + 1)
        self._total = 0.0
        _handed_over.append(self)

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._total += seconds

    def hand_over(self) -> None:
        """Let prometheus-client have it."""
        if self._total:
            self._histogram.add(self._counts, self._total)
            self._counts = [0] * len(self._counts)
            self._total = 0.0


_handed_over: Final[list[Tally | Level | Timing]] = []

IN_FLIGHT: Final = Level(_IN_FLIGHT)
FEED_FROM_MEMORY: Final = Tally(_FEED_ANSWERS.labels("memory"))
FEED_FROM_DATABASE: Final = Tally(_FEED_ANSWERS.labels("database"))
FEED_WITH_CLIENT: Final = Tally(_FEED_ANSWERS.labels("client"))
EVENTS_READ: Final = Tally(_EVENTS_READ)
EVENTS_DELIVERED: Final = Tally(_EVENTS_DELIVERED)
UPLOAD_BYTES: Final = Tally(_UPLOAD_BYTES)


class Requests:
    """Counts the requests of one route, method and status as they end."""

    __slots__ = ("_bytes", "_requests", "_timing", "method", "route")

    def __init__(self, route: str | None, method: str, status: int) -> None:
        self.route = route
        self.method = method
        labels = (route or _OTHER, method)
        self._requests = Tally(_REQUESTS.labels(*labels, status or _NO_ANSWER))
        self._bytes = _bytes_of(*labels)
        self._timing: Timing | None = None

    def ended(self, size: int, seconds: float | None) -> None:
        """Count one more; the answer's body had `size` bytes. No `seconds`: they tell nothing."""
        self._requests.count += 1
        self._bytes.count += size
        if seconds is not None:
            if self._timing is None:
                self._timing = _timing_of(self.route or _OTHER, self.method)
            self._timing.observe(seconds)


class RequestTable:
    """What counts requests, by their endpoints; `templates` has the routes of those."""

    def __init__(self, templates: Mapping[object, str]) -> None:
        self._templates = templates
        self._found: dict[tuple[object, str, int], Requests] = {}

    def find(self, endpoint: object, method: str, status: int) -> Requests:
        """Return what counts such requests; endpoint None for no route, status 0 for no answer."""
        # A client may send any word for a method: it is no key and no label.
        key = (endpoint, method if method in _METHODS else _OTHER, status)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _requests_of(self._templates.get(endpoint), *key[1:])
        return found


@cache
def _requests_of(route: str | None, method: str, status: int) -> Requests:
    return Requests(route, method, status)


@cache
def _bytes_of(route: str, method: str) -> Tally:
    return Tally(_RESPONSE_BYTES.labels(route, method))


@cache
def _timing_of(route: str, method: str) -> Timing:
    return Timing(_REQUEST_SECONDS.labels(route, method))


def hand_over() -> None:
    """Let prometheus-client have what was counted in plain Python."""
    for each in _handed_over:
        each.hand_over()


def exposition(accept: str) -> tuple[bytes, str]:
    """Return everything as text, and its media type, for an Accept header. May take long."""
    registry = _registry
    if IS_ONE_OF_SEVERAL:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # prometheus-client's
    try:
        encode, media_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number
        encode, media_type = choose_encoder("")
    return encode(registry), media_type
