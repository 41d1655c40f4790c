"""/metrics tells what has happened, to those who may know, in one process and in several."""

from __future__ import annotations

import json
import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import anyio
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from chatterd.errors import CATALOGUE
from tests.conftest import client_of, connected, database_at_head, database_away
from tests.multipart import connect, encode, fields, form_type, image
from tests.process import ROOT, Server
from tests.samples import JPEG
from tests.streams import stream_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import httpx2
    from sqlalchemy.engine import URL

    from tests.conftest import StartServer

CHATT = {"name": "ann", "message": "hi"}
PICTURE = encode(*fields(), image(JPEG))


@pytest.fixture(scope="module")
def database_url(postgres_url: URL) -> Iterator[str]:
    with database_at_head(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def server(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, DATABASE_URL=database_url, SLOW_QUERY_MILLISECONDS="200") as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(server) as client:
        yield client


class Samples:
    """What /metrics said at a moment: each sample's value, by its name and labels."""

    def __init__(self, text: str) -> None:
        self.types: dict[str, str] = {}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            suffix = "_total" if family.type == "counter" else ""
            self.types[family.name + suffix] = family.type
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.values
                self.values[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        return self.values.get((name, frozenset(labels.items())), 0)


async def samples(client: httpx2.AsyncClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert response.headers["cache-control"] == "no-store"
    return Samples(response.text)


class Change:
    """What has been added since `before`."""

    def __init__(self, client: httpx2.AsyncClient, before: Samples) -> None:
        self._client = client
        self._before = before

    async def is_soon(self, expected: float, name: str, **labels: str) -> None:
        """Wait until it is so; a request is counted when its answer has left."""
        with anyio.fail_after(20):
            while True:
                found = (await samples(self._client))(name, **labels) - self._before(name, **labels)
                if found == expected:
                    return
                assert found < expected or "total" not in name, (name, labels, found)


async def test_requests_are_counted_by_route_method_and_status(
    client: httpx2.AsyncClient,
) -> None:
    before = await samples(client)
    sent = 0
    for _ in range(3):
        posted = await client.post("/v1/chatts", json=CHATT)
        sent += len((await client.get(f"/v1/chatts/{posted.json()['id']}/")).content)
    await client.head("/")
    await client.post("/postchatt", json={})
    await client.delete("/getchatts/")
    await client.get("/v1/chatts", headers={"Host": "*"})
    change = Change(client, before)
    for count, route, method, status in (
        (3, "/v1/chatts", "POST", "201"),
        (3, "/v1/chatts/{id}", "GET", "200"),
        (1, "/", "HEAD", "200"),
        (1, "/postchatt", "POST", "422"),
        (1, "/getchatts", "DELETE", "405"),
        (1, "other", "GET", "400"),
    ):
        labels = {"route": route, "method": method}
        await change.is_soon(count, "chatterd_requests_total", **labels, status=status)
        await change.is_soon(count, "chatterd_request_seconds_count", **labels)
    labels = {"route": "/v1/chatts/{id}", "method": "GET"}
    await change.is_soon(sent, "chatterd_response_bytes_total", **labels)
    now = await samples(client)
    seconds = now("chatterd_request_seconds_sum", **labels)
    assert 0 < seconds < 60
    assert now("chatterd_request_seconds_bucket", le="+Inf", **labels) == 3


async def test_posts_are_counted_by_their_commits(client: httpx2.AsyncClient) -> None:
    before = await samples(client)
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(lambda: client.post("/postchatt", json=CHATT))
    now = await samples(client)
    assert now("chatterd_post_batch_size_sum") - before("chatterd_post_batch_size_sum") == 5
    commits = now("chatterd_commit_seconds_count") - before("chatterd_commit_seconds_count")
    assert 1 <= commits <= 5
    assert now("chatterd_post_batch_size_count") - before("chatterd_post_batch_size_count") == (
        commits
    )
    assert now("chatterd_posts_waiting") == 0


async def test_the_feeds_answers_are_counted_by_where_they_were(
    client: httpx2.AsyncClient,
) -> None:
    await client.post("/postchatt", json=CHATT)
    before = await samples(client)
    feed = await client.get("/getchatts")
    await client.get("/getimages")
    await client.get("/getchatts", headers={"If-None-Match": feed.headers["etag"]})
    oldest = feed.json()[0][2]
    await client.get("/getchatts", params={"after": oldest})
    change = Change(client, before)
    for count, source in ((2, "memory"), (1, "client"), (1, "database")):
        await change.is_soon(count, "chatterd_feed_answers_total", source=source)
    await change.is_soon(4, "chatterd_feed_checks_total")
    assert (await samples(client))("chatterd_feed_memory_bytes") >= len(feed.content) - 2


async def test_who_follows_is_counted_and_its_time_is_none_of_an_answers(
    client: httpx2.AsyncClient,
) -> None:
    before = await samples(client)
    change = Change(client, before)
    cursor = (await client.get("/v1/chatts")).json()["cursor"]
    async with stream_of(client) as stream:
        await stream.begin()
        await change.is_soon(1, "chatterd_subscribers")
        await change.is_soon(1, "chatterd_requests_in_flight")
        await client.post("/postchatt", json=CHATT)
        await stream.event()
        await change.is_soon(1, "chatterd_events_read_total")
        await change.is_soon(1, "chatterd_events_delivered_total")
    await client.get("/v1/chatts", params={"since": cursor, "wait": "5"})
    await change.is_soon(0, "chatterd_subscribers")
    labels = {"route": "/v1/stream", "method": "GET"}
    await change.is_soon(1, "chatterd_requests_total", **labels, status="200")
    now = await samples(client)
    assert not any(
        ("route", "/v1/stream") in labels
        for name, labels in now.values
        if name.startswith("chatterd_request_seconds")
    )
    assert now("chatterd_response_bytes_total", **labels) > 200
    # The page that told the cursor is timed, the wait behind it is not.
    labels = {"route": "/v1/chatts", "method": "GET"}
    await change.is_soon(2, "chatterd_requests_total", **labels, status="200")
    await change.is_soon(1, "chatterd_request_seconds_count", **labels)


async def test_uploads_are_counted_by_what_became_of_them(client: httpx2.AsyncClient) -> None:
    before = await samples(client)
    for content, status in (
        (PICTURE, 200),
        (encode(*fields(), image(b"text")), 415),
        (encode(*fields(message="m" * 5000), image(JPEG)), 400),
    ):
        answer = await client.post("/postimages", content=content, headers=form_type())
        assert answer.status_code == status
    change = Change(client, before)
    await change.is_soon(1, "chatterd_upload_files_total", kind="image")
    await change.is_soon(1, "chatterd_uploads_refused_total", code="image-unsupported")
    await change.is_soon(1, "chatterd_uploads_refused_total", code="message-too-long")
    await change.is_soon(2 * len(JPEG) + 4, "chatterd_upload_bytes_total")


async def test_strangers_make_no_labels(client: httpx2.AsyncClient, server: Server) -> None:
    await client.request("BREW", "/nowhere")
    before = (await samples(client)).values.keys()
    for number in range(50):
        async with connect(server.url) as wire:
            await wire.request(f"BREW{number}", f"/nowhere/{number}?{number}", "X-Request-Id: a")
            assert (await wire.answer()).status_code == 404
            await wire.request("GET", f"/nowhere-{number}", "Connection: close")
            assert (await wire.answer()).status_code == 404
    with anyio.fail_after(20):
        while (now := await samples(client))(
            "chatterd_requests_total", route="other", method="other", status="404"
        ) < 51:
            pass
    added = {
        tuple(dict(labels).get(name) for name in ("route", "method"))
        for _, labels in now.values.keys() - before
    }
    assert added <= {("other", "GET"), ("/metrics", "GET")}
    known = {
        "method": {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"},
        "code": CATALOGUE.keys(),
    }
    for _, labels in now.values:
        for name, value in labels:
            assert value in known.get(name, {value})


async def test_the_database_and_its_connections_are_told_of(
    client: httpx2.AsyncClient, database_url: str, postgres_url: URL
) -> None:
    change = Change(client, Samples(""))
    await client.get("/getchatts")
    now = await samples(client)
    assert now("chatterd_pool_size") == 10
    assert 1 <= now("chatterd_pool_in_use") <= 10
    async with connected(database_url) as psql, anyio.create_task_group() as group:
        transaction = psql.transaction()
        await transaction.start()
        await psql.execute("LOCK TABLE chatts IN ACCESS EXCLUSIVE MODE")
        slow = now("chatterd_slow_statements_total")
        for _ in range(15):
            group.start_soon(client.get, "/v1/chatts")
        await change.is_soon(10, "chatterd_pool_in_use")
        with anyio.fail_after(20):
            while (await samples(client))("chatterd_pool_waiting") < 1:
                pass
        await anyio.sleep(0.2)  # SLOW_QUERY_MILLISECONDS
        await transaction.rollback()
    await change.is_soon(0, "chatterd_pool_waiting")
    assert (await samples(client))("chatterd_slow_statements_total") > slow
    async with database_away(database_url, postgres_url):
        await client.get("/getchatts")
        await change.is_soon(0, "chatterd_database_up")
    with anyio.fail_after(20):
        while (await client.get("/getchatts")).status_code != 200:
            pass
    await change.is_soon(1, "chatterd_database_up")


async def test_the_process_is_told_of(client: httpx2.AsyncClient) -> None:
    now = await samples(client)
    assert 20e6 < now("chatterd_resident_memory_bytes") < 500e6
    assert now("chatterd_open_descriptors") > 5
    assert now("chatterd_processes") == 1
    assert now("chatterd_cpu_seconds_total") > 0.1
    (labels,) = [dict(labels) for name, labels in now.values if name == "chatterd_build_info"]
    assert labels.keys() == {"version", "python"}


async def test_it_is_openmetrics_for_those_who_ask_for_it(client: httpx2.AsyncClient) -> None:
    accept = "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"
    response = await client.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = openmetrics_families(response.text)  # type: ignore[no-untyped-call] # prometheus-client's
    assert [*families]
    for nonsense in (
        "application/openmetrics-text; version=x.y;escaping=\xe9",
        "text/plain;version=",
        ";,;",
    ):
        response = await client.get("/metrics", headers={b"Accept": nonsense.encode("latin-1")})
        assert response.status_code == 200


async def test_only_the_addresses_that_are_allowed_are_told(start_server: StartServer) -> None:
    server = start_server(METRICS_ALLOWED="10.0.0.0/8,unix")
    async with client_of(server) as client:
        response = await client.get("/metrics")
        assert response.status_code == 403
        assert response.json()["code"] == "address-not-allowed"


async def test_of_several_processes_each_tells_of_all(
    start_server: StartServer, tmp_path: Path, database_url: str
) -> None:
    shared = tmp_path / "metrics"
    shared.mkdir()
    settings = {"PROMETHEUS_MULTIPROC_DIR": str(shared), "DATABASE_URL": database_url}
    servers = [start_server(**settings), start_server(**settings)]
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(client_of(server)) for server in servers]
        for client in (one, one, other):
            assert (await client.post("/postchatt", json=CHATT)).status_code == 200
        labels = {"route": "/postchatt", "method": "POST"}
        for client in (one, other):
            change = Change(client, Samples(""))
            await change.is_soon(3, "chatterd_requests_total", **labels, status="200")
            await change.is_soon(3, "chatterd_request_seconds_count", **labels)
            await change.is_soon(3, "chatterd_post_batch_size_sum")
            await change.is_soon(2, "chatterd_processes")
            await change.is_soon(20, "chatterd_pool_size")
            await change.is_soon(1, "chatterd_database_up")
        async with stream_of(other) as stream:
            await stream.begin()
            await Change(one, Samples("")).is_soon(1, "chatterd_subscribers")
        # What one has counted stays when it ends; what it is does not.
        assert servers[1].stop() == 0
        now = await samples(one)
        assert now("chatterd_requests_total", **labels, status="200") == 3
        assert now("chatterd_processes") == 1
        assert now("chatterd_pool_size") == 10


# --- What is written about it


def documented() -> dict[str, tuple[str, set[str]]]:
    """The type and the labels of each metric of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(chatterd_\w+)` \| (\w+) \|(.*?)\| .+ \|$", text, re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


async def test_the_documentation_has_every_metric_with_its_type_and_labels(
    client: httpx2.AsyncClient,
) -> None:
    bad = encode(*fields(), image(b"text"))
    await client.post("/postimages", content=bad, headers=form_type())
    now = await samples(client)
    assert {name: kind for name, (kind, _) in documented().items()} == now.types
    labels: dict[str, set[str]] = {name: set() for name in now.types}
    for sample, found in now.values:
        name = sample if sample in labels else re.sub("_(bucket|count|sum)$", "", sample)
        labels[name] |= {label for label, _ in found} - {"le"}
    assert {name: labels for name, (_, labels) in documented().items()} == labels


def test_the_dashboard_asks_for_what_is_there() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "chatterd.json").read_text())
    known = {
        each
        for name, (kind, _) in documented().items()
        for each in (
            [f"{name}_{part}" for part in ("bucket", "count", "sum")]
            if kind == "histogram"
            else [name]
        )
    }
    asked = set()
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            names = set(re.findall(r"\bchatterd_\w+", target["expr"]))
            assert names
            assert names <= known
            asked |= names
            for by in re.findall(r"by \(([^)]*)\)", target["expr"]):
                allowed = {"le"} | {label for name in names for label in labels_of(name)}
                assert set(by.replace(" ", "").split(",")) <= allowed
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert {variable["name"] for variable in dashboard["templating"]["list"]} >= {"datasource"}
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in asked}
    assert families == documented().keys(), "a metric that nobody looks at"


def labels_of(sample: str) -> set[str]:
    found = documented()
    return found.get(sample, found.get(re.sub("_(bucket|count|sum)$", "", sample), ("", set())))[1]
