"""The `chatterd` command."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL, make_url

from chatterd import __version__

_VAR: Final = Path("var")

_DESCRIPTION: Final = """\
The back end of Chatter: people post short texts under a name, with a picture or a video if they
like, and everybody's app shows the feed.
"""

_EPILOG: Final = """\
Settings come from the environment and from the file .env in the working directory; .env.example
lists every one with its meaning.

With no DATABASE_URL, chatterd runs a PostgreSQL of its own, with its data in ./var/postgres. With
one, it uses that database and starts nothing.

examples:
  chatterd serve                            on http://127.0.0.1:8000, for trying it out
  chatterd serve --host 0.0.0.0             reachable for phones in the same network
  chatterd serve --port 8443 --certfile cert.pem --keyfile key.pem
  DATABASE_URL=postgresql://me@localhost/chatter chatterd migrate
"""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 1 and one line on an error, 2 on a wrong call."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for chatty in ("alembic", "httpx2", "watchfiles"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Late, so that --help needs no usable settings and does not wait for imports.
    from alembic.util import CommandError  # noqa: PLC0415

    from chatterd.database import SchemaError  # noqa: PLC0415
    from chatterd.embedded_home import EmbeddedPostgresError  # noqa: PLC0415
    from chatterd.lifespan import StartError  # noqa: PLC0415

    try:
        options.run(options)
    except (StartError, SchemaError, EmbeddedPostgresError, CommandError) as error:
        sys.exit(f"chatterd: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "chatterd", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"chatterd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run the server",
        description="Run the server until Ctrl-C or SIGTERM. Requests under way get a moment to"
        " finish; posts that were answered are in the database.",
        formatter_class=_Help,
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one")
    serve.add_argument(
        "--certfile", type=Path, metavar="FILE", help="TLS certificate (PEM); brings HTTP/2"
    )
    serve.add_argument("--keyfile", type=Path, metavar="FILE", help="the certificate's key (PEM)")
    serve.add_argument(
        "--reload", action="store_true", help="start anew when the code changes, for development"
    )
    serve.set_defaults(run=_serve)

    migrate = commands.add_parser(
        "migrate",
        help="bring the database's schema up to date",
        description="Bring the database's schema up to date (alembic upgrade head). A chatts table"
        " of the tutorial's, found in the database, is taken over with all its rows; each repair"
        " of a row is printed.",
        formatter_class=_Help,
    )
    migrate.set_defaults(run=_migrate)
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, which is a number from 0 to 65535")
    return int(text)


def _serve(options: argparse.Namespace) -> None:
    from chatterd import server, settings  # noqa: PLC0415 - see main

    address = server.Address(options.host, options.port, options.certfile, options.keyfile)
    server.check_tls(address)
    if options.reload:
        with _database() as url:
            _serve_and_reload(url)
        return

    from chatterd.app import create_app  # noqa: PLC0415 - see main

    with server.listen(address) as listener, _database() as url:
        address_url = server.url_of(listener, address)

        def announce() -> None:
            kind = "embedded PostgreSQL" if settings.DATABASE_URL is None else "PostgreSQL"
            lines = (
                f"chatterd {__version__} answers at {address_url}",
                f"database: {kind}, {url.render_as_string(hide_password=True)}",
                f"media: {settings.MEDIA_ROOT}",
            )
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

        server.run(create_app(url), listener, address, announce)


def _serve_and_reload(url: URL) -> None:
    """Run this same command without --reload, again whenever the package's files change."""
    import watchfiles  # noqa: PLC0415 - only development needs it

    os.environ["DATABASE_URL"] = url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "chatterd", *sys.argv[1:]]
    command.remove("--reload")
    watchfiles.run_process(
        Path(__file__).parent,
        target=shlex.join(command),
        target_type="command",
        watch_filter=watchfiles.PythonFilter(),
    )


def _migrate(_options: argparse.Namespace) -> None:
    from chatterd import database, settings  # noqa: PLC0415 - see main

    if settings.DATABASE_URL is None:
        with _database():
            pass
    else:
        database.migrate(settings.DATABASE_URL)
    sys.stdout.write(f"The schema is at revision {database.head_revision()}.\n")


@contextmanager
def _database() -> Iterator[URL]:
    """Yield the database's URL; where none is set, run the embedded one, migrated."""
    from chatterd import database, embedded, settings  # noqa: PLC0415 - see main

    if settings.DATABASE_URL is not None:
        yield settings.DATABASE_URL
        return
    with embedded.postgres(_VAR, bin_dir=settings.PG_BIN) as text:
        url = make_url(text)
        database.migrate(url)
        yield url
