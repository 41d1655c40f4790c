"""Real processes: those of `chatterd`, as the tests start them, and those of PostgreSQL."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 20
DEADLINE_SECONDS = 30


def run(
    folder: Path, *arguments: str, program: str = "chatterd", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run `chatterd` (or another module) in a working directory until it ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=folder,
        env=environment(folder, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """What a program gets of ours: nothing but the settings that the test names, and little log."""
    ours = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    # Requests are logged where a test asks for it: most look into the log for what went wrong.
    return ours | {"LOG_LEVEL": "warning"} | settings


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check that the program ended with one line for the operator, which holds these words."""
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("chatterd: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n"), done.stderr
    for word in words:
        assert word in done.stderr


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that others may enter; remove it, and what a failed test left running in it.

    PostgreSQL works in it also when root runs the tests, whose tmp_path is closed to its account.
    """
    with tempfile.TemporaryDirectory(prefix="chatterd-test-") as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            for process in running(folder):
                process.kill()


def running(folder: Path) -> list[psutil.Process]:
    """Find the programs of PostgreSQL that work in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [process.cwd(), *process.cmdline()]
            if process.name() in {"postgres", "initdb"} and any(
                word.startswith(str(folder)) for word in words
            ):
                found.append(process)
        except psutil.Error:
            continue  # Gone meanwhile, or another user's.
    return found


class Server:
    """A running server in a working directory of its own.

    `settings` are environment variables, `options` further arguments of `serve`. With no
    DATABASE_URL among the settings it runs its embedded database. `program` is what Python runs.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        program: Sequence[str] = ("-m", "chatterd"),
        **settings: str,
    ) -> None:
        self.folder = folder
        self.media = Path(settings.get("MEDIA_ROOT", folder / "var" / "media"))
        self._log = (folder / "stderr").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", "0", *options],
            cwd=folder,
            env=environment(folder, **settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout is not None
        try:
            self.greeting = [self.process.stdout.readline().rstrip("\n") for _ in range(3)]
            assert self.greeting[2], f"the server did not start: {self.log}"
        except BaseException:  # a test's time-out among others: nothing stays behind
            self.kill()
            raise
        self.url = self.greeting[0].rpartition(" ")[2]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def stop(self) -> int:
        """Stop as `systemctl stop` does; return the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(STOP_SECONDS)
        finally:
            self.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_CLUSTER = """
import sys
from pathlib import Path
from chatterd.embedded import postgres
with postgres(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


class Cluster:
    """A PostgreSQL that a test may stop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = ""

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER, str(self._folder)],
            env=environment(self._folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        url = self._process.stdout.readline().strip()
        assert url in {url, self.url or url}
        self.url = url

    def stop(self) -> None:
        self._process.communicate(timeout=DEADLINE_SECONDS)
