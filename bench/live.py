"""What is measured with those who follow what happens."""

import http.client
import json
import statistics
import time
from typing import Final, NamedTuple

from bench.programs import Program
from bench.scenarios import Outcome
from bench.subscribers import Found, subscribed

SUBSCRIBERS: Final = 1_000
BESIDE: Final = 100
_POSTS_PER_SECOND: Final = 5
_KIB: Final = 1 << 10
_MIB: Final = 1 << 20
_ANSWER_SECONDS: Final = 30
# A chatt as people write, behind its number.
_TEXT: Final = "about as long as most of what people have to say when they meet"


def memory(outcome: Outcome, chatterd: Program) -> None:
    """Compare a server that has just started with itself while many follow and nothing happens."""
    before = chatterd.server_bytes()
    with subscribed(chatterd.port, SUBSCRIBERS) as found:
        chatterd.settle()
        grown = chatterd.server_bytes() - before
        _post(chatterd, 10)
        chatterd.settle()
        later = chatterd.server_bytes() - before
    each = grown / SUBSCRIBERS / _KIB
    outcome.unit = "KiB"
    outcome.figures["chatterd"] = each
    outcome.stay_within("allowed", 64, each)
    outcome.note = (
        f"{SUBSCRIBERS} streams: {before / _MIB:.1f} + {grown / _MIB:.1f} MiB,"
        f" after 10 posts + {later / _MIB:.1f} MiB"
    )
    if found.ended:
        outcome.fault = "invalid"
        outcome.note += f"; {found.ended} streams ended"


class _Post(NamedTuple):
    """When a post was sent and answered, by the monotonic clock."""

    sent: float
    answered: float


class Delivery:
    """How long it takes from a commit until every subscriber has the chatt."""

    def __init__(self, chatterd: Program) -> None:
        self._chatterd = chatterd
        self._rounds: list[dict[str, object]] = []
        self._p50: list[float] = []
        self._p99: list[float] = []
        self._faults: list[str] = []

    def round(self, posts: int) -> None:
        """Post so many chatts to all subscribers."""
        self._chatterd.settle()
        with subscribed(self._chatterd.port, SUBSCRIBERS, times=True) as found:
            posted = _post(self._chatterd, posts)
            self._chatterd.settle()
        delays, whole, sent = [], [], []
        for number, post in enumerate(posted):
            arrivals = found.arrivals.get(number, [])
            # It was committed before it was answered, and before anybody had it.
            committed = min(post.answered, *arrivals) if arrivals else post.answered
            delays += [1e3 * (arrival - committed) for arrival in arrivals]
            sent += [1e3 * (arrival - post.sent) for arrival in arrivals]
            whole.append(len(arrivals))
        self._check(found, whole)
        if delays:
            p50, p99 = _percentile(delays, 50), _percentile(delays, 99)
            self._p50.append(p50)
            self._p99.append(p99)
            from_request = {"p50": _percentile(sent, 50), "p99": _percentile(sent, 99)}
            details = {"p50": p50, "p99": p99, "max": max(delays), "from_request": from_request}
            self._rounds.append(details | {"deliveries": sum(whole)})

    def _check(self, found: Found, whole: list[int]) -> None:
        missing = sum(SUBSCRIBERS - count for count in whole)
        for count, what in (
            (missing, "deliveries missing"),
            (found.strays, "out of order"),
            (found.ended, "streams ended"),
        ):
            if count:
                self._faults.append(f"{count} {what}")

    def note(self, outcome: Outcome) -> None:
        """Note the medians of the rounds."""
        outcome.runs = {"chatterd": self._rounds}
        outcome.unit = "ms"
        if self._faults or not self._p50:
            outcome.fault = "invalid"
            outcome.note = ", ".join(self._faults)
            return
        outcome.figures["chatterd"] = statistics.median(self._p50)
        outcome.stay_within("allowed", 20, outcome.figures["chatterd"])
        p99 = statistics.median(self._p99)
        outcome.stay_within("allowed for the 99th percentile", 150, p99)
        outcome.note = f"99th percentile {p99:.1f} ms; all deliveries came, in order"


def check_keys(chatterd: Program) -> None:
    """Raise `RuntimeError` unless a post with a key is stored once, however often it is sent."""
    for replayed in (False, True):
        headers = {"Idempotency-Key": "bench"}
        body = json.dumps({"name": "ann", "message": _TEXT}).encode()
        answer = chatterd.request("/postchatt", "POST", headers, body)
        if answer.status != 200 or ("idempotency-replayed" in answer.headers) != replayed:
            raise RuntimeError(f"a post with a key is answered {answer.status}")


def _post(program: Program, count: int) -> list[_Post]:
    """Post chatts with their numbers at a steady pace; raises `RuntimeError` if one is refused."""
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=_ANSWER_SECONDS)
    connection.connect()
    begun = time.monotonic()
    posted = []
    for number in range(count):
        time.sleep(max(0.0, begun + number / _POSTS_PER_SECOND - time.monotonic()))
        body = json.dumps({"name": "ann", "message": f"POST {number} {_TEXT}"})
        sent = time.monotonic()
        connection.request("POST", "/postchatt", body)
        answer = connection.getresponse()
        answered = time.monotonic()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"a post was answered {answer.status}")
        posted.append(_Post(sent, answered))
    connection.close()
    return posted


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
