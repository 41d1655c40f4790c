"""The `chatterd` command."""

import argparse
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final

from chatterd import __version__, logs

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
    # Late, see _load.
    from chatterd.archive import BackupError  # noqa: PLC0415
    from chatterd.commands.media import MediaError  # noqa: PLC0415
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


def _load(name: str) -> ModuleType:
    """Return the module of a command: late, so that --help waits for no imports and no settings."""
    return import_module(f"chatterd.commands.{name}")


def _command(name: str, function: str = "run") -> Callable[[argparse.Namespace], None]:
    """Return what runs a command with its options."""

    def run(options: argparse.Namespace) -> None:
        getattr(_load(name), function)(options)

    return run


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
    serve.set_defaults(run=_command("serve"))

    migrate = commands.add_parser(
        "migrate",
        help="bring the database's schema up to date",
        description="Bring the database's schema up to date (alembic upgrade head). A chatts table"
        " of the tutorial's, found in the database, is taken over with all its rows; each repair"
        " of a row is printed.",
        formatter_class=_Help,
    )
    migrate.set_defaults(run=_command("migrate"))

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
    nginx.set_defaults(run=_command("nginx"))


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
    doctor.set_defaults(run=_command("doctor"))


def _add_media_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="count what is there, what is missing, and what is corrupt",
        description=_MEDIA_DOCTOR,
        formatter_class=_Help,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for programs")
    doctor.set_defaults(run=_command("media", "doctor"))

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
    sweep.set_defaults(run=_command("media", "sweep"))


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
                _load("backup").verify(path)
            case [path] if path != "verify":
                _load("backup").back_up(path)
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
    restore.set_defaults(run=_command("backup", "restore"))


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
