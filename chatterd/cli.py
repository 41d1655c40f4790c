"""The `chatterd` command."""

import argparse
import gc
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, TextIO, TypeVar

from chatterd import __version__, logs

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from tqdm import tqdm

    from chatterd.backup import Contents
    from chatterd.database import Database
    from chatterd.doctor import Finding
    from chatterd.media_folder import Tally

T = TypeVar("T")

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
  chatterd serve --uds /run/chatterd.sock --workers 4
  DATABASE_URL=postgresql://me@localhost/chatter chatterd migrate
  chatterd doctor                           what is wrong, and how to mend it
  chatterd media doctor                     are all pictures and videos there, and whole?
  chatterd media sweep --delete             remove what no chatt names any more
  chatterd nginx --server-name chatter.example > /etc/nginx/sites-enabled/chatterd
  chatterd backup chatter.tar               all chatts, pictures and videos in one file
"""

_DOCTOR: Final = """\
Look for what is wrong, beside a running server or without one, and say how to mend it. Nothing is
changed. Call it in the server's folder, as its user and with its environment: it looks at what the
settings say. A line for each check tells ok, warning or fault; the exit status is 1 with a fault.

  settings     do they go together?
  server       is it ready, and runs with these settings?
  database     does it answer, and can it be used?
  privileges   may the role do what the server does?
  schema       is it that of this version, whole?
  durability   does what was answered survive a power cut?
  locks        does anybody keep others from writing?
  tables       are they clean?
  lag          how long do a commit and its notification take?
  clock        does the database's agree with this machine's?
  connections  are there enough for all processes?
  disk         is there room?
  media        are pictures and videos there, and whole? Some are read; with --media all, without a
               time limit.
  nginx        does it let through what the server takes?
               (/etc/nginx/sites-enabled/chatterd or /etc/nginx/conf.d/chatterd.conf)
  certificate  until when do clients accept it?
"""

_MEDIA_DOCTOR: Final = """\
Count what is in MEDIA_ROOT, by state, and what is missing there. Files are read as a whole, to see
whether they are still what was uploaded. The exit status is 1 when something is missing or corrupt.

  referenced   named by a chatt, or the thumbnail of what is
  temporary    on its way in or out
  orphaned     named by no chatt, and whatever else lies there
  corrupt      not what was uploaded, or not to be read
  folders      the folders themselves
  missing      named by a chatt and not there; bytes as far as they are known

The total is everything but the missing, as du counts apparent sizes.
"""

_BACKUP: Final = """\
Write all chatts and the files that they name to FILE, also while servers run. What was posted when
it began is in it. FILE is there when it is whole; one that is there is not written over. With - for
FILE, the archive goes to the standard output.

Files that chatts name and that are not in MEDIA_ROOT are left out and printed; so are the keys of
those that are corrupt, which are taken as they are.

`backup verify FILE` reads such an archive from end to end, and says what is in it, or what is wrong
with it; - for FILE is the standard input. The exit status is 1 when it is damaged. To write to a
file called verify, name it ./verify.
"""

_RESTORE: Final = """\
Fill an empty database and an empty MEDIA_ROOT from FILE, which `chatterd backup` has written.
Nothing is changed before all of FILE has been read and found whole. If it is interrupted, it can be
started again. Stop the servers before.
"""


_NGINX: Final = """\
Print the configuration of an Nginx in front of the server, with the limits, the media folder and
the path of the settings: one file that belongs into Nginx's http block. deploy/nginx has the same
for the default settings.
"""


class MediaError(Exception):
    """The media folder cannot be read or written. The message is for the operator."""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 1 and one line on an error, 2 on a wrong call."""
    options = _parser().parse_args(arguments)
    logs.configure("info", "text")
    for chatty in ("alembic", "httpx2", "watchfiles"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Nothing of what is imported is garbage; looking for it often would be a tenth of the start.
    gc.set_threshold(20_000)
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT
    except BrokenPipeError:  # whoever reads has seen enough: head, or a pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except Exception as error:
        if isinstance(error, _told_in_a_line()):
            sys.exit(f"chatterd: {error}")
        raise


def _told_in_a_line() -> tuple[type[Exception], ...]:
    """Return the errors whose message is for the operator."""
    # Late, so that --help needs no usable settings and does not wait for imports.
    from chatterd.archive import BackupError  # noqa: PLC0415
    from chatterd.database import SchemaError, StatementError  # noqa: PLC0415
    from chatterd.embedded_home import EmbeddedPostgresError  # noqa: PLC0415
    from chatterd.lifespan import StartError  # noqa: PLC0415
    from chatterd.nginx import NginxError  # noqa: PLC0415

    return (
        BackupError,
        EmbeddedPostgresError,
        MediaError,
        NginxError,
        SchemaError,
        StartError,
        StatementError,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "chatterd", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"chatterd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run the server",
        description="Run the server until Ctrl-C or SIGTERM. Requests under way get"
        " SHUTDOWN_TIMEOUT to finish, unless a second signal comes; posts that were answered are in"
        " the database.",
        formatter_class=_Help,
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one")
    serve.add_argument(
        "--uds",
        type=Path,
        metavar="PATH",
        help="unix socket to listen on instead; who may enter its folder may connect",
    )
    serve.add_argument("--fd", type=int, help=argparse.SUPPRESS)  # from the supervisor
    serve.add_argument(
        "--certfile", type=Path, metavar="FILE", help="TLS certificate (PEM); brings HTTP/2"
    )
    serve.add_argument("--keyfile", type=Path, metavar="FILE", help="the certificate's key (PEM)")
    serve.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="processes that serve; SIGHUP replaces them one by one, for new code and settings",
    )
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

    _add_doctor(commands)

    media = commands.add_parser(
        "media",
        help="look after the stored pictures and videos",
        description="Look after the stored pictures and videos, also while servers run.",
        formatter_class=_Help,
    )
    _add_media_commands(media.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    _add_backup_commands(commands)
    _add_nginx(commands)
    return parser


def _add_nginx(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    nginx = commands.add_parser(
        "nginx",
        help="print a configuration for Nginx",
        description=_NGINX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    nginx.add_argument(
        "--server-name",
        action="append",
        metavar="NAME",
        help="host name of the site, once for each (default: that of PUBLIC_URL, or ALLOWED_HOSTS)",
    )
    nginx.add_argument(
        "--upstream",
        action="append",
        type=_upstream,
        metavar="ADDRESS",
        help="where an instance listens, once for each: unix:/path/of/socket or host:port (default:"
        " unix:/run/chatterd/1.sock and unix:/run/chatterd/2.sock)",
    )
    nginx.add_argument(
        "--certificate", type=Path, metavar="FILE", help="TLS certificate (PEM); without it, HTTP"
    )
    nginx.add_argument(
        "--certificate-key", type=Path, metavar="FILE", help="the certificate's key (PEM)"
    )
    nginx.add_argument("--port", type=_port, default=443, help="port of HTTPS (default: 443)")
    nginx.add_argument("--http-port", type=_port, default=80, help="port of HTTP (default: 80)")
    nginx.set_defaults(run=_nginx)


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="look for what is wrong, and say how to mend it",
        description=_DOCTOR,
        formatter_class=_Help,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for programs")
    doctor.add_argument("--media", action="store_true", help="read every picture and video")
    doctor.add_argument(
        "--nginx", type=Path, metavar="FILE", help="Nginx's configuration, where it is elsewhere"
    )
    doctor.add_argument(
        "--certificate", type=Path, metavar="FILE", help="another certificate (PEM) than Nginx's"
    )
    doctor.add_argument(
        "--url", help="the server's address, like https://localhost:8443 or unix:PATH"
    )
    doctor.add_argument(
        "--processes",
        type=_count,
        metavar="NUMBER",
        help="server processes that share the database, where they are not all on this machine",
    )
    doctor.add_argument(
        "--timeout", type=_count, default=10, metavar="SECONDS", help="for each check"
    )
    doctor.set_defaults(run=_doctor)


def _add_media_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="count what is there, what is missing, and what is corrupt",
        description=_MEDIA_DOCTOR,
        formatter_class=_Help,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for programs")
    doctor.set_defaults(run=_media_doctor)

    sweep = commands.add_parser(
        "sweep",
        help="remove what no chatt names",
        description="Remove files that no chatt names, and what uploads that were cut off have"
        " left. Without --delete nothing is removed, only counted. Files whose names are not"
        " chatterd's own are counted as unknown and stay. A server does the same every hour.",
        formatter_class=_Help,
    )
    sweep.add_argument(
        "--older-than",
        type=_seconds,
        default=3600,
        metavar="SECONDS",
        help="leave what is younger; beside a server, this must be longer than any upload takes",
    )
    sweep.add_argument("--delete", action="store_true", help="do it")
    sweep.set_defaults(run=_sweep)


def _add_backup_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    backup = commands.add_parser(
        "backup",
        usage="chatterd backup [-h] FILE\n       chatterd backup verify FILE",
        help="write all chatts, pictures and videos to a file, or verify such a file",
        description=_BACKUP,
        formatter_class=_Help,
    )
    backup.add_argument("words", nargs="+", metavar="FILE", help="the archive, a tar file")

    def run(options: argparse.Namespace) -> None:
        match options.words:
            case ["verify", path]:
                _verify(path)
            case [path] if path != "verify":
                _backup(path)
            case _:
                backup.error("FILE or verify FILE is wanted; a file called verify is ./verify")

    backup.set_defaults(run=run)

    restore = commands.add_parser(
        "restore",
        help="fill an empty place from a backup",
        description=_RESTORE,
        formatter_class=_Help,
    )
    restore.add_argument("file", type=Path, metavar="FILE", help="the archive")
    restore.set_defaults(run=_restore)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, which is a number from 0 to 65535")
    return int(text)


def _upstream(text: str) -> str:
    if not re.fullmatch(r"unix:/[\w./-]+|([\w.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is neither unix:/path/of/socket nor host:port")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:6]) < 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 99999")
    return int(text)


def _workers(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes, 1 to 256")
    return int(text)


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 to 999999999")
    return int(text)


def _serve(options: argparse.Namespace) -> None:
    from chatterd import server, settings  # noqa: PLC0415 - see _told_in_a_line
    from chatterd.listener import Address, Listener  # noqa: PLC0415 - see _told_in_a_line

    logs.configure(settings.LOG_LEVEL, settings.LOG_FORMAT)
    address = Address(
        options.host, options.port, options.certfile, options.keyfile, options.uds, options.fd
    )
    server.check_tls(address)
    if options.reload:
        with _database() as url:
            _serve_and_reload(url)
        return

    with Listener(address) as listener, _database() as url:
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
            from chatterd import supervisor  # noqa: PLC0415 - see _told_in_a_line

            variables = {}
            if settings.DATABASE_URL is None:  # else they read it themselves, from .env perhaps
                variables["DATABASE_URL"] = url.render_as_string(hide_password=False)
            supervisor.run(listener, options.workers, variables, announce)
            return

        from chatterd.app import create_app  # noqa: PLC0415 - see _told_in_a_line

        on_ready = announce if options.fd is None else lambda: None  # else the supervisor does
        server.run(create_app(url), listener, on_ready)


def _serve_and_reload(url: "URL") -> None:
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
    from chatterd import database, settings  # noqa: PLC0415 - see _told_in_a_line

    if settings.DATABASE_URL is None:
        with _database():
            pass
    else:
        database.migrate(settings.DATABASE_URL)
    sys.stdout.write(f"The schema is at revision {database.head_revision()}.\n")


def _nginx(options: argparse.Namespace) -> None:
    from chatterd import nginx, settings  # noqa: PLC0415 - see _told_in_a_line

    site = nginx.Site(
        options.server_name or nginx.default_names(),
        options.upstream or nginx.DEFAULT_UPSTREAMS,
        settings.MEDIA_ROOT,
        options.certificate and options.certificate.absolute(),
        options.certificate_key and options.certificate_key.absolute(),
        options.port,
        options.http_port,
    )
    sys.stdout.write(nginx.whole(site))


def _doctor(options: argparse.Namespace) -> None:
    from chatterd.doctor import Finding, fault  # noqa: PLC0415 - see _told_in_a_line

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


def _examine(options: argparse.Namespace, take: "Callable[[str, Finding | None], None]") -> None:
    import asyncio  # noqa: PLC0415 - see _told_in_a_line

    from chatterd import settings  # noqa: PLC0415 - see _told_in_a_line
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
    data = (_VAR / "postgres").resolve() if is_embedded else None

    async def run(way: Way | EmbeddedPostgresError) -> None:
        async for name, finding in examine(way, data, wishes):
            take(name, finding)

    with ExitStack() as stack:
        try:
            url = stack.enter_context(_database_beside_a_server(migrated=False))
        except EmbeddedPostgresError as error:
            asyncio.run(run(error))
        else:
            asyncio.run(run(Way(url, is_embedded)))


def _is_coloured() -> bool:
    """Tell whether the output is a terminal that knows colours (https://no-color.org)."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def _media_doctor(options: argparse.Namespace) -> None:
    from chatterd.media_doctor import doctor  # noqa: PLC0415 - see _told_in_a_line

    report = _with_media(doctor)
    if options.json:
        facts = asdict(report) | {"total": report.total, "healthy": report.is_healthy}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        for state, keys in ("corrupt", report.corrupt_keys), ("missing", report.missing_keys):
            # Quoted: a name may hold anything.
            sys.stdout.writelines(f"{state}: {json.dumps(key)}\n" for key in keys)
        states = ("missing", "referenced", "temporary", "orphaned", "corrupt", "folders")
        _print_tallies({state: getattr(report, state) for state in states})
        sys.stdout.write(f"{'total':<10} {'':>9} {report.total:>17} bytes\n")
    if not report.is_healthy:
        sys.exit(1)


def _sweep(options: argparse.Namespace) -> None:
    from chatterd.media_sweep import Sweep  # noqa: PLC0415 - see _told_in_a_line

    result = _with_media(
        lambda database, root: Sweep(
            database, root, options.older_than, delete=options.delete
        ).run()
    )
    done = "removed" if options.delete else "would be removed; --delete does it"
    sys.stdout.write(f"{done}:\n")
    _print_tallies({"orphaned": result.orphaned, "temporary": result.temporary})
    sys.stdout.write(f"{'records':<10} {result.records:>9}\n")
    if result.restored.count:
        sys.stdout.write("put back:\n" if options.delete else "would be put back:\n")
        _print_tallies({"restored": result.restored})
    sys.stdout.write("left alone:\n")
    _print_tallies({"unknown": result.unknown})


def _backup(path: str) -> None:
    import asyncio  # noqa: PLC0415 - see _told_in_a_line

    from chatterd import backup, settings  # noqa: PLC0415 - see _told_in_a_line
    from chatterd.archive import BackupError  # noqa: PLC0415 - see _told_in_a_line

    if path == "-" and sys.stdout.isatty():
        raise BackupError("The standard output is a terminal: name a file, or a program behind |.")
    with _database_beside_a_server() as url, _archive_to_write(path) as file, _bar(0) as bar:
        contents = asyncio.run(backup.back_up(url, settings.MEDIA_ROOT, file, bar))
    _print_contents(contents, sys.stderr if path == "-" else sys.stdout)


@contextmanager
def _archive_to_write(path: str) -> Iterator[IO[bytes]]:
    from chatterd.backup import new_file  # noqa: PLC0415 - see _told_in_a_line

    if path == "-":
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as file:
            yield file
    else:
        with new_file(Path(path)) as file:
            yield file


def _verify(path: str) -> None:
    from chatterd import backup  # noqa: PLC0415 - see _told_in_a_line

    with _archive_to_read(path) as file, _bar(os.fstat(file.fileno()).st_size) as bar:
        contents = backup.verify(file, bar)
    _print_contents(contents, sys.stdout)


def _restore(options: argparse.Namespace) -> None:
    import asyncio  # noqa: PLC0415 - see _told_in_a_line

    from chatterd import backup, settings  # noqa: PLC0415 - see _told_in_a_line
    from chatterd.archive import BackupError  # noqa: PLC0415 - see _told_in_a_line
    from chatterd.restore import restore  # noqa: PLC0415 - see _told_in_a_line

    with _archive_to_read(options.file) as file:
        if not file.seekable():
            raise BackupError(f"{options.file} cannot be read twice: restore from a file.")
        with _bar(2 * os.fstat(file.fileno()).st_size) as bar:
            contents = backup.verify(file, bar)
            file.seek(0)
            with _database(migrated=False) as url:
                asyncio.run(restore(url, settings.MEDIA_ROOT, file, bar))
    _print_contents(contents, sys.stdout)


@contextmanager
def _archive_to_read(path: str | Path) -> Iterator[IO[bytes]]:
    from chatterd.archive import BackupError, DamagedError  # noqa: PLC0415 - see _told_in_a_line

    try:
        with open(0 if path == "-" else path, "rb") as file:  # noqa: PTH123 - maybe a descriptor
            try:
                yield file
            except DamagedError as error:
                raise BackupError(f"{path}: {error}") from error
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error.strerror}.") from error


def _bar(size: int) -> "tqdm[NoReturn]":
    """Return a bar for so many bytes, which is shown on a terminal."""
    from tqdm import tqdm  # noqa: PLC0415 - see _told_in_a_line

    return tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False)


def _print_contents(contents: "Contents", stream: TextIO) -> None:
    from chatterd.archive import quoted  # noqa: PLC0415 - see _told_in_a_line

    manifest = contents.manifest
    for state, keys in ("missing", manifest.missing_keys), ("corrupt", contents.corrupt_keys):
        sys.stderr.writelines(f"{state}: {quoted(key)}\n" for key in keys)
    made_by = (
        f"chatterd {manifest.chatterd}, schema {manifest.revision},"
        f" PostgreSQL {manifest.postgresql}"
    )
    lines = [f"created    {manifest.created.isoformat(timespec='seconds')} by {made_by}\n"]
    lines += [f"{table.name:<16} {table.rows:>9} rows\n" for table in manifest.tables]
    lines += [f"{'files':<16} {manifest.files:>9} {manifest.bytes:>17} bytes\n"]
    lines += [
        f"{'missing':<16} {manifest.missing:>9}\n",
        f"{'corrupt':<16} {contents.corrupt:>9}\n",
    ]
    stream.writelines(lines)


def _print_tallies(tallies: "Mapping[str, Tally]") -> None:
    for state, tally in tallies.items():
        sys.stdout.write(f"{state:<10} {tally.count:>9} {tally.bytes:>17} bytes\n")


def _with_media(work: "Callable[[Database, Path], Coroutine[Any, Any, T]]") -> T:
    """Return what `work` makes of the database and the media folder, also beside a server.

    Raises `MediaError`, `SchemaError`, `StatementError`, `EmbeddedPostgresError`.
    """
    import asyncio  # noqa: PLC0415 - see _told_in_a_line

    from chatterd import database, settings  # noqa: PLC0415 - see _told_in_a_line
    from chatterd.errors import DatabaseUnavailable  # noqa: PLC0415 - see _told_in_a_line

    # What it logs is about requests; a command says it in its own words.
    logging.getLogger(database.__name__).setLevel(logging.CRITICAL)

    async def run(url: "URL") -> T:
        opened = database.Database(url)
        try:
            return await work(opened, settings.MEDIA_ROOT)
        finally:
            await opened.aclose()

    with _database_beside_a_server() as url:
        try:
            return asyncio.run(run(url))
        except DatabaseUnavailable as error:
            raise database.refusal(error) from error
        except OSError as error:
            raise MediaError(
                f"MEDIA_ROOT, {settings.MEDIA_ROOT}, cannot be used: {error.strerror}."
            ) from error


@contextmanager
def _database_beside_a_server(*, migrated: bool = True) -> Iterator["URL"]:
    """Yield the database's URL: of the embedded one, which a server may be running or nobody.

    Never of a new one: to it, every file would be an orphan. Where nobody runs it, it is `migrated`
    first.
    """
    from sqlalchemy.engine import make_url  # noqa: PLC0415 - see _told_in_a_line

    from chatterd import embedded, settings  # noqa: PLC0415 - see _told_in_a_line
    from chatterd.embedded_home import EmbeddedPostgresError  # noqa: PLC0415 - see _told_in_a_line

    if settings.DATABASE_URL is None:
        if (text := embedded.running(_VAR)) is not None:
            yield make_url(text)
            return
        if not (_VAR / "postgres" / "PG_VERSION").exists():
            raise EmbeddedPostgresError(
                f"there is no database in {_VAR / 'postgres'}: work in the server's folder, or set"
                " DATABASE_URL"
            )
    with _database(migrated=migrated) as url:
        yield url


@contextmanager
def _database(*, migrated: bool = True) -> Iterator["URL"]:
    """Yield the database's URL; where none is set, run the embedded one, `migrated` or as it is."""
    from chatterd import settings  # noqa: PLC0415 - see _told_in_a_line

    if settings.DATABASE_URL is not None:
        yield settings.DATABASE_URL
        return
    from sqlalchemy.engine import make_url  # noqa: PLC0415 - see _told_in_a_line

    from chatterd import database, embedded  # noqa: PLC0415 - see _told_in_a_line

    with embedded.postgres(_VAR, bin_dir=settings.PG_BIN) as text:
        url = make_url(text)
        if migrated:
            database.migrate(url)
        yield url
