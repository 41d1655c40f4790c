"""What is measured, what is to be reached, and what comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["get", "gzip", "not modified", "mix", "post", "limit"]
EndlessKind: TypeAlias = Kind | Literal["memory"]
MediaKind: TypeAlias = Literal["memory", "upload", "download", "over limit", "beside"]
LiveKind: TypeAlias = Literal["memory", "delivery", "beside", "keys"]
SlowKind: TypeAlias = Literal["direct", "nginx"]

FEW_ROWS: Final = 10


@dataclass(frozen=True)
class Plan:
    """How long and how large: `seconds` for a run, `slow_seconds` for one with huge answers.

    Runs take turns of a second, those with huge answers of all their seconds. `upload_seconds`: for
    a run of uploads, of which a second has few. `live_posts`: how many posts go to all subscribers.
    """

    rounds: int
    seconds: int
    slow_seconds: int
    upload_seconds: int
    huge_rows: int
    endless_rows: int
    live_posts: int


FULL: Final = Plan(
    3,
    seconds=4,
    slow_seconds=12,
    upload_seconds=2,
    huge_rows=100_000,
    endless_rows=1_000_000,
    live_posts=100,
)
QUICK: Final = Plan(
    1,
    seconds=2,
    slow_seconds=2,
    upload_seconds=1,
    huge_rows=20_000,
    endless_rows=100_000,
    live_posts=20,
)


@dataclass(frozen=True)
class Scenario:
    """One line of the table. The goals are the least ratios to the peers' requests per second."""

    rows: int
    kind: Kind
    connections: int
    of_tutorial: float | None = None
    of_ceiling: float | None = None

    @property
    def programs(self) -> Sequence[str]:
        """Who takes part. The tutorial's program knows no conditional reads."""
        if self.kind == "not modified":
            return ("chatterd", "ceiling")
        return ("chatterd", "tutorial", "ceiling")

    @property
    def writes(self) -> bool:
        """Whether the table grows during a run."""
        return self.kind in {"mix", "post"}

    @property
    def title(self) -> str:
        """What a reader of the table sees."""
        what = {
            "get": "GET",
            "gzip": "GET, gzip",
            "not modified": "GET, If-None-Match",
            "mix": "GET, 1 in 10 a POST",
            "post": "POST",
        }[self.kind]
        size = "" if self.kind == "post" else f", {spaced(self.rows)} rows"
        return f"{what}{size}, {self.connections} connection{'s' * (self.connections > 1)}"


def scenarios(plan: Plan) -> list[Scenario]:
    """Return what is measured against the peers, ordered by the number of rows."""
    huge = plan.huge_rows
    return [
        Scenario(FEW_ROWS, "post", 1, 1.0),
        Scenario(FEW_ROWS, "post", 8, 1.2),
        Scenario(FEW_ROWS, "post", 32, 1.6, 0.75),
        Scenario(FEW_ROWS, "post", 128, 1.4),
        Scenario(100, "get", 32, 2.5, 0.85),
        Scenario(100, "not modified", 32, None, 0.85),
        Scenario(1_000, "get", 32, 12, 0.9),
        Scenario(1_000, "gzip", 32, 12),
        Scenario(1_000, "mix", 32, 5),
        Scenario(10_000, "get", 8, 40, 0.85),
        Scenario(10_000, "not modified", 32, None, 0.85),
        Scenario(huge, "get", 8, 50, 0.6),
        Scenario(huge, "not modified", 32, None, 0.85),
    ]


def endless_titles(plan: Plan) -> dict[EndlessKind, str]:
    """Return the titles of what is measured at the largest table."""
    rows = f"{spaced(plan.endless_rows)} rows"
    return {
        "memory": f"resident memory after serving {rows} in full",
        "not modified": f"GET, If-None-Match, {rows}, 32 connections",
        "limit": f"GET ?limit=50, {rows} against {FEW_ROWS}, 32 connections",
        "post": f"POST, {rows} against {FEW_ROWS}, 32 connections",
    }


MEDIA_TITLES: Final[Mapping[MediaKind, str]] = {
    "memory": "memory per concurrent upload",
    "beside": "GET /getchatts while 20 uploads of 10 MB run, 99th percentile",
    "upload": "POST /postimages, picture of 9 MB, 4 connections",
    "download": "GET /media, video of 10 MB, 4 connections",
    "over limit": "over-limit upload of 400 MB, chunked",
}
"""The titles of what is measured with pictures and videos."""

LIVE_TITLES: Final[Mapping[LiveKind, str]] = {
    "memory": "memory per idle subscriber of 1 000",
    "delivery": "from commit to 1 000 subscribers, 5 posts a second, median",
    "beside": "POST, 32 connections, beside 100 subscribers",
    "keys": "POST, 32 connections, each with an Idempotency-Key",
}
"""The titles of what is measured with subscribers, and with keys."""

SLOW_TITLES: Final[Mapping[SlowKind, str]] = {
    "direct": "GET, 32 connections, beside 500 that send a byte a second, 99th percentile",
    "nginx": "the same through Nginx",
}
"""The titles of what is measured beside clients that are slow."""


@dataclass(frozen=True)
class Comparison:
    """A figure of chatterd's divided by one of another's; goal: what the ratio must reach."""

    against: str
    ratio: float
    goal: float | None


@dataclass
class Outcome:
    """One line of the table: medians, their ratios, and what the single runs saw.

    fault: why there are no figures, or why they do not count.
    """

    title: str
    unit: str = "requests/s"
    figures: dict[str, float] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    note: str = ""
    fault: str = ""
    runs: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def compare(self, name: str, goal: float | None) -> None:
        """Note how the figure of chatterd's stands to that of `name`, where there is one."""
        if name in self.figures:
            ratio = self.figures["chatterd"] / self.figures[name]
            self.comparisons.append(Comparison(name, ratio, goal))

    def stay_within(self, name: str, allowed: float, found: float) -> None:
        """Note that `found`, a figure that should be small, must be no more than `allowed`.

        What is hardly anything counts as a hundredth of what is allowed.
        """
        self.figures[name] = allowed
        self.comparisons.append(Comparison(name, allowed / max(found, allowed / 100), 1.0))

    @property
    def met(self) -> str:
        """Whether every goal is reached: yes, no, or why that cannot be said."""
        goals = [(found.ratio, found.goal) for found in self.comparisons if found.goal is not None]
        if self.fault:
            return self.fault
        return "yes" if all(ratio >= goal for ratio, goal in goals) else "no"


def spaced(number: int) -> str:
    """Return the number with its thousands apart."""
    return f"{number:,}".replace(",", " ")
