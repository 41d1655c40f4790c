"""The load: wrk, driven by `load.lua`."""

import itertools
import json
import re
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.pictures import FORM_TYPE

_SCRIPT: Final = Path(__file__).with_name("load.lua")
_TIMEOUT_SECONDS: Final = 60
# No run sends as many pictures, so that each picture is sent once.
_first_pictures: Final = itertools.count(1_000, 100_000)
_runs: Final = itertools.count()


@dataclass(frozen=True)
class Load:
    """What one run of wrk sends: GET `path` again and again, or posts instead of some of them.

    With `keys`, all are posts, each with an Idempotency-Key of its own. Or uploads to `path`: each
    time another picture in the form that lies in the folder `form`.
    """

    connections: int
    path: str = "/getchatts"
    headers: Mapping[str, str] = field(default_factory=dict)
    posts_of_ten: int = 0
    keys: bool = False
    form: Path | None = None


@dataclass(frozen=True)
class Run:
    """What wrk saw. Latencies are milliseconds; errors are counted by their kind."""

    seconds: float
    requests: int
    requests_per_second: float
    bytes_per_second: float
    latency_p50: float
    latency_p99: float
    errors: Mapping[str, int]


def run(load: Load, port: int, seconds: int, bodies: Path) -> Run:
    """Put `load` on the server at `port`; `bodies` holds a post's JSON in each line."""
    more: tuple[str, ...] = ()
    if load.form:
        more = (str(load.form), FORM_TYPE["Content-Type"], str(next(_first_pictures)))
    elif load.keys:
        more = (f"run-{next(_runs)}-",)
    done = subprocess.run(
        [
            _wrk(),
            *("--threads", "1"),
            *("--connections", str(load.connections)),
            *("--duration", f"{seconds}s"),
            *("--timeout", f"{_TIMEOUT_SECONDS}s"),
            *("--script", str(_SCRIPT)),
            *(word for name in load.headers for word in ("-H", f"{name}: {load.headers[name]}")),
            f"http://127.0.0.1:{port}{load.path}",
            *("--", str(load.posts_of_ten), str(bodies), *more),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}".strip())
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    duration = summary["duration"] / 1e6
    return Run(
        seconds=duration,
        requests=summary["requests"],
        requests_per_second=summary["requests"] / duration,
        bytes_per_second=summary["bytes"] / duration,
        latency_p50=summary["p50"] / 1e3,
        latency_p99=summary["p99"] / 1e3,
        errors={kind: count for kind, count in summary["errors"].items() if count},
    )


def together(runs: Sequence[Run]) -> Run:
    """Return several runs as one: of the latencies, the median half and the worst end."""
    seconds = sum(run.seconds for run in runs)
    errors: Counter[str] = Counter()
    for run in runs:
        errors.update(run.errors)
    return Run(
        seconds=seconds,
        requests=sum(run.requests for run in runs),
        requests_per_second=sum(run.requests for run in runs) / seconds,
        bytes_per_second=sum(run.bytes_per_second * run.seconds for run in runs) / seconds,
        latency_p50=statistics.median(run.latency_p50 for run in runs),
        latency_p99=max(run.latency_p99 for run in runs),
        errors=errors,
    )


def wrk_version() -> str:
    """Return the version of wrk; exits where there is none."""
    said = subprocess.run([_wrk(), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"wrk (?:debian/)?(\d[\w.]*)", said.stdout)
    return found[1] if found else "unknown"


def _wrk() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise SystemExit(
            "bench: the load generator wrk is missing. On Debian and Ubuntu:"
            " sudo apt-get install wrk"
        )
    return path
