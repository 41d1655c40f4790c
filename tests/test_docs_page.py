"""The page of the API, /docs: complete, whole, safe, and its examples work."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from chatterd import docs_page
from chatterd.errors import CATALOGUE
from chatterd.openapi import DOCUMENT
from tests.multipart import encode, fields, form_type, image
from tests.samples import JPEG

if TYPE_CHECKING:
    from pathlib import Path

    from tests.process import Server

VOID = {"meta", "link", "br"}
OPERATIONS = [
    (method, path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method not in {"parameters", "head"}
]


class Page(HTMLParser):
    """A page's elements; one that is not closed where it should be is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name))]


@pytest.fixture(scope="module")
def page(server: Server) -> Page:
    return Page(httpx2.get(f"{server.url}/docs").text)


def test_every_operation_error_and_object_is_on_the_page(page: Page) -> None:
    for method, path, operation in OPERATIONS:
        assert f"{method.upper()} {path}" in page.text
        assert operation["summary"] in page.text
    for name in [*CATALOGUE, *DOCUMENT["components"]["schemas"]]:
        assert name in page.text


def test_every_link_of_the_page_leads_somewhere(page: Page) -> None:
    anchors = page.values("id")
    assert len(set(anchors)) == len(anchors)
    links = {link for link in page.values("href") if link.startswith("#")}
    assert len(links) > 2 * len(OPERATIONS)
    assert links <= {f"#{anchor}" for anchor in anchors}


async def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(
    client: httpx2.AsyncClient, page: Page
) -> None:
    assert not page.values("src") + page.values("style")
    assert not {tag for tag, _ in page.elements} & {"script", "style", "iframe"}
    for link in {link for link in page.values("href") if not link.startswith("#")}:
        assert link.startswith("/")
        assert (await client.get(link)).status_code == 200
    policy = (await client.get("/docs")).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self';")
    style = (await client.get("/web/docs.css")).text
    assert not re.search(r"url\(|@import|http", style)


def test_markup_in_the_document_is_text_on_the_page() -> None:
    info = DOCUMENT["info"] | {"title": "<b>&amp;", "description": "</p><b>`<b>`"}
    page = Page(docs_page.page(DOCUMENT | {"info": info}).decode())
    assert "<b>&amp;" in page.text
    assert "</p><b><b>" in page.text
    assert "b" not in {tag for tag, _ in page.elements}


@pytest.mark.usefixtures("ollama")
async def test_the_examples_of_the_page_work(
    server: Server, client: httpx2.AsyncClient, page: Page, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    form = encode(*fields(), image(JPEG))
    chatt = (await client.post("/v1/chatts", content=form, headers=form_type())).json()
    names = {
        "http://127.0.0.1:8000": server.url,
        "KEY": chatt["image"]["url"].rpartition("/")[2],
        "ID": chatt["id"],
        "TOKEN": chatt["delete_token"],
        "curl ": "curl --no-progress-meter --fail ",
    }
    for _, path, operation in OPERATIONS:
        (sample,) = operation["x-codeSamples"]
        assert sample["source"] in page.text
        if path in {"/v1/stream", "/v1/ws"}:  # they have no end
            continue
        command = sample["source"]
        for name, value in names.items():
            command = command.replace(name, value)
        await anyio.run_process(command, cwd=tmp_path)  # raises when it fails
    assert (tmp_path / names["KEY"]).read_bytes() == JPEG
