"""A PostgreSQL of our own: a private cluster, a child of this process, behind a unix socket."""

import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from chatterd.embedded_home import (
    Account,
    EmbeddedPostgresError,
    complaint_in,
    find_binaries,
    place,
    private_folder,
    run,
    spawn,
    version_of,
    within_reach,
)

ROLE = DATABASE = "chatterd"
PORT = 5432  # Only a part of the socket's name; said everywhere, so that PGPORT changes nothing.
SOCKET = f".s.PGSQL.{PORT}"

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
    binaries = find_binaries(bin_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _lock(stack, folder, folder / "postgres.lock")
    data, account = place(folder)
    binaries = within_reach(binaries, account, may_copy=bin_dir is None)
    version = version_of(binaries)
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
    begin = os.fstat(log).st_size  # before it starts: it may have said all it has to say soon
    server = spawn([binaries / "postgres", "-D", data, *_flags(settings)], account, log)
    stack.callback(_stop, server)
    _wait_until_ready(server, data, sockets, log, begin)
    return _url(sockets)


def running(folder: Path) -> str | None:
    """Return the URL of the cluster in `folder`/postgres while another process runs it.

    None where nobody does, or it is not ready. Raises EmbeddedPostgresError where it refuses us.
    """
    data = (folder / "postgres").resolve()
    try:
        # "Lock-file format" in PostgreSQL's miscadmin.h: the fifth line is the sockets' folder.
        sockets = Path((data / "postmaster.pid").read_text().splitlines()[4])
    except (OSError, IndexError):
        return None
    return _url(sockets) if _accepts(data, sockets) else None


def _url(sockets: Path) -> str:
    # Nothing to escape in it, see _socket_folder: configparser, and so alembic, trips over a "%".
    return f"postgresql+asyncpg://{ROLE}@/{DATABASE}?host={sockets}&port={PORT}"


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
    data: Path, binaries: Path, version: str, account: Account, options: Sequence[str]
) -> None:
    """Make the cluster with its role and database aside, and rename it when it is whole."""
    prefix = f"{data.name}.new-"
    for leftover in [path for path in data.parent.iterdir() if path.name.startswith(prefix)]:
        shutil.rmtree(leftover, ignore_errors=True)
    new = private_folder(prefix, data.parent, account)
    initdb = f"-U {ROLE} --auth=trust --encoding=UTF8 --locale=C --data-checksums"
    if _major(version) >= BUILTIN_LOCALES_SINCE:
        initdb += " --locale-provider=builtin --builtin-locale=C.UTF-8"
    if "fsync=off" in options:
        initdb += " --no-sync"
    flags = _flags([*options, "exit_on_error=on"])
    single: list[str | Path] = [binaries / "postgres", "--single", "-D", new, *flags, "template1"]
    try:
        run([binaries / "initdb", "-D", new, *initdb.split()], account)
        run(single, account, f"CREATE DATABASE {DATABASE}\n")
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


def _socket_folder(stack: ExitStack, data: Path, account: Account) -> Path:
    """Return the data folder, or a private folder where its path cannot be a socket's.

    Paths past the kernel's limit cannot; and commas, colons, blanks mean something of their own in
    PostgreSQL's list of folders or in a URL's list of hosts.
    """
    plain = re.fullmatch(r"[\w./-]+", str(data), flags=re.ASCII)
    if plain and len(bytes(data / SOCKET)) <= SOCKET_PATH_BYTES:
        return data
    # Not in TMPDIR: that one may be long itself, or closed to the account.
    folder = private_folder("chatterd-", Path("/tmp"), account)  # noqa: S108 - fresh, mode 0700
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
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


def _wait_until_ready(
    server: subprocess.Popen[bytes], data: Path, sockets: Path, log: int, begin: int
) -> None:
    """Wait until PostgreSQL takes connections; `begin` is where its part of the log begins."""
    deadline = time.monotonic() + READY_SECONDS
    while not _accepts(data, sockets):
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=0.01)
            said = os.pread(log, LOG_MAX_BYTES, begin).decode(errors="replace")
            raise EmbeddedPostgresError(
                f"PostgreSQL ended while starting in {data}: {complaint_in(said)}"
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


def _flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("-c", setting)]
