"""What runs chatterd on a server: systemd's units, and the restart of one after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio
import httpx2
import pytest

from tests.load import Load
from tests.multipart import encode, fields, form_type, image
from tests.process import DEADLINE_SECONDS, ROOT, Server, open_folder
from tests.samples import JPEG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.multipart import Connection

DEPLOY = ROOT / "deploy"
PROGRAM = "/opt/chatterd/.venv/bin/chatterd"


# --- Units


ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="this machine has no systemd")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for unit in (DEPLOY / "systemd").iterdir():
        # systemd looks whether the program is there.
        text = unit.read_text().replace(PROGRAM, sys.executable)
        (tmp_path / unit.name.replace("@", "@1")).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    assert [Path(unit).name for unit in units] == ["chatterd.target", "chatterd@1.service"]
    done = subprocess.run(
        [ANALYZE or "", "verify", *units],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# As MemoryDenyWriteExecute= has it: nothing may be made executable that was writable.
PR_SET_MDWE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(65, 1, 0, 0, 0) != 0:
    raise SystemExit("no MDWE")
from chatterd.cli import main
main()
"""


def test_pictures_are_decoded_where_no_memory_may_be_made_executable(
    tmp_path: Path, own_database: str
) -> None:
    if subprocess.run([sys.executable, "-c", PR_SET_MDWE, "--version"], check=False).returncode:
        pytest.skip("only Linux 6.3 and newer can be told so")
    with Server(tmp_path, program=("-c", PR_SET_MDWE), DATABASE_URL=own_database) as server:
        form = encode(*fields(), image(JPEG))
        answer = httpx2.post(f"{server.url}/postimages", content=form, headers=form_type())
        assert answer.status_code == 200
        url = httpx2.get(f"{server.url}/getimages").json()[-1][4]
        thumbnail = httpx2.get(f"{url}?thumb", timeout=60)
        assert thumbnail.headers["content-type"] == "image/webp"
        assert server.stop() == 0


# --- One after the other


STUB = """\
#!/bin/sh
if [ "$1" = list-units ]; then
  echo 'chatterd@1.service loaded active running chatterd, the back end of Chatter (1)'
  echo 'chatterd@2.service loaded active running chatterd, the back end of Chatter (2)'
else
  echo "$1 $2" >"$STUB/asked"
  read -r status <"$STUB/done"
  exit "$status"
fi
"""


class Systemctl:
    """Two instances and, in the place of systemctl, what restarts them when it is asked to."""

    def __init__(self, folder: Path, start: Callable[..., Server]) -> None:
        self._folder = folder
        self._start = start
        self.asked: list[str] = []
        self.statuses: dict[str, str] = {}
        """What it exits with, if not with 0."""
        self.settings: dict[str, dict[str, str]] = {}
        """What an instance is started with the next time."""
        self.instances = {name: start(name) for name in ("1", "2")}
        (folder / "systemctl").write_text(STUB)
        (folder / "systemctl").chmod(0o755)
        for name in ("asked", "done"):
            os.mkfifo(folder / name)

    def answer(self) -> None:
        """Do what is asked until an empty line comes."""
        while question := (self._folder / "asked").read_text().strip():
            self.asked.append(question)
            name = question.removeprefix("restart chatterd@").removesuffix(".service")
            status = self.statuses.get(name, "0")
            if status == "0":
                assert self.instances[name].stop() == 0
                self.instances[name] = self._start(name, **self.settings.get(name, {}))
            (self._folder / "done").write_text(f"{status}\n")

    def stop(self) -> None:
        (self._folder / "asked").write_text("\n")

    def rolling_restart(self, *instances: str, **variables: str) -> Done:
        done = subprocess.run(
            [DEPLOY / "rolling-restart", *instances],
            env={
                "PATH": f"{self._folder}:{os.environ['PATH']}",
                "STUB": str(self._folder),
                "RUN_FOLDER": str(self._folder),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=3 * DEADLINE_SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)


class Done(NamedTuple):
    status: int
    said: str
    complained: str


@pytest.fixture
def systemctl(own_database: str) -> Iterator[Systemctl]:
    with open_folder() as folder, ExitStack() as stack:

        def start(name: str, **settings: str) -> Server:
            (folder / f"instance-{name}").mkdir(exist_ok=True)
            return stack.enter_context(
                Server(
                    folder / f"instance-{name}",
                    "--uds",
                    str(folder / f"{name}.sock"),
                    DATABASE_URL=own_database,
                    **settings,
                )
            )

        with answering(Systemctl(folder, start)) as systemctl:
            yield systemctl
            assert all(one.stop() == 0 for one in systemctl.instances.values())


@contextmanager
def answering(systemctl: Systemctl) -> Iterator[Systemctl]:
    thread = threading.Thread(target=systemctl.answer)
    thread.start()
    try:
        yield systemctl
    finally:
        systemctl.stop()
        thread.join()


async def test_a_rolling_restart_restarts_all_that_run_without_a_failed_request(
    systemctl: Systemctl, psql: Connection
) -> None:
    before = {name: one.pid for name, one in systemctl.instances.items()}
    urls = [one.url for one in systemctl.instances.values()]
    async with Load(*urls).going_on(8) as load:
        await load.more(50)
        done = await anyio.to_thread.run_sync(systemctl.rolling_restart)
        await load.more(50)
    assert done == (0, "chatterd@1 is ready\nchatterd@2 is ready\n", "")
    assert systemctl.asked == ["restart chatterd@1.service", "restart chatterd@2.service"]
    assert not set(before.values()) & {one.pid for one in systemctl.instances.values()}
    assert load.failed == []
    rows = await psql.fetch("SELECT message FROM chatts")
    assert sorted(row["message"] for row in rows) == sorted(load.posted)


def test_a_rolling_restart_ends_at_the_first_that_is_not_ready(systemctl: Systemctl) -> None:
    systemctl.settings["2"] = {"MEDIA_FREE_FLOOR": str(2**50)}  # no disk has so much
    done = systemctl.rolling_restart("2", "1", READY_SECONDS="1")
    assert (done.status, done.said) == (1, "")
    assert "chatterd@2 is not ready after 1 seconds" in done.complained
    systemctl.statuses["2"] = "1"
    done = systemctl.rolling_restart("2", "1")
    assert (done.status, done.said) == (1, "")
    assert "chatterd@2 did not start" in done.complained
    assert systemctl.asked == ["restart chatterd@2.service"] * 2
