"""chatterd doctor, which must run whatever the settings are: it loads them last."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

from chatterd.doctor import Finding, fault


def run(options: argparse.Namespace) -> None:
    """Print what was found; exits with 1 when there is a fault."""
    findings: list[tuple[str, Finding | None]] = []

    def take(name: str, finding: Finding | None) -> None:
        findings.append((name, finding))
        if finding is not None and not options.json:
            sys.stdout.write(finding.text(name, is_coloured=_is_coloured()))
            sys.stdout.flush()

    try:
        from chatterd import settings  # noqa: F401, PLC0415 - whether they can be read
    except SystemExit as error:
        found, _, mend = str(error).removeprefix("chatterd: ").partition(" It must be ")
        take("settings", fault(found, f"It must be {mend}" if mend else "Mend the file."))
    else:
        _examine(options, take)
    levels = [finding.level for _, finding in findings if finding is not None]
    if options.json:
        facts = [{"check": name} | finding._asdict() for name, finding in findings if finding]
        skipped = [name for name, finding in findings if finding is None]
        healthy = "fault" not in levels
        report = {"healthy": healthy, "checks": facts, "skipped": skipped}
        sys.stdout.write(json.dumps(report) + "\n")
    elif skipped := [name for name, finding in findings if finding is None]:
        sys.stdout.write(f"Not looked at before that is mended: {', '.join(skipped)}.\n")
    if "fault" in levels:
        sys.exit(1)


def _examine(options: argparse.Namespace, take: Callable[[str, Finding | None], None]) -> None:
    from chatterd import settings  # noqa: PLC0415 - see run
    from chatterd.commands.database import VAR, database_beside_a_server  # noqa: PLC0415
    from chatterd.doctor.checks import Wishes, examine  # noqa: PLC0415
    from chatterd.doctor.way import Way  # noqa: PLC0415
    from chatterd.embedded_home import EmbeddedPostgresError  # noqa: PLC0415

    wishes = Wishes(
        nginx=options.nginx,
        certificate=options.certificate,
        url=options.url,
        processes=options.processes,
        reads_all_media=options.media,
        timeout_seconds=options.timeout,
    )
    is_embedded = settings.DATABASE_URL is None
    data = (VAR / "postgres").resolve() if is_embedded else None

    async def run(way: Way | EmbeddedPostgresError) -> None:
        async for name, finding in examine(way, data, wishes):
            take(name, finding)

    with ExitStack() as stack:
        try:
            url = stack.enter_context(database_beside_a_server(migrated=False))
        except EmbeddedPostgresError as error:
            asyncio.run(run(error))
        else:
            asyncio.run(run(Way(url, is_embedded)))


def _is_coloured() -> bool:
    """Tell whether the output is a terminal that knows colours (https://no-color.org)."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
