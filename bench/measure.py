"""The measuring: programs in turn on one PostgreSQL, each alone under load."""

import gzip
import http.client
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy.engine import URL
from tqdm import tqdm

from bench import data, live, load, media, pictures, programs, uploads
from bench.load import Load, Run
from bench.peers.tutorial import SCHEMA
from bench.pictures import Form
from bench.programs import Program
from bench.scenarios import (
    FEW_ROWS,
    LIVE_TITLES,
    MEDIA_TITLES,
    SLOW_TITLES,
    Comparison,
    EndlessKind,
    Kind,
    LiveKind,
    MediaKind,
    Outcome,
    Plan,
    Scenario,
    SlowKind,
    endless_titles,
    scenarios,
    spaced,
)
from bench.slow import slow_clients
from bench.subscribers import subscribed
from chatterd.database import migrate

_MIB: Final = 1 << 20
_FEED_CACHE_BYTES: Final = 64 * _MIB
_SLACK_BYTES: Final = 64 * _MIB
_DOWNLOADS: Final = 3
_WARM_UP_SECONDS: Final = 1
_LIMIT: Final = 50
_MEDIA_ROWS: Final = 100
_SLOW_CLIENTS: Final = 500
# On a shared machine, few turns do not tell a difference of a tenth.
_BESIDE_TURNS: Final = 4


class NotAvailable(Exception):  # noqa: N818 - a feature that is not there yet is no error
    """The program does not do what the scenario asks for."""


class Contender(NamedTuple):
    """A program under a load. Where `refill` is given, each run starts with `rows` chatts in it."""

    name: str
    program: Program
    load: Load
    database: URL | None = None
    refill: int | None = None


class Bench:
    """Runs scenarios; `url` names a role that may create databases in an empty cluster.

    `folder` is for the programs; `only` limits the run to scenarios with this in their titles.
    """

    def __init__(self, folder: Path, url: URL, plan: Plan, only: str) -> None:
        self._folder = folder
        self._plan = plan
        self._only = only.lower()
        self._few_url = url.set(database="chatterd_few")
        self._endless_url = url.set(database="chatterd_endless")
        self._live_url = url.set(database="chatterd_live")
        self._tutorial_url = url.set(database="tutorial")
        ours = (self._few_url, self._endless_url, self._live_url)
        for database in (*ours, self._tutorial_url):
            data.execute(url, f"CREATE DATABASE {database.database}")
        for database in ours:
            migrate(database)
        data.execute(self._tutorial_url, SCHEMA)
        self._warm: set[Program] = set()
        self._bodies = folder / "bodies"
        self._bodies.write_text("".join(f"{body}\n" for body in data.post_bodies(1_000)))

    def outcomes(self) -> Iterator[Outcome]:
        """Run everything, with a progress bar on the standard error."""
        against_peers = [one for one in scenarios(self._plan) if self._only in one.title.lower()]
        titles = endless_titles(self._plan)
        endless = {key: title for key, title in titles.items() if self._only in title.lower()}
        of_media = {
            kind: title
            for kind, title in MEDIA_TITLES.items()
            if self._only in f"media: {title}".lower()
        }
        of_live = {
            kind: title
            for kind, title in LIVE_TITLES.items()
            if self._only in f"live: {title}".lower()
        }
        of_slow = {
            kind: title
            for kind, title in SLOW_TITLES.items()
            if self._only in f"slow: {title}".lower()
        }
        runs = sum(len(scenario.programs) for scenario in against_peers)
        runs += 2 * (len(endless) + len(of_media) + len(of_live) + len(of_slow))
        with tqdm(total=runs * self._plan.rounds, unit="run", leave=False) as self._bar:
            for rows in sorted({scenario.rows for scenario in against_peers}):
                same_size = [scenario for scenario in against_peers if scenario.rows == rows]
                yield from self._against_peers(rows, same_size)
            if endless:
                yield from self._endless_table(endless)
            if of_media:
                yield from self._media(of_media)
            if of_live:
                yield from self._live(of_live)
            if of_slow:
                yield from self._slow(of_slow)

    def _against_peers(self, rows: int, same_size: Sequence[Scenario]) -> Iterator[Outcome]:
        self._bar.set_description(f"{spaced(rows)} rows: filling the tables")
        databases = {"chatterd": self._few_url, "tutorial": self._tutorial_url}
        for url in databases.values():
            data.fill(url, rows)
        feed = data.feed(rows)
        with ExitStack() as stack:
            enter = stack.enter_context
            running = {
                "chatterd": enter(programs.chatterd(self._folder, self._few_url)),
                "tutorial": enter(programs.tutorial(self._folder, self._tutorial_url)),
                "ceiling": enter(programs.ceiling(self._folder, feed)),
            }
            for program in running.values():
                if program.request("/getchatts").body != feed:
                    raise SystemExit(f"bench: {program.name} does not answer the rows it should")
            for scenario in same_size:
                outcome = Outcome(scenario.title)
                with self._recorded(outcome, len(scenario.programs)):
                    contenders = [
                        Contender(
                            name,
                            running[name],
                            _load(scenario.kind, scenario.connections, running[name]),
                            databases.get(name),
                            rows if scenario.writes else None,
                        )
                        for name in scenario.programs
                    ]
                    slow = scenario.kind == "get" and rows >= self._plan.huge_rows
                    seconds = self._plan.slow_seconds if slow else 1
                    self._measure(outcome, contenders, seconds, 1 if slow else self._plan.seconds)
                    outcome.compare("tutorial", scenario.of_tutorial)
                    outcome.compare("ceiling", scenario.of_ceiling)
                yield outcome

    def _endless_table(self, titles: Mapping[EndlessKind, str]) -> Iterator[Outcome]:
        """Compare a table that holds very many rows with one that holds few."""
        self._bar.set_description("filling the largest table")
        data.fill(self._endless_url, self._plan.endless_rows)
        if "memory" in titles:
            yield self._memory(Outcome(titles["memory"], "MiB"))
        against = {kind: title for kind, title in titles.items() if kind != "memory"}
        if not against:
            return
        with ExitStack() as stack:
            enter = stack.enter_context
            endless = enter(programs.chatterd(self._folder, self._endless_url))
            few = enter(programs.chatterd(self._folder, self._few_url))
            ceiling = enter(programs.ceiling(self._folder, b"[]"))
            endless.download("/getchatts")
            for kind, title in against.items():
                rival = ceiling if kind == "not modified" else few
                yield self._endless_against(rival, kind, title, endless)

    def _endless_against(self, rival: Program, kind: Kind, title: str, endless: Program) -> Outcome:
        name, goal = f"{FEW_ROWS} rows", 0.9  # within 10 %
        if kind == "not modified":
            name, goal = "ceiling", 0.85
        outcome = Outcome(title)
        with self._recorded(outcome, 2):
            data.fill(self._few_url, FEW_ROWS)
            refill = FEW_ROWS if kind == "post" else None
            contenders = [
                Contender("chatterd", endless, _load(kind, 32, endless), self._endless_url),
                Contender(name, rival, _load(kind, 32, rival), self._few_url, refill),
            ]
            self._measure(outcome, contenders, 1, self._plan.seconds)
            outcome.compare(name, goal)
        return outcome

    def _memory(self, outcome: Outcome) -> Outcome:
        """Compare a server that has just started with itself after it served the whole table."""
        with (
            self._recorded(outcome, 2),
            programs.chatterd(
                self._folder, self._endless_url, FEED_CACHE_BYTES=str(_FEED_CACHE_BYTES)
            ) as program,
        ):
            idle = program.resident_bytes()
            length = data.feed_length(self._endless_url)
            after = 0
            for _ in range(_DOWNLOADS):
                if program.download("/getchatts") != length:
                    raise RuntimeError("the feed has not the length that it should have")
                after = max(after, program.resident_bytes())
            allowed = idle + _FEED_CACHE_BYTES + _SLACK_BYTES
            figures = {"chatterd": after, "allowed": allowed, "just started": idle}
            outcome.figures = {name: count / _MIB for name, count in figures.items()}
            outcome.comparisons.append(Comparison("allowed", allowed / after, 1.0))
            outcome.note = (
                f"just started {idle / _MIB:.1f} + FEED_CACHE_BYTES {_FEED_CACHE_BYTES // _MIB}"
                f" + {_SLACK_BYTES // _MIB} MiB"
            )
        return outcome

    def _media(self, titles: Mapping[MediaKind, str]) -> Iterator[Outcome]:
        """Compare what is done with pictures and videos, beside a feed of some rows."""
        picture = pictures.picture_form(9_000_000)
        data.fill(self._few_url, _MEDIA_ROWS)
        limit = str(media.MAX_BYTES)
        with ExitStack() as stack:
            enter = stack.enter_context
            chatterd = enter(programs.chatterd(self._folder, self._few_url, MEDIA_MAX_SIZE=limit))
            tutorial = enter(programs.tutorial(self._folder, self._tutorial_url))
            ceiling = enter(programs.ceiling(self._folder, b"[]"))
            for kind, title in titles.items():
                outcome = Outcome(title)
                self._bar.set_description(title)
                with self._recorded(outcome, 2):
                    match kind:
                        case "memory":
                            media.memory(outcome, chatterd, picture)
                        case "upload":
                            self._uploads(outcome, (chatterd, tutorial), picture)
                        case "download":
                            self._downloads(outcome, chatterd, ceiling)
                        case "over limit":
                            media.over_limit(outcome, chatterd, picture)
                        case "beside":
                            self._beside(outcome, chatterd)
                yield outcome

    def _uploads(self, outcome: Outcome, rivals: Sequence[Program], picture: Form) -> None:
        folder = self._folder / "picture"
        picture.write(folder)
        for program in rivals:
            media.upload(program, picture.body(0))
        contenders = [
            Contender(program.name, program, Load(4, "/postimages", form=folder))
            for program in rivals
        ]
        self._measure(outcome, contenders, self._plan.upload_seconds, turns=1)
        outcome.compare("tutorial", 1.5)

    def _downloads(self, outcome: Outcome, chatterd: Program, ceiling: Program) -> None:
        (ceiling.media / "video").write_bytes(pictures.video())
        contenders = [
            Contender("chatterd", chatterd, Load(4, media.video_path(chatterd))),
            Contender("ceiling", ceiling, Load(4, "/media/video")),
        ]
        self._measure(outcome, contenders, seconds=1, turns=1)
        outcome.compare("ceiling", 0.8)

    def _beside(self, outcome: Outcome, chatterd: Program) -> None:
        folder = self._folder / "larger"
        pictures.picture_form(10_000_000).write(folder)
        beside = media.Beside(chatterd, folder, self._bodies)
        for measure in (beside.before, partial(beside.round, self._plan.seconds)):
            for _ in range(self._plan.rounds):
                data.fill(self._few_url, _MEDIA_ROWS)
                chatterd.download("/getchatts")
                measure()
        beside.note(outcome)

    def _live(self, titles: Mapping[LiveKind, str]) -> Iterator[Outcome]:
        """Measure what reaches those who follow, what they cost, and what keys cost."""
        for url in (self._few_url, self._live_url):
            data.fill(url, FEW_ROWS)
        limit = str(live.SUBSCRIBERS)
        with ExitStack() as stack:
            enter = stack.enter_context
            settings = {"STREAM_MAX_SUBSCRIBERS": limit}
            chatterd = enter(programs.chatterd(self._folder, self._live_url, **settings))
            alone = enter(programs.chatterd(self._folder, self._few_url))
            for kind, title in titles.items():
                outcome = Outcome(title)
                self._bar.set_description(title)
                with self._recorded(outcome, 2):
                    match kind:
                        case "memory":
                            live.memory(outcome, chatterd)
                        case "delivery":
                            self._deliveries(outcome, chatterd)
                        case "beside":
                            self._beside_subscribers(outcome, chatterd, alone)
                        case "keys":
                            self._keys(outcome, alone)
                yield outcome

    def _deliveries(self, outcome: Outcome, chatterd: Program) -> None:
        delivery = live.Delivery(chatterd)
        for _ in range(self._plan.rounds):
            delivery.round(self._plan.live_posts)
        delivery.note(outcome)

    def _beside_subscribers(self, outcome: Outcome, chatterd: Program, alone: Program) -> None:
        posts = Load(32, posts_of_ten=10)
        contenders = [
            Contender("chatterd", chatterd, posts, self._live_url, FEW_ROWS),
            Contender("without subscribers", alone, posts, self._few_url, FEW_ROWS),
        ]
        chatterd.settle()
        with subscribed(chatterd.port, live.BESIDE) as found:
            self._measure(outcome, contenders, 1, _BESIDE_TURNS * self._plan.seconds)
        outcome.compare("without subscribers", 0.9)
        if found.ended:
            outcome.fault = "invalid"
            outcome.note += f"{found.ended} streams ended. "

    def _keys(self, outcome: Outcome, chatterd: Program) -> None:
        live.check_keys(chatterd)
        contenders = [
            Contender(name, chatterd, load, self._few_url, FEW_ROWS)
            for name, load in {
                "chatterd": Load(32, posts_of_ten=10, keys=True),
                "without keys": Load(32, posts_of_ten=10),
            }.items()
        ]
        self._measure(outcome, contenders, 1, self._plan.seconds)
        outcome.compare("without keys", 0.7)

    def _slow(self, titles: Mapping[SlowKind, str]) -> Iterator[Outcome]:
        """Compare how long readers wait beside many slow clients and without them, in turns."""
        data.fill(self._few_url, _MEDIA_ROWS)
        with ExitStack() as stack:
            enter = stack.enter_context
            chatterd = enter(programs.chatterd(self._folder, self._few_url))
            for kind, title in titles.items():
                outcome = Outcome(title, "ms")
                self._bar.set_description(title)
                with self._recorded(outcome, 2):
                    program = chatterd
                    if kind == "nginx":
                        program = enter(programs.nginx(self._folder, chatterd))
                    self._beside_slow(outcome, program)
                yield outcome

    def _beside_slow(self, outcome: Outcome, program: Program) -> None:
        runs: dict[str, list[Run]] = {"without": [], "chatterd": []}
        for _ in range(self._plan.rounds):
            runs["without"].append(load.run(Load(32), program.port, 1, self._bodies))
            with slow_clients(program.port, _SLOW_CLIENTS):
                seconds = self._plan.seconds
                runs["chatterd"].append(load.run(Load(32), program.port, seconds, self._bodies))
            runs["without"].append(load.run(Load(32), program.port, 1, self._bodies))
        without, beside = (
            statistics.median(run.latency_p99 for run in some) for some in runs.values()
        )
        outcome.runs = {name: [asdict(run) for run in some] for name, some in runs.items()}
        outcome.figures["chatterd"] = beside
        outcome.stay_within("allowed", 3 * without, beside)
        outcome.note = f"without them {without:.2f} ms"
        if errors := {kind for some in runs.values() for run in some for kind in run.errors}:
            outcome.fault = "invalid"
            outcome.note += f"; errors {sorted(errors)}"

    def _measure(
        self, outcome: Outcome, contenders: Sequence[Contender], seconds: int, turns: int
    ) -> None:
        """Note the medians of some rounds.

        In each round the contenders take `turns` turns of `seconds`, so that a minute in which the
        machine is slow is slow for all of them.
        """
        figures: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(self._plan.rounds):
            self._bar.set_description(outcome.title)
            for contender in contenders:
                self._prepare(contender)
            runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
            cpu_seconds = dict.fromkeys(runs, 0.0)
            for _ in range(turns):
                for contender in contenders:
                    run, spent = self._run(contender, seconds)
                    runs[contender.name].append(run)
                    cpu_seconds[contender.name] += spent
            for contender in contenders:
                name, run = contender.name, load.together(runs[contender.name])
                figures[name].append(run.requests_per_second)
                if run.errors:
                    outcome.fault = "invalid"
                    outcome.note += f"{name}: errors {dict(run.errors)}. "
                details = asdict(run) | {
                    "cpu_percent": round(100 * cpu_seconds[name] / run.seconds),
                    "resident_mib": round(contender.program.resident_bytes() / _MIB, 1),
                    "rows_after": _row_count(contender),
                }
                outcome.runs.setdefault(name, []).append(details)
                self._bar.update()
        outcome.figures = {name: statistics.median(found) for name, found in figures.items()}

    def _prepare(self, contender: Contender) -> None:
        """Bring the program to where a run begins: it has its rows, has read them, and is warm."""
        program = contender.program
        if contender.refill is not None and contender.database is not None:
            data.fill(contender.database, contender.refill)
            program.download("/getchatts")
        if program not in self._warm:
            load.run(contender.load, program.port, _WARM_UP_SECONDS, self._bodies)
            program.settle()
            if contender.load.form:
                uploads.remove(program.media)
            self._warm.add(program)

    def _run(self, contender: Contender, seconds: int) -> tuple[Run, float]:
        """Return what wrk saw, and the processor time that the program took."""
        program = contender.program
        rows_before = _row_count(contender)
        cpu_before = program.cpu_seconds()
        run = load.run(contender.load, program.port, seconds, self._bodies)
        cpu_seconds = program.cpu_seconds() - cpu_before
        program.settle()
        posted = run.requests if contender.load.posts_of_ten == 10 else 0
        rows_after = _row_count(contender)
        if rows_after is not None and rows_before is not None and rows_after < rows_before + posted:
            raise RuntimeError(f"{contender.name}: {posted} posts were answered, fewer are stored")
        if contender.load.form:
            uploaded = run.requests - run.errors.get("status", 0)
            if uploads.remove(program.media) < uploaded:
                raise RuntimeError(f"{contender.name}: {uploaded} pictures answered, fewer stored")
        return run, cpu_seconds

    @contextmanager
    def _recorded(self, outcome: Outcome, programs_count: int) -> Iterator[None]:
        """Make what goes wrong in a scenario its outcome; keep the progress bar in step."""
        end = self._bar.n + programs_count * self._plan.rounds
        try:
            yield
        except NotAvailable as missing:
            outcome.fault, outcome.note = "not available", str(missing)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            outcome.fault, outcome.note = "failed", str(error) or type(error).__name__
        self._bar.update(end - self._bar.n)


def _load(kind: Kind, connections: int, program: Program) -> Load:
    """Return the load of a scenario.

    Looks first whether `program` does what it asks for, and raises `NotAvailable` if it does not.
    """
    match kind:
        case "limit":
            return Load(connections, _narrow_path(program))
        case "gzip":
            return Load(connections, headers=_compression(program))
        case "not modified":
            return Load(connections, headers=_condition(program))
        case _:
            return Load(connections, posts_of_ten={"mix": 1, "post": 10}.get(kind, 0))


def _narrow_path(program: Program) -> str:
    path = f"/getchatts?limit={_LIMIT}"
    answer = program.request(path)
    if answer.status != 200 or len(json.loads(answer.body)) > _LIMIT:
        raise NotAvailable(f"{program.name} ignores limit")
    return path


def _compression(program: Program) -> Mapping[str, str]:
    headers = {"Accept-Encoding": "gzip"}
    answer = program.request("/getchatts", headers=headers)
    if program.name == "tutorial":
        return headers  # it answers as ever
    if answer.headers.get("content-encoding") != "gzip":
        raise NotAvailable(f"{program.name} does not compress")
    if gzip.decompress(answer.body) != program.request("/getchatts").body:
        raise RuntimeError(f"{program.name} compresses something else")
    return headers


def _condition(program: Program) -> Mapping[str, str]:
    etag = program.request("/getchatts", "HEAD").headers.get("etag")
    if etag is None:
        raise NotAvailable(f"{program.name} sends no ETag")
    headers = {"If-None-Match": etag}
    if program.request("/getchatts", headers=headers).status != 304:
        raise RuntimeError(f"{program.name} does not know its own ETag again")
    return headers


def _row_count(contender: Contender) -> int | None:
    if contender.database is None or not contender.load.posts_of_ten:
        return None
    count = data.value(contender.database, "SELECT count(*) FROM chatts")
    assert isinstance(count, int)
    return count
