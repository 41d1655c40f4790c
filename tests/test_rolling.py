"""Instances behind Nginx are restarted one by one under load, and nobody notices."""

from __future__ import annotations

import asyncio
import io
import json
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.live import Cut, connect, shown, timelines
from tests.multipart import encode, fields, form_type, image, until
from tests.nginx import Nginx
from tests.process import Server

if TYPE_CHECKING:
    from pathlib import Path

    from tests.live import Answer, Line
    from tests.multipart import Connection

ROUNDS, CONNECTIONS, STREAMS = 10, 32, 50
# What people leave between what they do, so that the load is not the machine's only work.
PAUSE_SECONDS = 0.1
CAUGHT_UP_SECONDS = 30


class Instance:
    """A server on a unix socket, again and again, as systemd runs it."""

    def __init__(self, folder: Path, number: int, database_url: str) -> None:
        self.socket = folder / f"{number}.sock"
        self._folder = folder / str(number)
        self._folder.mkdir()
        self._settings = {"DATABASE_URL": database_url, "MEDIA_ROOT": str(folder / "media")}
        self.start()

    def start(self) -> None:
        self._server = Server(self._folder, "--uds", str(self.socket), **self._settings)

    def close(self) -> None:
        self._server.close()

    async def restart(self) -> None:
        """Stop as `systemctl restart` does, and return when it answers again."""
        assert await asyncio.to_thread(self._server.stop) == 0, self._server.log
        await asyncio.to_thread(self.start)


class User:
    """Reads, posts and uploads in turn, on one connection. Nothing may go wrong."""

    def __init__(self, url: str, number: int) -> None:
        self._url = url
        self._number = number
        self._chance = random.Random(number)  # noqa: S311 - no secret
        self.posted: list[str] = []
        self.requests = 0
        self.failures: list[str] = []

    async def run(self, end: asyncio.Event) -> None:
        async with connect(self._url) as line:
            while not end.is_set():
                act = self._chance.choice((self._read, self._post, self._post, self._upload))
                self.requests += 1
                try:
                    answer = await act(line)
                except (Cut, ConnectionError) as error:
                    self.failures.append(f"{act.__name__}: {error!r}")
                    line.abort()
                    await line.open()
                else:
                    if answer.status not in {200, 201}:
                        self.failures.append(f"{act.__name__}: {answer.status} {answer.body!r}")
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self, line: Line) -> Answer:
        return await line.ask("GET", "/getimages?limit=50")

    async def _post(self, line: Line) -> Answer:
        body = json.dumps({"name": "ann", "message": self._message()}).encode()
        return self._noted(await line.ask("POST", "/v1/chatts", body))

    async def _upload(self, line: Line) -> Answer:
        form = encode(*fields("ann", self._message()), image(picture(self._chance)))
        headers = {"Content_Type": form_type()["Content-Type"]}
        return self._noted(await line.ask("POST", "/v1/chatts", form, **headers))

    def _message(self) -> str:
        return f"{self._number} {self.requests}"

    def _noted(self, answer: Answer) -> Answer:
        if answer.status == 201:
            self.posted.append(answer.json["id"])
        return answer


def picture(chance: random.Random) -> bytes:
    """Make a picture that is like no other."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), chance.randbytes(64 * 64 * 3)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.timeout(600)
async def test_ten_rolling_restarts_under_load_cost_no_request_no_post_and_no_event(
    own_database: str, psql: Connection, tmp_path: Path
) -> None:
    folder = tmp_path / "nginx"
    folder.mkdir()
    with ExitStack() as stack:
        instances = [Instance(tmp_path, number, own_database) for number in (1, 2)]
        for instance in instances:
            stack.callback(instance.close)
        upstreams = [f"unix:{instance.socket}" for instance in instances]
        nginx = stack.enter_context(Nginx(folder, *upstreams, media=tmp_path / "media"))
        users = [User(nginx.url, number) for number in range(CONNECTIONS)]
        end = asyncio.Event()
        async with timelines(nginx.url, "stream", STREAMS) as followers:
            async with asyncio.TaskGroup() as group:
                for user in users:
                    group.create_task(user.run(end))
                for _ in range(ROUNDS):
                    for instance in instances:
                        await instance.restart()
                end.set()
            stored = await shown(psql)
            messages = [
                row["message"]
                for row in await psql.fetch("SELECT message FROM chatts ORDER BY seq")
            ]
            async with asyncio.timeout(CAUGHT_UP_SECONDS):
                await until(
                    lambda: all(len(follower.order) >= len(messages) for follower in followers)
                )
    assert [failure for user in users for failure in user.failures] == []
    posted = [chatt_id for user in users for chatt_id in user.posted]
    assert sorted(posted) == sorted(stored)
    assert len(set(messages)) == len(messages) == len(posted)
    assert len(posted) > 10 * CONNECTIONS
    for follower in followers:
        assert follower.order == messages
        assert follower.resets == 0
        assert follower.connects > 1
