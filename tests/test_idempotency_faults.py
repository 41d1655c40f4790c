"""A key posts once, whatever is killed while it is tried: its answer, its row and its files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest
from sqlalchemy.engine import make_url

from chatterd.database import Database
from chatterd.media_sweep import Sweep
from tests.live import Cut, connect
from tests.multipart import encode, fields, form_type, image, kept, video
from tests.samples import longer_jpeg, longer_mp4
from tests.test_media_crash import forking_servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import asyncpg

    from tests.conftest import StartServer
    from tests.live import Answer, Line
    from tests.multipart import Connection
    from tests.test_media_crash import Forked

KEYS, CLIENTS, KILLS = 1_000, 12, 15
MEDIA_BYTES = 20_000
PATIENCE_SECONDS = 20
SEED = 20261121


class Draft(NamedTuple):
    """A post, as a client sends it again and again until it is answered."""

    number: int

    @property
    def message(self) -> str:
        return f"number {self.number}"

    @property
    def is_form(self) -> bool:
        return self.number % 10 < 2 and self.number % 100 < 50

    @property
    def media(self) -> tuple[bytes, bytes] | None:
        """A picture and a video that no other draft has."""
        if not self.is_form:
            return None
        filling = self.number.to_bytes(4)
        return longer_jpeg(MEDIA_BYTES, filling), longer_mp4(MEDIA_BYTES, filling)

    @property
    def path(self) -> str:
        tutorials = "/postimages" if self.is_form else "/postchatt"
        return tutorials if self.number % 2 == 0 else "/v1/chatts"

    async def post(self, line: Line) -> Answer:
        headers = {"Idempotency_Key": f"key-{SEED}-{self.number}"}
        if self.media is None:
            body = json.dumps({"name": "ann", "message": self.message}).encode()
        else:
            picture, movie = self.media
            body = encode(*fields("ann", self.message), image(picture), video(movie))
            headers["Content_Type"] = form_type()["Content-Type"]
        return await line.ask("POST", self.path, body, **headers)


class Outcome(NamedTuple):
    """What a client keeps of an answer."""

    status: int
    body: bytes
    token: str
    location: str

    @classmethod
    def of(cls, answer: Answer) -> Outcome:
        if answer.status == 200:
            assert answer.body == b"{}"
            token = answer.headers["chatterd-delete-token"]
        else:
            assert answer.status == 201, answer
            token = answer.json["delete_token"]
            assert answer.headers["location"] == f"/v1/chatts/{answer.json['id']}"
        return cls(answer.status, answer.body, token, answer.headers["location"])


class Servers:
    """Two servers on one database and one media folder, of which one is killed again and again."""

    def __init__(self, steady: str, start: Callable[[], Forked]) -> None:
        self._start = start
        self._mortal = start()
        self._steady = steady

    async def restart(self) -> None:
        """Kill one server, and start another in its place at once."""
        self.kill()
        self._mortal = await asyncio.to_thread(self._start)

    def kill(self) -> None:
        os.kill(self._mortal.pid, signal.SIGKILL)

    @property
    def urls(self) -> list[str]:
        return [self._steady, self._mortal.url]


@contextmanager
def two_servers(folder: Path, start_server: StartServer, **settings: str) -> Iterator[Servers]:
    with forking_servers(folder, **settings) as start:
        servers = Servers(start_server(**settings).url, start)
        try:
            yield servers
        finally:
            servers.kill()


class Phone:
    """Posts one draft after the other, each until it has been answered, whatever happens."""

    def __init__(self, servers: Servers, chance: random.Random) -> None:
        self._servers = servers
        self._chance = chance
        self.retries: dict[str, int] = {"cut": 0, "409": 0, "503": 0}

    async def post(self, draft: Draft) -> Outcome:
        with anyio.fail_after(PATIENCE_SECONDS):
            while True:
                answer = await self._try(draft)
                if answer is not None:
                    return Outcome.of(answer)
                await asyncio.sleep(self._chance.random() * 0.05)  # a phone waits before it retries

    async def _try(self, draft: Draft) -> Answer | None:
        """Return the answer unless the draft is to be sent again."""
        url = self._chance.choice(self._servers.urls)
        with suppress(Cut, OSError):
            # A phone waits for an answer only so long, and asks again while the first is at work.
            async with (
                asyncio.timeout(self._chance.choice([0.01, 0.05, 5])),
                connect(url) as line,
            ):
                answer = await draft.post(line)
            if answer.status not in {409, 503}:
                return answer
            assert "retry-after" in answer.headers
            self.retries[str(answer.status)] += 1
            return None
        self.retries["cut"] += 1
        return None


@pytest.mark.timeout(180)
async def test_a_key_posts_once_whatever_is_killed_meanwhile(
    own_database: str, psql: Connection, start_server: StartServer, tmp_path: Path
) -> None:
    chance = random.Random(SEED)  # noqa: S311 - no secret
    media = tmp_path / "media"
    media.mkdir()
    settings = {
        "DATABASE_URL": own_database,
        "MEDIA_ROOT": str(media),
        "PUBLIC_URL": "http://chatter.example",
    }
    outcomes: dict[int, Outcome] = {}
    with two_servers(tmp_path, start_server, **settings) as servers:
        phones = [Phone(servers, random.Random(chance.random())) for _ in range(CLIENTS)]  # noqa: S311 - no secret
        drafts = iter([Draft(number) for number in range(KEYS)])

        async def post_all(phone: Phone) -> None:
            for draft in drafts:
                outcomes[draft.number] = await phone.post(draft)

        async with asyncio.TaskGroup() as group:
            for phone in phones:
                group.create_task(post_all(phone))
            group.create_task(kill_again_and_again(servers, outcomes, chance))
        assert sum(phone.retries["cut"] for phone in phones) > KILLS
        rows = await psql.fetch("SELECT id::text, message, image, video FROM chatts")
        assert sorted(row["message"] for row in rows) == sorted(
            Draft(number).message for number in range(KEYS)
        )
        await files_are_those_of(rows, own_database, media)
        numbers = list(outcomes)
        async with asyncio.TaskGroup() as group:
            for place, url in enumerate(servers.urls * 4):
                group.create_task(ask_again(url, {n: outcomes[n] for n in numbers[place::8]}))
    assert await psql.fetchval("SELECT count(*) FROM chatts WHERE NOT deleted") == 0
    assert await psql.fetchval("SELECT count(*) FROM chatts") == KEYS


async def kill_again_and_again(
    servers: Servers, outcomes: dict[int, Outcome], chance: random.Random
) -> None:
    """Kill one server at random moments of the whole run."""
    for enough in sorted(chance.sample(range(KEYS), KILLS)):
        while len(outcomes) < enough:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0.001)
        await asyncio.sleep(chance.random() * 0.02)  # at any moment of a request
        await servers.restart()


async def ask_again(url: str, outcomes: dict[int, Outcome]) -> None:
    """Check that each key is answered as it was, and that its token deletes its chatt."""
    async with connect(url) as line:
        for number, outcome in outcomes.items():
            answer = await Draft(number).post(line)
            assert Outcome.of(answer) == outcome
            assert answer.headers["idempotency-replayed"] == "true"
            for token, status in ((outcome.token[::-1], 403), (outcome.token, 204)):
                deletion = await line.ask("DELETE", outcome.location, Chatterd_Delete_Token=token)
                assert deletion.status == status, deletion
            # Whoever missed all of it posts no second chatt.
            assert Outcome.of(await Draft(number).post(line)) == outcome


async def files_are_those_of(rows: Sequence[asyncpg.Record], url: str, media: Path) -> None:
    """Check that each chatt has its own files, and that a sweep leaves no others."""
    for row in rows:
        expected = Draft(int(row["message"].rpartition(" ")[2])).media or ()
        keys = [key for key in (row["image"], row["video"]) if key is not None]
        assert [key.partition(".")[0] for key in keys] == [
            hashlib.sha256(data).hexdigest() for data in expected
        ]
    database = Database(make_url(url))
    try:
        await Sweep(database, media, 0, delete=True).run()
    finally:
        await database.aclose()
    named = {key for row in rows for key in (row["image"], row["video"]) if key is not None}
    assert kept(media).keys() == named
