"""The `chatterd` command: its help, its exits, and `migrate`."""

import re
import shutil
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import alembic
import pytest
from sqlalchemy.engine import URL

from tests.conftest import connected
from tests.process import ROOT, assert_refused, run

if TYPE_CHECKING:
    from tests.multipart import Connection

OPTIONS = {
    (): {
        *("--help", "--version", "serve", "migrate", "doctor"),
        *("media", "nginx", "backup", "restore"),
    },
    ("serve",): {
        "--help",
        "--host",
        "--port",
        "--certfile",
        "--keyfile",
        "--reload",
        "--uds",
        "--workers",
    },
    ("migrate",): {"--help"},
    ("doctor",): {
        "--help",
        "--json",
        "--media",
        "--nginx",
        "--certificate",
        "--url",
        "--processes",
        "--timeout",
    },
    ("media",): {"--help", "doctor", "sweep"},
    ("media", "doctor"): {"--help", "--json"},
    ("media", "sweep"): {"--help", "--older-than", "--delete"},
    ("nginx",): {
        *("--help", "--server-name", "--upstream", "--certificate", "--certificate-key"),
        *("--port", "--http-port"),
    },
    ("backup",): {"--help", "FILE", "verify FILE"},
    ("restore",): {"--help", "FILE"},
}


@pytest.fixture
async def db(empty_database: str) -> AsyncIterator["Connection"]:
    async with connected(empty_database) as connection:
        yield connection


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: " ".join(command) or "chatterd")
def test_help_names_every_option(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(tmp_path, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", done.stdout))
    assert {word for word in OPTIONS[command] if word.startswith("-")} <= named
    for word in OPTIONS[command]:
        assert word in done.stdout
    # Nothing is written that cannot be given.
    known = set().union(*OPTIONS.values())
    assert named <= known


def test_help_says_what_the_defaults_are(tmp_path: Path) -> None:
    help_text = run(tmp_path, "serve", "--help").stdout
    assert "127.0.0.1" in help_text
    assert "8000" in help_text


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("--version",)])
def test_help_needs_no_usable_settings(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / ".env").write_bytes(b"NAME_MAX_LENGTH=many\n\xff\xff")
    done = run(tmp_path, *arguments, DATABASE_URL="mysql://", MEDIA_ROOT=str(tmp_path / ".env"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_version_is_that_of_the_package(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"chatterd {version('chatterd')}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("sevre",), "'sevre'"),
        (("serve", "--prot", "1"), "--prot"),
        (("serve", "extra"), "extra"),
        (("serve", "--port"), "--port"),
        (("serve", "--port", "http"), "'http'"),
        (("serve", "--port", "65536"), "0 to 65535"),
        (("serve", "--port=-1"), "0 to 65535"),
        (("nginx", "--upstream", "/run/x.sock"), "unix:/path/of/socket"),
        (("serve", "--port", "٨٠"), "0 to 65535"),
        (("serve", "--port", "80.0"), "0 to 65535"),
        (("migrate", "--port", "1"), "--port"),
        (("doctor", "--processes", "0"), "1 to 99999"),
        (("doctor", "--timeout", "100000"), "1 to 99999"),
        (("doctor", "--timeout", "1.5"), "'1.5'"),
        (("media",), "COMMAND"),
        (("media", "swep"), "'swep'"),
        (("media", "doctor", "--delete"), "--delete"),
        (("media", "sweep", "--older-than"), "--older-than"),
        (("media", "sweep", "--older-than", "1h"), "'1h'"),
        (("media", "sweep", "--older-than=-1"), "'-1'"),
        (("media", "sweep", "--older-than", "1234567890"), "0 to 999999999"),
        (("backup",), "FILE"),
        (("backup", "verify"), "./verify"),
        (("backup", "a.tar", "b.tar"), "verify FILE"),
        (("backup", "verify", "a.tar", "b.tar"), "verify FILE"),
        (("restore",), "FILE"),
        (("restore", "a.tar", "b.tar"), "b.tar"),
    ],
)
def test_a_wrong_call_is_status_2_and_says_what_was_wrong(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: chatterd")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_migrate_makes_the_schema_and_a_second_time_changes_nothing(
    tmp_path: Path, empty_database: str
) -> None:
    first, second = (run(tmp_path, "migrate", DATABASE_URL=empty_database) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert re.fullmatch(r"The schema is at revision [0-9a-f]+\.\n", first.stdout)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert list(tmp_path.iterdir()) == []


def test_migrate_works_where_a_wheel_is_installed(tmp_path: Path, empty_database: str) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "chatterd", site / "chatterd")
    # As pyproject.toml has it, beside the library of that name.
    shutil.copytree(ROOT / "alembic", site / "chatterd" / "migrations")
    (site / "alembic").symlink_to(Path(alembic.__file__).parent)
    done = run(tmp_path, "migrate", DATABASE_URL=empty_database, PYTHONPATH=str(site))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"The schema is at revision [0-9a-f]+\.\n", done.stdout)


async def test_migrate_adopts_a_tutorials_table_and_prints_each_repair(
    tmp_path: Path, empty_database: str, db: "Connection"
) -> None:
    await db.execute("CREATE TABLE chatts (username text, message text, id uuid, time timestamptz)")
    await db.execute("INSERT INTO chatts VALUES ('ann', 'kept', gen_random_uuid(), now())")
    await db.execute("INSERT INTO chatts VALUES (NULL, 'nameless', gen_random_uuid(), now())")
    await db.execute("INSERT INTO chatts VALUES ('bob', 'no id', NULL, now())")
    done = run(tmp_path, "migrate", DATABASE_URL=empty_database)
    assert (done.returncode, done.stderr) == (0, "")
    *repairs, last = done.stdout.splitlines()
    assert last.startswith("The schema is at revision ")
    assert len([line for line in repairs if "name" in line]) == 1
    assert len([line for line in repairs if "id" in line.split()]) == 1
    rows = await db.fetch("SELECT message FROM chatts ORDER BY seq")
    assert [message for (message,) in rows] == ["kept", "nameless", "no id"]


async def test_migrate_refuses_a_table_with_columns_of_its_own_and_leaves_it_alone(
    tmp_path: Path, empty_database: str, db: "Connection"
) -> None:
    await db.execute(
        "CREATE TABLE chatts (username text, message text, id uuid, time date, likes int)"
    )
    await db.execute("INSERT INTO chatts VALUES ('ann', 'hi', NULL, NULL, 3)")
    done = run(tmp_path, "migrate", DATABASE_URL=empty_database)
    assert_refused(done, "likes")
    rows = await db.fetch("SELECT * FROM chatts")
    assert [tuple(row) for row in rows] == [("ann", "hi", None, None, 3)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"database": "not_there"}, "not_there"),
        ({"username": "nobody_such", "password": "geheim"}, "nobody_such"),
        ({"host": "127.0.0.1", "port": 1, "query": {}}, "127.0.0.1"),
        ({"host": "chatterd.invalid", "port": 1, "query": {}}, "DATABASE_URL"),
    ],
    ids=["database", "role", "port", "host"],
)
def test_migrate_without_its_database_says_so_in_one_line(
    tmp_path: Path, postgres_url: URL, change: dict[str, object], word: str
) -> None:
    url = postgres_url.set(**change).render_as_string(hide_password=False)  # type: ignore[arg-type]
    done = run(tmp_path, "migrate", DATABASE_URL=url)
    assert_refused(done, word)
    assert "geheim" not in done.stderr
