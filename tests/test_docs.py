"""The documentation is true."""

import json
import re
from pathlib import Path

import anyio
import httpx2
import pytest

from chatterd.errors import CATALOGUE, MEANINGS
from tests import samples
from tests.ollama import FakeOllama, lines
from tests.process import Server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table_rows(text: str) -> list[list[str]]:
    rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def console_examples() -> list[tuple[str, str]]:
    """The README's commands, each with what it is said to print."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", "".join(blocks), re.MULTILINE)


def without_chance(text: str) -> str:
    """`text` without what differs each time."""
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "TIME", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16}-[0-9a-f]+", "ID", text)
    text = re.sub(r"[0-9a-f]{32}\.\d+\.\d+", "CURSOR", text)
    text = re.sub(r'"delete_token":"[\w-]{24}"', "TOKEN", text)
    return text.strip()


async def streamed(command: str, client: httpx2.AsyncClient) -> str:
    """What a command prints that does not end, when somebody posts, and takes it back."""
    process = await anyio.open_process(command)
    assert process.stdout is not None
    printed = await process.stdout.receive()
    post = {"name": "ann", "message": "Hello!"}
    chatt = (await client.post("/v1/chatts", json=post)).json()
    while not printed.endswith(b"}\n\n"):
        printed += await process.stdout.receive()
    process.terminate()
    await process.aclose()
    token = {"Chatterd-Delete-Token": chatt["delete_token"]}
    await client.delete(f"/v1/chatts/{chatt['id']}", headers=token)
    return printed.decode()


async def test_each_command_of_the_readme_prints_what_the_readme_says(
    server: Server, client: httpx2.AsyncClient, ollama: FakeOllama, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(samples.JPEG)
    examples = console_examples()
    assert len(examples) == 12
    names: dict[str, str] = {}  # what stands in the README for an id or a token, and what is one
    for command, expected in examples:
        here = command.replace("http://127.0.0.1:8000", server.url)
        for there, name in names.items():
            here = here.replace(there, name)
        if "/v1/stream" in command:
            printed = await streamed(here, client)
        else:
            printed = (await anyio.run_process(here, cwd=tmp_path)).stdout.decode()
        if "delete_token" in printed:
            then, now = json.loads(expected), json.loads(printed)
            names |= {then[name]: now[name] for name in ("id", "delete_token")}
        wanted = expected.replace("http://127.0.0.1:8000", server.url)
        if "/llmprompt" in command:  # a model says something else each time; the stand-in does not
            wanted = b"".join(lines("Why is the sky blue?")).decode()
        assert without_chance(printed) == without_chance(wanted), command
    assert (tmp_path / "copy.jpg").read_bytes() == samples.JPEG
    assert ollama.path == "/api/generate"


def test_the_error_codes_of_the_documentation_are_those_of_the_server() -> None:
    rows = table_rows((ROOT / "docs" / "errors.md").read_text())
    documented = {row[0].strip("`"): int(row[1]) for row in rows if row[1].isdigit()}
    assert documented == CATALOGUE
    meanings = {row[0].strip("`"): row[2] for row in rows if row[1].isdigit()}
    assert meanings == MEANINGS


def test_the_settings_of_the_readme_are_those_of_the_example_file_with_their_defaults() -> None:
    section = README.partition("## Settings")[2].partition("\n## ")[0]
    documented = {row[0].strip("`"): row[1].strip("`") for row in table_rows(section)}
    del documented["setting"], documented["---"]
    example = re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert documented == dict(example)


@pytest.mark.parametrize(
    "path", re.findall(r"\]\(([^)#:]+)\)|`((?:chatterd|docs|tests|alembic)/[\w./]+)`", README)
)
def test_each_file_that_the_readme_names_is_there(path: tuple[str, str]) -> None:
    assert (ROOT / "".join(path)).exists()
