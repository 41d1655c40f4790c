"""The documentation is true."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import anyio
import httpx2
import pytest

from chatterd.errors import CATALOGUE
from tests import samples
from tests.ollama import FakeOllama, lines
from tests.process import Server, environment

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
    documented = {row[0].strip("`"): (int(row[1]), row[2]) for row in rows if row[1].isdigit()}
    assert documented == CATALOGUE


def test_the_settings_of_the_readme_are_those_of_the_example_file_with_their_defaults() -> None:
    section = README.partition("## Settings")[2].partition("\n## ")[0]
    documented = {row[0].strip("`"): row[1].strip("`") for row in table_rows(section)}
    del documented["setting"], documented["---"]
    example = re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert documented == dict(example)


def settings_of_the_document() -> dict[str, str]:
    text = (ROOT / "docs" / "settings.md").read_text()
    return dict(
        re.findall(r"^### `([A-Z_]+)`\n\n(.*?)(?=\n\n##|\Z)", text, re.MULTILINE | re.DOTALL)
    )


def test_every_setting_is_in_its_document_with_its_default() -> None:
    example = re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    documented = settings_of_the_document()
    assert sorted(documented) == sorted(name for name, _ in example)
    for name, default in example:
        begin = f"Default: `{default}`" if default else "Default: empty."
        assert documented[name].startswith(begin), name


TRIED = """
import os, sys
import asyncpg, sqlalchemy, starlette.config  # once: they take longest
for line in sys.stdin.read().split():
    if os.fork():
        status = os.wait()[1]
        print(line, "right" if status == 0 else "wrong", flush=True)
        continue
    name, _, value = line.partition("=")
    os.environ[name] = value
    try:
        import chatterd.settings
    except SystemExit:
        os._exit(1)
    os._exit(0)
"""


def test_the_numbers_that_the_document_allows_are_those_that_can_be_set(tmp_path: Path) -> None:
    expected: dict[str, str] = {}
    for name, text in settings_of_the_document().items():
        if match := re.search(r"\b(\d+) to (\d+)", text.replace("\n", " ")):
            least, most = int(match[1]), int(match[2])
            expected |= {f"{name}={value}": "right" for value in (least, most)}
            expected |= {f"{name}={value}": "wrong" for value in (least - 1, most + 1)}
    assert len(expected) == 4 * 15
    done = subprocess.run(
        [sys.executable, "-c", TRIED],
        input="\n".join(expected),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(line.split() for line in done.stdout.splitlines()) == expected


GUIDES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(
    r"\bchatterd (?:serve|migrate|doctor|media|nginx|backup|restore)\b(?:[^\n`|>;&]|(?<=\n)    )*"
)


def commands_of_the_documents() -> list[str]:
    """Each call of chatterd in a line of its own, or in words between backticks."""
    found: set[str] = set()
    for path in GUIDES:
        text = path.read_text()
        lines = re.findall(r"^    .*$", text, re.MULTILINE)
        for part in (*lines, *re.findall(r"`([^`]+)`", text)):
            # What stands behind a gap tells what the command is for.
            words = (re.split(r" {3,}", each)[0].strip() for each in COMMAND.findall(part))
            found.update(words)
    return sorted(found)


@pytest.mark.parametrize("command", commands_of_the_documents())
def test_each_command_that_the_documents_name_can_be_given(command: str) -> None:
    from chatterd.cli import _parser  # noqa: PLC0415 - only here

    words = shlex.split(command.removesuffix("\\"))[1:]
    if len(words) == 1:  # the command is named, not given
        words.append("--help")
    with pytest.raises(SystemExit, match=r"^0$") if "--help" in words else nullcontext():
        _parser().parse_args(words)


# By their paths here, or where install.md puts them; not those with a * or a <name> in them.
NAMED = re.compile(
    r"(?:(?<![\w./-])|(?<=/opt/chatterd/))"
    r"((?:chatterd|docs|tests|alembic|deploy|bench)/[\w./@-]*\w)(?![\w<*-])"
)


def files_of_the_documents() -> list[str]:
    """Each file of the repository that a document leads to or names."""
    found: set[str] = set()
    for path in GUIDES:
        text = path.read_text()
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", text)
        found.update(str((path.parent / link).resolve().relative_to(ROOT)) for link in links)
        found.update(NAMED.findall(text))
    return sorted(found - {"deploy/compose.env"})  # a copy that the operator makes


@pytest.mark.parametrize("name", files_of_the_documents())
def test_each_file_that_the_documents_name_is_there(name: str) -> None:
    assert (ROOT / name).exists()


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_place_in_a_document_that_another_leads_to_is_there() -> None:
    for path in GUIDES:
        for file, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", path.read_text()):
            target = path.parent / file if file else path
            assert anchor in anchors_of(target), f"{path.name}: {file}#{anchor}"


@pytest.mark.parametrize(
    "path", re.findall(r"\]\(([^)#:]+)\)|`((?:chatterd|docs|tests|alembic)/[\w./]+)`", README)
)
def test_each_file_that_the_readme_names_is_there(path: tuple[str, str]) -> None:
    assert (ROOT / "".join(path)).exists()
