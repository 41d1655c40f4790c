"""chatterd serve."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from sqlalchemy.engine import URL

import chatterd
from chatterd import __version__, logs, server, settings
from chatterd.commands.database import opened_database
from chatterd.listener import Address, Listener


def run(options: argparse.Namespace) -> None:
    """Serve until a signal comes; raises `StartError` and what else keeps it from starting."""
    logs.configure(settings.LOG_LEVEL, settings.LOG_FORMAT)
    address = Address(
        options.host, options.port, options.certfile, options.keyfile, options.uds, options.fd
    )
    server.check_tls(address)
    if options.reload:
        with opened_database() as url:
            _serve_and_reload(url)
        return

    with Listener(address) as listener, opened_database() as url:
        answers_at = listener.url

        def announce() -> None:
            kind = "embedded PostgreSQL" if settings.DATABASE_URL is None else "PostgreSQL"
            lines = (
                f"chatterd {__version__} answers at {answers_at}",
                f"database: {kind}, {url.render_as_string(hide_password=True)}",
                f"media: {settings.MEDIA_ROOT}",
            )
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

        if options.workers > 1:
            from chatterd import supervisor  # noqa: PLC0415 - only it needs this

            variables = {}
            if settings.DATABASE_URL is None:  # else they read it themselves, from .env perhaps
                variables["DATABASE_URL"] = url.render_as_string(hide_password=False)
            supervisor.run(listener, options.workers, variables, announce)
            return

        from chatterd.app import create_app  # noqa: PLC0415 - a supervisor does without

        on_ready = announce if options.fd is None else lambda: None  # else the supervisor does
        server.run(create_app(url), listener, on_ready)


def _serve_and_reload(url: URL) -> None:
    """Run this same command without --reload, again whenever the package's files change."""
    import watchfiles  # noqa: PLC0415 - only development needs it

    os.environ["DATABASE_URL"] = url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "chatterd", *sys.argv[1:]]
    command.remove("--reload")
    watchfiles.run_process(
        Path(chatterd.__file__).parent,
        target=shlex.join(command),
        target_type="command",
        watch_filter=watchfiles.PythonFilter(),
    )
