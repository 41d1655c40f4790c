"""`chatterd doctor`: what it prints, and the checks that need no database."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url

from chatterd import settings
from chatterd.database import migrate
from chatterd.doctor import Finding
from chatterd.doctor.checks import Wishes, examine
from chatterd.doctor.configuration import NAMES
from chatterd.doctor.running import processes_here, processes_of, server_check
from chatterd.embedded import postgres
from chatterd.embedded_home import EmbeddedPostgresError
from tests.conftest import connected
from tests.doctor import alone
from tests.media_folder import Store, name_it
from tests.process import ROOT, environment, open_folder, run, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.process import Server

MOUNT, UMOUNT = "/usr/bin/mount", "/usr/bin/umount"
CHECKS = [
    "settings",
    "server",
    "database",
    "privileges",
    "schema",
    "durability",
    "locks",
    "tables",
    "lag",
    "clock",
    "connections",
    "disk",
    "media",
    "nginx",
    "certificate",
]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A server's folder: its database runs, and a chatt names the one picture."""
    with open_folder() as folder:
        store = Store(folder / "var" / "media")
        key = store.store(b"picture")
        with postgres(folder / "var") as url:
            migrate(make_url(url))
            asyncio.run(post(url, key))
            yield folder


async def post(url: str, key: str) -> None:
    async with connected(url) as connection:
        await name_it(connection, key)


def doctor(folder: Path, *options: str, **given: str) -> dict[str, Any]:
    """Run it on one process; return what it says, by check: the first finding of each."""
    given = {"MEDIA_FREE_FLOOR": "0"} | given
    options = ("--json", "--processes", "1", *options)
    done = run(folder, "doctor", *options, **given)
    assert done.stderr == "", done
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["healthy"] else 1)
    assert report["healthy"] == all(each["level"] != "fault" for each in report["checks"])
    for each in report["checks"]:
        assert bool(each["mend"]) == (each["level"] != "ok"), each
    found: dict[str, Any] = {"skipped": report["skipped"]}
    for each in report["checks"]:
        found.setdefault(each["check"], each)
    return found


def test_one_screen_says_that_all_is_well(home: Path) -> None:
    done = run(home, "doctor", "--processes", "2", MEDIA_FREE_FLOOR="0")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert [line.split()[1] for line in lines if not line.startswith(" ")] == CHECKS
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == {"ok"}
    assert "\033" not in done.stdout
    assert list(doctor(home)) == ["skipped", *CHECKS]


def test_the_help_names_each_check_in_order(tmp_path: Path) -> None:
    text = run(tmp_path, "doctor", "--help").stdout
    places = [text.index(f"\n  {check} ") for check in CHECKS]
    assert places == sorted(places)


def test_a_terminal_gets_colours_unless_it_wants_none(home: Path) -> None:
    command = [sys.executable, "-m", "chatterd", "doctor", "--processes", "1"]
    for wish, is_coloured in ({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False):
        ours, theirs = pty.openpty()
        given = environment(home, MEDIA_FREE_FLOOR="0", **wish)
        subprocess.run(command, cwd=home, env=given, stdout=theirs, check=True)
        os.close(theirs)
        said = os.read(ours, 65536)
        os.close(ours)
        assert said.startswith(
            b"\033[32mok     \033[0m  settings" if is_coloured else b"ok       s"
        )
        assert (b"\033" in said) is is_coloured


def test_what_is_wrong_comes_with_how_to_mend_it_below(home: Path) -> None:
    done = run(home, "doctor", MEDIA_ROOT="gone", PUBLIC_URL="https://x.example", ROOT_PATH="/y")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("fault    disk"))
    assert "is not there" in " ".join(" ".join(lines[at : at + 2]).split())
    assert any(
        line.startswith("                       sudo install -d") for line in lines[at : at + 8]
    )
    assert "fault    settings    PUBLIC_URL ends in no path, ROOT_PATH is /y" in lines[0]


def test_words_from_elsewhere_do_not_rule_the_terminal() -> None:
    text = Finding("fault", "a\033[2Jb", "c\rd", ("e\ng",)).text("nginx")
    assert "\033" not in text
    assert "\r" not in text
    assert text.count("\n") == 3


def test_without_a_server_the_database_is_started_as_it_is_and_stopped() -> None:
    with open_folder() as folder:
        Store(folder / "var" / "media")
        with postgres(folder / "var", options=["fsync=off"]):
            pass
        found = doctor(folder)
        assert found["database"]["level"] == "ok"
        assert "revision none" in found["schema"]["found"]  # it does not migrate either
        assert found["skipped"] == ["media"]
        assert running(folder) == []


def test_a_folder_without_a_database_is_the_wrong_one(tmp_path: Path) -> None:
    found = doctor(tmp_path)
    assert found["database"]["level"] == "fault"
    assert "server's folder" in found["database"]["mend"]
    assert "lag" not in found
    assert found["certificate"]["level"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_without_its_database_the_rest_is_looked_at(tmp_path: Path) -> None:
    url = "postgresql://chatter:geheim@127.0.0.1:1/chatter"
    given = {"DATABASE_URL": url, "MEDIA_ROOT": str(tmp_path), "MEDIA_FREE_FLOOR": "0"}
    done = run(tmp_path, "doctor", **given)
    assert (done.returncode, done.stderr) == (1, "")
    assert "fault    database    chatter at 127.0.0.1:1 does not answer" in done.stdout
    assert "ok       disk" in done.stdout
    assert "geheim" not in done.stdout
    last = done.stdout.partition("Not looked at before that is mended: ")[2]
    assert last == f"{', '.join([*CHECKS[3:11], 'media'])}.\n"


def test_a_setting_that_cannot_be_used_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    found = doctor(tmp_path, NAME_MAX_LENGTH="many")
    assert found["settings"] == {
        "check": "settings",
        "level": "fault",
        "found": "NAME_MAX_LENGTH is 'many', which is no whole number.",
        "mend": "It must be a number of characters, 1 to 10000.",
        "commands": [],
    }


async def test_a_check_that_does_not_end_or_cannot_begin_is_a_warning(tmp_path: Path) -> None:
    pipe, latin, gone = (tmp_path / name for name in ("pipe", "latin", "gone"))
    os.mkfifo(pipe)
    latin.write_bytes(b"server_name b\xfcro.example;")
    for path, words in (
        (pipe, "took longer than 0.1 s"),
        (latin, "utf-8"),
        (gone, f"{gone}: No such file"),
        (tmp_path, "Is a directory"),
    ):
        seconds = 0.1 if path == pipe else 10.0
        wishes = Wishes(nginx=path, timeout_seconds=seconds)
        way = EmbeddedPostgresError("there is none: make one")
        found = {name: finding async for name, finding in examine(way, None, wishes)}
        finding = found["nginx"]
        assert finding is not None
        assert finding.level == "warning"
        assert words in finding.found
    pipe.open("w").close()  # whoever waits for it may go


async def test_a_fault_of_a_check_is_told_and_logged_and_stops_no_other(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "deep.conf").write_text("a {" * 10_000)
    (tmp_path / "all.conf").write_text(f"include {tmp_path}/deep.conf;")
    way = EmbeddedPostgresError("there is none: make one")
    wishes = Wishes(nginx=tmp_path / "all.conf")
    found = {name: finding async for name, finding in examine(way, None, wishes)}
    for check in "nginx", "certificate":
        finding = found[check]
        assert finding is not None
        assert finding.level == "warning"
        assert "recursion" in finding.found
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


def test_all_media_are_read_where_that_is_wished(home: Path) -> None:
    (picture,) = (home / "var" / "media").glob("*.jpeg")
    right = picture.read_bytes()
    try:
        picture.write_bytes(b"x")
        found = doctor(home, "--media")
        assert found["media"]["level"] == "fault"
        assert f"damaged, such as {picture.name}" in found["media"]["found"]
        assert found["media"]["commands"] == ["chatterd media doctor"]
    finally:
        picture.write_bytes(right)
    assert "all 1 files" in doctor(home, "--media")["media"]["found"]


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "chatterd", "doctor"]
    given = environment(tmp_path)
    with open(writing, "wb") as output:  # noqa: PTH123 - a descriptor
        done = subprocess.run(
            command, cwd=tmp_path, env=given, stdout=output, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (141, b"")


# The checks alone, with settings of their own


SETTINGS = ("configuration", "settings_check")
DISK = ("files", "disk_check", None)


def levels(findings: list[Finding]) -> dict[str, str]:
    """Each finding's words with its level; each must say how to mend it."""
    assert all(bool(finding.mend) == (finding.level != "ok") for finding in findings)
    return {finding.found: finding.level for finding in findings}


def level_of(findings: list[Finding], *words: str) -> str:
    (level,) = [
        level for found, level in levels(findings).items() if all(word in found for word in words)
    ]
    return level


def test_names_that_look_like_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MEDIA_MAXSIZE=1\npublic_url=x\nPOSTGRES_PASSWORD=x\n")
    given = {"ALLOWED_HOST": "x", "DATABASE_NAME": "x", "LANG": "C"}
    (findings,) = alone(tmp_path, SETTINGS, given)
    assert [finding.level for finding in findings] == ["warning"] * 3
    for wrong, right in (
        ("MEDIA_MAXSIZE in .env", "MEDIA_MAX_SIZE"),
        ("public_url in .env", "PUBLIC_URL"),
        ("ALLOWED_HOST in the environment", "ALLOWED_HOSTS"),
    ):
        (finding,) = (each for each in findings if wrong in each.found)
        assert right in finding.mend


def test_every_setting_is_known() -> None:
    example = (ROOT / ".env.example").read_text()
    assert sorted(NAMES) == sorted(re.findall("^([A-Z_]+)=", example, re.MULTILINE))


DISAGREEING: tuple[tuple[dict[str, str], str, str], ...] = (
    ({"PUBLIC_URL": "https://a.example/x"}, "fault", "PUBLIC_URL ends in /x"),
    ({"PUBLIC_URL": "https://a.example", "ROOT_PATH": "/x"}, "fault", "ROOT_PATH is /x"),
    ({"PUBLIC_URL": "http://a.example"}, "warning", "PUBLIC_URL is http"),
    ({"PUBLIC_URL": "https://a.example"}, "warning", "ALLOWED_HOSTS is *"),
    (
        {"PUBLIC_URL": "https://a.example", "ALLOWED_HOSTS": "b.example,*.example.org"},
        "fault",
        "ALLOWED_HOSTS has no a.example",
    ),
    ({"TRUSTED_PROXIES": "0.0.0.0/0"}, "fault", "anybody may say"),
    ({"TRUSTED_PROXIES": "unix,::/0"}, "fault", "anybody may say"),
    ({"TRUSTED_PROXIES": "12.0.0.0/7"}, "warning", "so many may say"),
    ({"METRICS_ALLOWED": "0.0.0.0/0"}, "warning", "so many may read"),
)


def test_settings_that_disagree_are_found(tmp_path: Path) -> None:
    found = alone(tmp_path, SETTINGS, *(given for given, _, _ in DISAGREEING))
    for findings, (given, level, words) in zip(found, DISAGREEING, strict=True):
        assert level_of(findings, words) == level, given


def test_settings_that_go_together_are_well(tmp_path: Path) -> None:
    found = alone(
        tmp_path,
        SETTINGS,
        {},
        {"PUBLIC_URL": "http://192.168.1.2:8000", "ALLOWED_HOSTS": "192.168.1.2"},
        {"PUBLIC_URL": "http://localhost:8000", "ALLOWED_HOSTS": "localhost"},
        {"PUBLIC_URL": "https://a.example/x", "ROOT_PATH": "/x", "ALLOWED_HOSTS": "*.example"},
        {"TRUSTED_PROXIES": "unix,10.0.0.0/8,fd00::/32", "METRICS_ALLOWED": "10.0.0.0/8"},
    )
    assert [set(levels(findings).values()) for findings in found] == [{"ok"}] * 5


def test_a_password_that_everybody_may_read_is_found(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://chatter:geheim@localhost/chatter\n")
    (tmp_path / ".env").chmod(0o644)
    ((finding,),) = alone(tmp_path, SETTINGS, {})
    assert finding.level == "warning"
    assert "password" in finding.found
    assert "geheim" not in str(finding)
    subprocess.run(finding.commands[0], shell=True, cwd=tmp_path, check=True)  # noqa: S602 - as it is to be given
    ((finding,),) = alone(tmp_path, SETTINGS, {})
    assert finding.level == "ok"
    assert "1 from" in finding.found


def test_a_folder_that_is_missing_and_a_disk_below_its_limits_are_found(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a").write_bytes(bytes(95_000))
    given = {"MEDIA_ROOT": str(root), "MEDIA_FREE_FLOOR": "0", "MEDIA_MAX_SIZE": "1000"}
    cases = (
        (given, "ok", "free for"),
        ({"MEDIA_ROOT": str(tmp_path / "gone")}, "fault", "is not there"),
        (given | {"MEDIA_FREE_FLOOR": str(2**50)}, "fault", "uploads get 507"),
        (given | {"MEDIA_TOTAL_SIZE": "95999"}, "fault", "uploads get 507"),
        (given | {"MEDIA_TOTAL_SIZE": "100000"}, "warning", "of MEDIA_TOTAL_SIZE"),
        (given | {"MEDIA_TOTAL_SIZE": str(2**50)}, "warning", "limits nothing"),
    )
    found = alone(tmp_path, DISK, *(case for case, _, _ in cases))
    for findings, (case, level, words) in zip(found, cases, strict=True):
        assert level_of(findings, words) == level, case


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB with room for 40 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [MOUNT, "-t", "tmpfs", "-o", "size=4m,nr_inodes=40", "chatterd-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("only root may mount a disk, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run([UMOUNT, "--lazy", str(folder)], check=True)


def test_a_small_disk_and_one_that_is_read_only_are_found(small_disk: Path) -> None:
    given = {"MEDIA_ROOT": str(small_disk), "MEDIA_FREE_FLOOR": str(2**21)}
    (findings,) = alone(ROOT, DISK, given)
    assert level_of(findings, "all uploads that are taken at once need 1.2 GiB") == "warning"
    assert level_of(findings, "has room for", "more files") == "fault"
    (small_disk / "much").write_bytes(bytes(2**21 + 1))
    subprocess.run([MOUNT, "-o", "remount,ro", str(small_disk)], check=True)
    (findings,) = alone(ROOT, DISK, given)
    assert level_of(findings, "uploads get 507") == "fault"
    assert level_of(findings, "is read-only") == "fault"


@contextmanager
def answering(status: int, ready: object, limits: object) -> Iterator[str]:
    """What answers like a server that is in this state."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_ready = self.path == "/readyz"
            self.send_response(status if is_ready else 200)
            self.end_headers()
            self.wfile.write(json.dumps(ready if is_ready else limits).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "ready", "limits", "level", "words"),
    [
        (
            200,
            {"status": "ok"},
            {"name_max_length": settings.NAME_MAX_LENGTH, "new": 1},
            "ok",
            "ready at",
        ),
        (200, {"status": "ok"}, {"name_max_length": 7}, "warning", "NAME_MAX_LENGTH=7"),
        (
            503,
            {"detail": "Not ready: the disk is full."},
            {},
            "fault",
            "not ready: the disk is full.",
        ),
        (503, ["?"], {}, "fault", "is not ready"),
        (404, {}, {}, "warning", "/readyz with 404"),
    ],
)
async def test_what_a_server_says_of_itself_is_found(
    status: int, ready: object, limits: object, level: str, words: str
) -> None:
    with answering(status, ready, limits) as url:
        (finding,) = await server_check(url)
    assert finding.level == level
    assert words in finding.found


async def test_a_server_is_found_ready(server: Server) -> None:
    (finding,) = await server_check(server.url)
    assert (finding.level, finding.found) == ("ok", f"ready at {server.url}")


async def test_a_server_that_is_named_and_does_not_answer_is_a_fault(tmp_path: Path) -> None:
    for address in "http://127.0.0.1:1", f"unix:{tmp_path}/1.sock":
        (finding,) = await server_check(address)
        assert finding.level == "fault"
        assert "does not answer" in finding.found


def test_processes_are_counted_by_their_command_lines(tmp_path: Path) -> None:
    python, script = "/opt/chatterd/.venv/bin/python", "/opt/chatterd/.venv/bin/chatterd"
    for words, count in (
        ([python, script, "serve"], 1),
        ([python, "-m", "chatterd", "serve", "--uds", "/run/chatterd/1.sock"], 1),
        ([python, script, "serve", "--workers", "3"], 3),
        ([python, script, "serve", "--workers=4"], 4),
        ([python, script, "serve", "--fd", "3"], 0),
        ([python, script, "doctor"], 0),
        (["vim", "chatterd"], 0),
        ([], 0),
    ):
        assert processes_of([words]) == count, words
    (tmp_path / "chatterd").write_text("import sys; print(flush=True); sys.stdin.read()")
    command = [sys.executable, str(tmp_path / "chatterd"), "serve", "--workers", "5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes_here() >= 5  # others may serve here as well
