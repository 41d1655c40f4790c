"""A real `chatterd serve` process, as the tests start it."""

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

STOP_SECONDS = 20


class Server:
    """A running server in a working directory of its own.

    `settings` are environment variables, `options` further arguments of `serve`. With no
    DATABASE_URL among the settings it runs its embedded database.
    """

    def __init__(self, folder: Path, *options: str, **settings: str) -> None:
        self.folder = folder
        self.media = Path(settings.get("MEDIA_ROOT", folder / "var" / "media"))
        self._log = (folder / "stderr").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chatterd", "serve", "--port", "0", *options],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)} | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout is not None
        self.greeting = [self.process.stdout.readline().rstrip("\n") for _ in range(3)]
        if not self.greeting[2]:
            self.kill()
            raise RuntimeError(f"The server did not start: {self.log}")
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
