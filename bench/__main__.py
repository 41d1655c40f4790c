"""Measure chatterd beside the tutorial's program and the ceiling: `make bench`."""

import argparse
import contextlib
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Final

from sqlalchemy.engine import make_url

from bench import data, report
from bench.load import wrk_version
from bench.measure import Bench
from bench.scenarios import FULL, QUICK
from chatterd.embedded import postgres

_RESULTS: Final = Path(__file__).with_name("results")


def main() -> None:
    """Run, print the table, and keep it under bench/results unless only a part was run."""
    parser = argparse.ArgumentParser("bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, smaller tables")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="scenarios with this in their titles; media: all with pictures and videos; live: all"
        " with subscribers, and with keys; slow: all beside slow clients",
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    wrk_version()  # else it would be missed late
    _allow_descriptors()
    try:
        with _stopping_once(), _folder() as folder, postgres(folder) as text:
            url = make_url(text)
            facts = {
                "machine": report.machine(str(data.value(url, "SHOW server_version"))),
                "plan": asdict(plan),
            }
            outcomes = list(Bench(folder, url, plan, options.only).outcomes())
    except KeyboardInterrupt:
        sys.stderr.write("\nbench: stopped; nothing is written\n")
        sys.exit(130)  # as a shell reports SIGINT
    print(report.table(outcomes))
    if not options.only:
        report.write(_RESULTS, "quick" if options.quick else "latest", facts, outcomes)


def _allow_descriptors() -> None:
    """Let what the bench starts have as many connections as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="chatterd-bench-"))
    folder.chmod(0o755)  # when the bench runs as root, PostgreSQL does not
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _stopping_once() -> Iterator[None]:
    """Make the first Ctrl-C or SIGTERM a KeyboardInterrupt; what follows it must not be cut short.

    Ignores both from then on, while servers stop and files go.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


if __name__ == "__main__":
    main()
