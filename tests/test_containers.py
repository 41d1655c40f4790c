"""The files that build and run containers, as far as that can be told without an engine."""

import json
import re
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # its stubs are a package of their own

from chatterd.cli import _parser
from chatterd.settings import __annotations__ as settings
from tests.process import ROOT

DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions, each with what stands behind it."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in found]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_each_file_that_is_copied_is_there_and_sent_to_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [rest.split() for word, rest in instructions() if word == "COPY"]
    sources = [path for words in copied if "--from=build" not in words for path in words[:-1]]
    assert {"requirements.txt", "pyproject.toml", "alembic", "chatterd"} <= set(sources)
    for path in sources:
        assert (ROOT / path).exists()
        assert path not in ignored
    # What pyproject.toml needs to build the package.
    named = re.findall(
        r'^(?:readme|license-files) = \[?"([^"]+)"',
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE,
    )
    assert set(named) <= set(sources)
    assert {".env", "var", ".venv", ".git"} <= set(ignored)


def test_nothing_goes_through_a_shell_or_runs_as_root() -> None:
    steps = instructions()
    for word, rest in steps:
        if word in {"RUN", "CMD", "ENTRYPOINT"}:
            assert all(isinstance(each, str) for each in json.loads(rest))
        if word == "HEALTHCHECK":
            program, _, code = json.loads(rest.partition(" CMD ")[2])
            assert program == "python"
            compile(code, "HEALTHCHECK", "exec")
            assert "/livez" in code
    last = dict(steps[[word for word, _ in steps].index("USER") :])
    assert last["USER"] == "chatterd"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["chatterd"]
    _parser().parse_args(json.loads(last["CMD"]))
    pip = [json.loads(rest) for word, rest in steps if word == "RUN" and "requirements.txt" in rest]
    assert all("--require-hashes" in words for words in pip)


def test_the_services_have_what_they_name(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"postgres", "migrate", "configure", "chatterd", "nginx"}
    example = dict(
        re.findall(r"^(\w+)=(.+)$", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE)
    )
    text = (DEPLOY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    for service in services.values():
        assert set(service["networks"]) <= set(compose["networks"])
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"]
        for name, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in services[name]
        if "build" in service:
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            assert set(service["environment"]) <= set(settings)
            assert service["user"] if service is services["configure"] else "user" not in service


def test_the_server_is_started_as_it_can_be(compose: dict[str, Any]) -> None:
    _parser().parse_args(compose["services"]["chatterd"]["command"])
    _parser().parse_args(compose["services"]["migrate"]["command"])


def test_nginx_is_configured_as_it_can_be(compose: dict[str, Any]) -> None:
    service = compose["services"]["configure"]
    assert service["entrypoint"] == ["sh", "-c"]
    (line,) = service["command"]
    command, _, path = line.partition(" > ")
    assert path.startswith(service["volumes"][0].partition(":")[2])
    _parser().parse_args(command.split()[1:])
