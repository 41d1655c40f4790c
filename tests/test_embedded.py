"""The embedded PostgreSQL: real clusters, real processes, real signals."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from chatterd import embedded, embedded_home
from chatterd.embedded import postgres
from chatterd.embedded_home import EmbeddedPostgresError, find_binaries
from tests.conftest import connected, dsn
from tests.process import DEADLINE_SECONDS, open_folder, running, wait_until

FAST = ["fsync=off"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux stops a child with us")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")

SERVER = """
import sys
from pathlib import Path
from chatterd.embedded import postgres
with postgres(Path(sys.argv[1]), options=["fsync=off"]) as url:
    print(url, flush=True)
    sys.stdin.read()
"""

BUSY_CLIENT = """
import asyncio, asyncpg, sys
async def main():
    connection = await asyncpg.connect(sys.argv[1])
    await connection.execute("DO $$ BEGIN LOOP END LOOP; END $$")
asyncio.run(main())
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as made:
        yield made


@pytest.fixture(scope="module")
def kept() -> Iterator[Path]:
    """Hold one cluster with one row, for the tests that need a cluster but not a fresh one."""
    with open_folder() as made:
        with postgres(made, options=FAST) as url:
            query(url, "CREATE TABLE kept AS SELECT 'this row' AS message")
        yield made


def test_a_first_start_makes_a_database_that_keeps_every_script(folder: Path) -> None:
    with postgres(folder / "missing" / "var", options=FAST) as url:
        query(url, "CREATE TABLE t (message text)")
        query(url, "INSERT INTO t VALUES ($1)", "grüß 你好 🎉")
        assert query(url, "SELECT * FROM t") == [("grüß 你好 🎉",)]
        assert query(url, "SELECT current_user, current_database()") == [("chatterd", "chatterd")]
        assert query(url, "SHOW server_encoding") == [("UTF8",)]
        assert query(url, "SHOW timezone") == [("UTC",)]
        assert query(url, "SHOW data_checksums") == [("on",)]
        assert query(url, "SELECT lower('ÄÖ')") == [("äö",)]
        assert query(url, "SHOW listen_addresses") == [("",)]
    assert running(folder) == []


def test_a_cluster_is_durable_unless_told_otherwise(kept: Path) -> None:
    with postgres(kept) as url:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert query(url, f"SHOW {setting}") == [("on",)]
    with postgres(kept, options=["fsync=off"]) as url:
        assert query(url, "SHOW fsync") == [("off",)]


def test_rows_are_kept_between_runs(kept: Path) -> None:
    for _ in range(2):
        with postgres(kept, options=FAST) as url:
            assert_kept(url)


def test_the_environment_of_other_postgresql_tools_changes_nothing(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGPORT", "PGHOST", "PGDATA", "PGUSER", "PGDATABASE", "LC_ALL", "LANG"):
        monkeypatch.setenv(name, "1")
    with postgres(kept, options=FAST) as url:
        assert_kept(url)


@pytest.mark.parametrize(
    "name",
    ["long" * 30, "with blank", "a,b:c", 'it\'s "quoted" 100%', "照片"],
    ids=["long", "blank", "list", "quotes", "not ascii"],
)
def test_a_path_that_cannot_be_a_sockets_gets_its_socket_elsewhere(folder: Path, name: str) -> None:
    with postgres(folder / name, options=FAST) as url:
        assert query(url, "SELECT 1") == [(1,)]
        sockets = Path(url.partition("host=")[2].partition("&")[0])
        assert sockets.stat().st_mode & 0o777 == 0o700
        assert not sockets.is_relative_to(folder)
    assert not sockets.exists()


def test_a_second_run_on_the_same_folder_is_told_who_uses_it(kept: Path) -> None:
    with (
        server(kept) as (process, url),
        pytest.raises(EmbeddedPostgresError, match=rf"in use .* \(process {process.pid}\)"),
        postgres(kept),
    ):
        pass
    with postgres(kept, options=FAST) as url:
        assert_kept(url)


def test_two_folders_that_link_to_one_cluster_exclude_each_other(kept: Path, folder: Path) -> None:
    (folder / "postgres").symlink_to(kept / "postgres")
    with postgres(kept, options=FAST) as url:
        with pytest.raises(EmbeddedPostgresError, match="in use by another"), postgres(folder):
            pass
        assert_kept(url)
    with postgres(folder, options=FAST) as url:
        assert_kept(url)


def test_an_error_in_the_body_passes_through_and_stops_the_server(kept: Path) -> None:
    with pytest.raises(OSError, match="the body's own"), postgres(kept, options=FAST):
        raise OSError("the body's own")
    assert running(kept) == []
    with postgres(kept, options=FAST) as url:
        assert_kept(url)


def test_a_cluster_killed_with_its_server_starts_again_with_every_row(folder: Path) -> None:
    with server(folder) as (process, url):
        query(url, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS number")
        process.kill()
        process.wait()
    # At once: the old postmaster may still be shutting down.
    with postgres(folder, options=FAST) as url:
        assert query(url, "SELECT count(*) FROM t") == [(1000,)]


@LINUX
def test_nothing_runs_on_after_a_kill(kept: Path) -> None:
    with server(kept) as (process, _):
        process.kill()
        process.wait()
    wait_until(lambda: running(kept) == [])


def test_a_postmaster_without_a_server_is_stopped_and_its_rows_are_there(kept: Path) -> None:
    with orphan(kept) as process:
        with postgres(kept, options=FAST) as url:
            assert process.wait(DEADLINE_SECONDS) == 0
            assert postmaster(kept) != process.pid
            assert_kept(url)
        assert running(kept) == []


def test_backends_without_a_postmaster_are_stopped_and_its_rows_are_there(kept: Path) -> None:
    with postgres(kept, options=FAST) as url, busy_client(url):
        busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO%' AND state = 'active'"
        wait_until(lambda: query(url, busy) == [(1,)])
        os.kill(postmaster(kept), signal.SIGKILL)
        # Leaving must not raise, though the child has died.
    with postgres(kept, options=FAST) as url:
        assert_kept(url)
        assert query(url, busy) == [(0,)]


def test_a_pid_file_whose_number_went_to_a_stranger_neither_blocks_nor_kills(kept: Path) -> None:
    data = kept / "postgres"
    owner = data.stat()
    with spawn_as_owner(data, ["/bin/sleep", "600"]) as stranger:
        pid_file = data / "postmaster.pid"
        pid_file.write_text(f"{stranger.pid}\n{data}\n1700000000\n5432\n{data}\n\n0 0\nready   \n")
        lock_file = data / ".s.PGSQL.5432.lock"
        lock_file.write_text(f"{stranger.pid}\n{data}\n1700000000\n5432\n{data}\n")
        for path in (pid_file, lock_file):
            os.chown(path, owner.st_uid, owner.st_gid)
        with postgres(kept, options=FAST) as url:
            assert_kept(url)
        assert stranger.poll() is None
        stranger.kill()


def test_an_interrupted_first_start_does_not_block_the_next(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER, folder]) as process:
        wait_until(lambda: any(folder.glob("postgres.new-*/base")))
        process.kill()
    assert not (folder / "postgres").exists()
    (folder / "postgres.new-left").mkdir()
    wait_until(lambda: running(folder) == [])
    with postgres(folder, options=FAST) as url:
        assert query(url, "SELECT 1") == [(1,)]
    assert {path.name for path in folder.iterdir()} == {
        "postgres",
        "postgres.lock",
        "postgres.log",
    }


def test_another_major_version_is_refused_with_both_named(kept: Path) -> None:
    version = kept / "postgres" / "PG_VERSION"
    real = version.read_text()
    version.write_text("12\n")
    try:
        with pytest.raises(EmbeddedPostgresError, match=r"PostgreSQL 12 .* PostgreSQL 18.*PG_BIN"):
            postgres(kept).__enter__()
    finally:
        version.write_text(real)


def test_a_folder_without_the_binaries_is_refused(folder: Path) -> None:
    (folder / "initdb").touch()
    with pytest.raises(EmbeddedPostgresError, match=r"there is no postgres in .*PG_BIN"):
        postgres(folder, bin_dir=folder).__enter__()


def test_a_platform_without_a_wheel_is_told_what_to_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_home, "WHEEL", "chatterd_has_no_such_wheel")
    with pytest.raises(EmbeddedPostgresError, match=r"DATABASE_URL .* PG_BIN"):
        postgres(folder).__enter__()


def test_a_folder_that_cannot_be_made_is_refused(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(EmbeddedPostgresError, match=r"Not a directory.*writable"):
        postgres(folder / "file" / "var").__enter__()


@NOT_ROOT
def test_a_folder_that_cannot_be_written_is_refused(folder: Path) -> None:
    folder.chmod(0o500)
    with pytest.raises(EmbeddedPostgresError, match=r"Permission denied.*writable"):
        postgres(folder).__enter__()
    folder.chmod(0o700)


def test_a_link_to_nowhere_is_refused_rather_than_filled_with_a_new_cluster(folder: Path) -> None:
    (folder / "postgres").symlink_to(folder / "not mounted" / "data")
    with pytest.raises(EmbeddedPostgresError, match="not there: mount it"):
        postgres(folder).__enter__()


def test_a_server_that_does_not_start_is_quoted(kept: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"ended while starting .*no_such_setting"):
        postgres(kept, options=["no_such_setting=1"]).__enter__()
    assert running(kept) == []


def test_a_server_that_refuses_us_is_quoted(folder: Path) -> None:
    with postgres(folder, options=FAST) as url:
        query(url.replace("/chatterd?", "/template1?"), "DROP DATABASE chatterd")
    with pytest.raises(EmbeddedPostgresError, match=r'refuses chatterd: database "chatterd" does'):
        postgres(folder, options=FAST).__enter__()
    assert running(folder) == []


def test_no_text_of_a_user_reaches_the_log(folder: Path) -> None:
    with postgres(folder, options=FAST) as url:
        query(url, "CREATE TABLE t (message text UNIQUE CHECK (length(message) < 20))")
        query(url, "INSERT INTO t VALUES ('sesame')")
        for statement, *values in (
            ("INSERT INTO t VALUES ('sesame')",),
            ("INSERT INTO t VALUES ($1)", "sesame"),
            ("INSERT INTO t VALUES ($1)", "sesame" * 20),
            ("SELECT $1::text::int", "sesame"),
            ("sesame",),
        ):
            with pytest.raises(asyncpg.PostgresError):
                query(url, statement, *values)
        wait_until(lambda: "ready to accept" in (folder / "postgres.log").read_text())
    assert "sesame" not in (folder / "postgres.log").read_text()


def test_the_log_starts_anew_when_it_has_grown(kept: Path) -> None:
    log = kept / "postgres.log"
    log.write_bytes(b"old\n" * (embedded.LOG_MAX_BYTES // 4 + 1))
    with postgres(kept, options=FAST):
        assert "old" not in log.read_text()
    assert (kept / "postgres.log.1").stat().st_size > embedded.LOG_MAX_BYTES


@ROOT
def test_root_runs_a_cluster_as_its_owner(folder: Path) -> None:
    with postgres(folder, options=FAST):
        first = psutil.Process(postmaster(folder)).uids()
    assert 0 not in first
    data = folder / "postgres"
    for path in (data, *data.rglob("*")):
        os.chown(path, 1, 1)
    with postgres(folder, options=FAST):
        assert psutil.Process(postmaster(folder)).uids() == (1, 1, 1)
        assert psutil.Process(postmaster(folder)).gids() == (1, 1, 1)


@ROOT
def test_a_cluster_that_root_took_over_is_refused_with_the_cure(folder: Path) -> None:
    data = folder / "postgres"
    data.mkdir()
    (data / "PG_VERSION").write_text("18\n")
    with pytest.raises(EmbeddedPostgresError, match=r"belongs to root.*chown -R"):
        postgres(folder).__enter__()


@ROOT
def test_a_folder_closed_to_others_keeps_its_cluster_elsewhere_and_a_link(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_home, "SYSTEM_FOLDER", folder / "system")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with postgres(closed / "var", options=FAST) as url:
        query(url, "CREATE TABLE t AS SELECT 1 AS number")
    link = closed / "var" / "postgres"
    assert link.is_symlink()
    assert link.resolve().parent == folder / "system"
    assert closed.stat().st_mode & 0o777 == 0o700
    link.unlink()  # Its place hangs on the folder's path alone.
    with postgres(closed / "var", options=FAST) as url:
        assert query(url, "SELECT * FROM t") == [(1,)]


@ROOT
def test_binaries_closed_to_others_are_copied_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_home, "SYSTEM_FOLDER", folder / "system")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    wheel = wheel_binaries().parents[1]
    for part in (wheel, wheel.with_name(f"{wheel.name}.libs")):
        if part.exists():
            shutil.copytree(part, closed / part.name)
    monkeypatch.syspath_prepend(closed)
    times = set()
    for _ in range(2):
        with postgres(folder / "var", options=FAST) as url:
            assert query(url, "SELECT 1") == [(1,)]
            program = Path(psutil.Process(postmaster(folder / "var")).exe())
            assert program.is_relative_to(folder / "system")
            times.add(program.stat().st_ctime_ns)
    assert len(times) == 1
    assert len(list((folder / "system").iterdir())) == 1
    with pytest.raises(EmbeddedPostgresError, match=r"cannot reach.*PG_BIN"):
        postgres(folder / "var", bin_dir=wheel_binaries()).__enter__()


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a cluster under a process of its own; yield that process and the URL."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


@contextmanager
def orphan(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a postmaster on the cluster as a chatterd that was killed may leave it."""
    data = folder / "postgres"
    command: list[str | Path] = [
        wheel_binaries() / "postgres",
        "-D",
        data,
        "-c",
        "listen_addresses=",
        "-k",
        data,
    ]
    with spawn_as_owner(data, command) as process:
        pid_file = data / "postmaster.pid"
        wait_until(lambda: pid_file.exists() and "ready " in pid_file.read_text())
        yield process


def spawn_as_owner(data: Path, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
    owner = data.stat() if os.geteuid() == 0 else None
    return subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        user=owner.st_uid if owner else None,
        group=owner.st_gid if owner else None,
    )


@contextmanager
def busy_client(url: str) -> Iterator[None]:
    """Keep a backend in a loop in which it does not notice that its postmaster died."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY_CLIENT, dsn(url)], stderr=subprocess.DEVNULL
    ) as process:
        yield
        process.kill()


def wheel_binaries() -> Path:
    return find_binaries(None)


def postmaster(folder: Path) -> int:
    return int((folder / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def assert_kept(url: str) -> None:
    assert query(url, "SELECT * FROM kept") == [("this row",)]


def query(url: str, statement: str, *values: object) -> list[tuple[object, ...]]:
    async def run() -> list[tuple[object, ...]]:
        async with connected(url) as connection:
            return [tuple(row) for row in await connection.fetch(statement, *values)]

    return asyncio.run(run())
