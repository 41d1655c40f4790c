"""Settings: what is refused at start, what is accepted, where they come from."""

import ast
import os
import runpy
import shutil
from pathlib import Path

import httpx2
import pytest
from sqlalchemy.engine import make_url

from tests.process import Server, assert_refused, environment, run

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / ".env.example"
URL = "postgresql://ann:geheim@localhost/chatter"
PASSWORD = "geheim"  # noqa: S105 - of a database that does not exist


def shown(folder: Path, **settings: str) -> dict[str, str]:
    """Every setting, as text, as a program that is started in this folder has it.

    Their module is run anew; a process for each case would take a minute more.
    """
    variables = environment(folder, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in os.environ.keys() - variables:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        values = runpy.run_path(str(ROOT / "chatterd" / "settings.py"))
    found = {name: str(value) for name, value in values.items() if name.isupper()}
    if values["DATABASE_URL"] is not None:
        found["DATABASE_URL"] = values["DATABASE_URL"].render_as_string(hide_password=False)
    return found


def refusal(folder: Path, **settings: str) -> str:
    """Return the line with which a program ends that is started in this folder."""
    with pytest.raises(SystemExit) as ended:
        shown(folder, **settings)
    line = ended.value.code
    assert isinstance(line, str)  # which Python prints, to exit with 1
    assert line.startswith("chatterd: ")
    assert "\n" not in line
    return line


# A wrong value, what is said of it, and what is said to be right.
WRONG = [
    ("DATABASE_URL", "chatter", "cannot be read as a URL", "postgresql://"),
    ("DATABASE_URL", f"mysql://ann:{PASSWORD}@localhost/chatter", "'mysql'", "postgresql://"),
    ("DATABASE_URL", "sqlite:///chatter.db", "'sqlite'", "postgresql://"),
    ("DATABASE_URL", f"postgresql+psycopg://ann:{PASSWORD}@h/c", "+psycopg", "postgresql://"),
    ("DATABASE_URL", f"postgresql://ann:{PASSWORD}@localhost", "no database", "5432/database"),
    ("DATABASE_URL", f"postgresql://ann:{PASSWORD}@localhost:no/c", "cannot be read", "5432"),
    ("DATABASE_URL", f"postgresql://ann:{PASSWORD}@localhost:70000/c", "port 70000", "5432"),
    ("DATABASE_URL", f"postgresql://ann:{PASSWORD}@localhost:0/c", "port 0", "5432"),
    ("DATABASE_URL", f"{URL}?sslmode=sometimes", "sslmode", "postgresql://"),
    ("DATABASE_URL", f"{URL}?colour=green", "colour", "postgresql://"),
    ("DATABASE_POOL_SIZE", "0", "out of range", "5 to 1000"),
    ("DATABASE_POOL_SIZE", "1001", "out of range", "5 to 1000"),
    ("DATABASE_POOL_SIZE", "many", "'many'", "5 to 1000"),
    ("DATABASE_TIMEOUT", "0", "out of range", "1 to 600"),
    ("DATABASE_TIMEOUT", "601", "out of range", "1 to 600"),
    ("DATABASE_TIMEOUT", "5s", "'5s'", "seconds"),
    ("DATABASE_TIMEOUT", "", "''", "seconds"),
    ("PG_BIN", "a-file", "a file", "folder that holds initdb and postgres"),
    ("MEDIA_ROOT", "a-file", "a file", "a folder"),
    ("PUBLIC_URL", "chatter.example", "'chatter.example'", "https://chatter.example"),
    ("PUBLIC_URL", "ftp://chatter.example", "'ftp://chatter.example'", "https://"),
    ("PUBLIC_URL", "https://", "'https://'", "https://chatter.example"),
    ("PUBLIC_URL", "https://chatter.example:port", "no address", "https://"),
    ("PUBLIC_URL", "https://chatter.example/?a=1", "more than", "https://"),
    ("PUBLIC_URL", "https://chatter.example/#top", "more than", "https://"),
    ("PUBLIC_URL", f"https://ann:{PASSWORD}@chatter.example", "more than", "https://"),
    ("ALLOWED_HOSTS", "", "no host", "chatter.example"),
    ("ALLOWED_HOSTS", ",", "no host", "chatter.example"),
    ("ALLOWED_HOSTS", "https://chatter.example", "'https://chatter.example'", "host names"),
    ("ALLOWED_HOSTS", "chatter.example, a b", "'a b'", "host names"),
    ("ALLOWED_HOSTS", "chatter.*", "'chatter.*'", "host names"),
    ("ROOT_PATH", "chatter", "'chatter'", "/chatter"),
    ("ROOT_PATH", "/a/../b", "'/a/../b'", "/chatter"),
    ("ROOT_PATH", "/a//b", "'/a//b'", "/chatter"),
    ("ROOT_PATH", "/%41", "'/%41'", "/chatter"),
    ("TRUSTED_PROXIES", "localhost", "'localhost'", "addresses and networks"),
    ("TRUSTED_PROXIES", "10.0.0.1/8", "'10.0.0.1/8'", "addresses and networks"),
    ("TRUSTED_PROXIES", "*", "'*'", "addresses and networks"),
    ("PROXY_HEADERS", "both", "'both'", "RFC 7239"),
    ("METRICS_ALLOWED", "any", "'any'", "addresses and networks"),
    ("SHUTDOWN_TIMEOUT", "3601", "out of range", "0 to 3600"),
    ("LOG_LEVEL", "INFO", "'INFO'", "debug, info, warning or error"),
    ("LOG_FORMAT", "xml", "'xml'", "text, json, or auto"),
    ("SLOW_QUERY_MILLISECONDS", "0.5", "'0.5'", "0 to 600000"),
    ("OLLAMA_URL", "", "''", "http://localhost:11434"),
    ("OLLAMA_URL", "localhost:11434", "'localhost:11434'", "http://localhost:11434"),
    ("NAME_MAX_LENGTH", "0", "out of range", "1 to 10000"),
    ("NAME_MAX_LENGTH", "-1", "'-1'", "1 to 10000"),
    ("MESSAGE_MAX_LENGTH", "0", "out of range", "1 to 1000000"),
    ("MESSAGE_MAX_LENGTH", "1_000", "'1_000'", "1 to 1000000"),
    ("JSON_MAX_SIZE", "1023", "out of range", "1024"),
    ("JSON_MAX_SIZE", "64 KiB", "'64 KiB'", "1024"),
    ("MEDIA_MAX_SIZE", "10.5", "'10.5'", "1 to 1099511627776"),
    ("MEDIA_MAX_SIZE", "9" * 5000, "no whole number", "1 to 1099511627776"),
    ("MEDIA_MAX_SIZE", "٣٠٠٠", "'٣٠٠٠'", "1 to 1099511627776"),
    ("MEDIA_TOTAL_SIZE", "0", "out of range", "1125899906842624, or empty"),
    ("MEDIA_FREE_FLOOR", "", "''", "0 to 1125899906842624"),
    ("UPLOADS_MAX", "0", "out of range", "1 to 10000"),
    ("MEDIA_MAX_PIXELS", "0", "out of range", "1 to 1000000000"),
    ("MEDIA_MAX_PIXELS", "1000000001", "out of range", "1 to 1000000000"),
    ("MEDIA_MAX_PIXELS", "50 MP", "'50 MP'", "pixels"),
    ("UPLOAD_TIMEOUT", "0", "out of range", "1 to 86400"),
    ("UPLOAD_TIMEOUT", "86401", "out of range", "1 to 86400"),
    # A file of shell's habits: the comment would silently become a part of the value.
    ("MEDIA_ROOT", "media # the pictures", "comment", "a folder"),
    ("DATABASE_URL", f"{URL} # ours", "comment", "postgresql://"),
]


@pytest.mark.parametrize(
    ("name", "value", "fault", "right"), WRONG, ids=[f"{case[0]}={case[1][:40]}" for case in WRONG]
)
def test_a_wrong_value_ends_the_start_with_one_line(
    tmp_path: Path, name: str, value: str, fault: str, right: str
) -> None:
    (tmp_path / "a-file").touch()
    line = refusal(tmp_path, **{name: value})
    for word in (name, fault, right):
        assert word in line
    assert PASSWORD not in line
    assert len(line) < 6000
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


PROGRAMS = {
    "chatterd serve": ("chatterd", "serve", "--port", "0"),
    "chatterd migrate": ("chatterd", "migrate"),
    "alembic": ("alembic", "upgrade", "head"),
    "hypercorn": ("hypercorn", "chatterd.app:app", "--bind", "127.0.0.1:0"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_value_ends_every_program_with_the_same_line(tmp_path: Path, program: str) -> None:
    module, *arguments = PROGRAMS[program]
    folder = ROOT if module == "alembic" else tmp_path  # where its configuration is
    done = run(folder, *arguments, program=module, DATABASE_URL="mysql://ann:geheim@h/c")
    assert done.stderr.startswith("chatterd: DATABASE_URL names the database 'mysql'. It must be ")
    assert done.stderr.count("\n") == 1
    assert PASSWORD not in done.stderr
    # Hypercorn ends with 0 whatever its worker ends with.
    assert done.returncode == (0 if module == "hypercorn" else 1)


@pytest.mark.parametrize(
    "password", ["geheim/geheim", "geheim@geheim:geheim", "[geheim", "geheim#"]
)
def test_a_password_is_in_no_message_even_when_it_makes_the_url_wrong(
    tmp_path: Path, password: str
) -> None:
    line = refusal(tmp_path, DATABASE_URL=f"postgres://ann:{password}@/")
    assert "DATABASE_URL" in line
    assert PASSWORD not in line


# What is written, and what it means.
RIGHT = [
    ("DATABASE_URL", "", "None"),
    ("DATABASE_URL", URL, "postgresql+asyncpg://ann:geheim@localhost/chatter"),
    ("DATABASE_URL", "postgres://h/c", "postgresql+asyncpg://h/c"),
    ("DATABASE_URL", "postgresql+asyncpg://h:6543/c", "postgresql+asyncpg://h:6543/c"),
    ("DATABASE_URL", "postgres://h/c?sslmode=require", "postgresql+asyncpg://h/c?ssl=require"),
    ("DATABASE_URL", "postgres://ann:p%40ss@h/c", "postgresql+asyncpg://ann:p%40ss@h/c"),
    ("DATABASE_URL", "postgres:///c?host=/run", "postgresql+asyncpg:///c?host=%2Frun"),
    ("DATABASE_POOL_SIZE", "1000", "1000"),
    ("DATABASE_TIMEOUT", " 7 ", "7"),
    ("PG_BIN", "/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/15/bin"),
    ("MEDIA_ROOT", "/srv/media", "/srv/media"),
    ("PUBLIC_URL", "", "None"),
    ("PUBLIC_URL", "https://chatter.example/", "https://chatter.example"),
    ("PUBLIC_URL", "http://[::1]:8000/chatter", "http://[::1]:8000/chatter"),
    ("ALLOWED_HOSTS", "*", "('*',)"),
    ("ALLOWED_HOSTS", "A.example, *.b.example,", "('a.example', '*.b.example')"),
    ("ALLOWED_HOSTS", "192.0.2.1,chat_1", "('192.0.2.1', 'chat_1')"),
    ("ROOT_PATH", "/", ""),
    ("ROOT_PATH", "/chatter/v2/", "/chatter/v2"),
    ("TRUSTED_PROXIES", "", "Peers(networks=(), unix=False)"),
    ("TRUSTED_PROXIES", "unix, ", "Peers(networks=(), unix=True)"),
    (
        "TRUSTED_PROXIES",
        "10.0.0.0/8,::1",
        "Peers(networks=(IPv4Network('10.0.0.0/8'), IPv6Network('::1/128')), unix=False)",
    ),
    ("OLLAMA_URL", "https://ollama.example/v/", "https://ollama.example/v"),
    ("MEDIA_MAX_SIZE", "1099511627776", "1099511627776"),
    ("MEDIA_MAX_PIXELS", "1000000000", "1000000000"),
]


@pytest.mark.parametrize(
    ("name", "value", "meaning"), RIGHT, ids=[f"{case[0]}={case[1]}" for case in RIGHT]
)
def test_a_right_value_is_understood(tmp_path: Path, name: str, value: str, meaning: str) -> None:
    assert shown(tmp_path, **{name: value})[name] == meaning


@pytest.mark.parametrize("sslmode", ["disable", "prefer"])
def test_the_urls_of_hosting_services_reach_the_database(
    tmp_path: Path, database_url: str, sslmode: str
) -> None:
    url = make_url(database_url).set(drivername="postgres")
    url = url.update_query_dict({"sslmode": sslmode})
    done = run(tmp_path, "migrate", DATABASE_URL=url.render_as_string(hide_password=False))
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_file_the_defaults_count_and_nothing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = shown(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert values["MEDIA_ROOT"] == str(tmp_path / "var" / "media")
    assert (values["NAME_MAX_LENGTH"], values["DATABASE_URL"]) == ("255", "None")


def test_a_relative_folder_is_below_the_working_directory(tmp_path: Path) -> None:
    assert shown(tmp_path, MEDIA_ROOT="here/media")["MEDIA_ROOT"] == f"{tmp_path}/here/media"


def test_a_home_folder_can_be_written_with_a_tilde(tmp_path: Path) -> None:
    assert shown(tmp_path, MEDIA_ROOT="~/media")["MEDIA_ROOT"] == f"{tmp_path}/media"


@pytest.mark.parametrize(
    "line",
    ["NAME_MAX_LENGTH=20", 'NAME_MAX_LENGTH="20"', "NAME_MAX_LENGTH='20'", " NAME_MAX_LENGTH = 20"],
)
def test_a_file_in_the_working_directory_is_read(tmp_path: Path, line: str) -> None:
    (tmp_path / ".env").write_text(f'# a comment\n\n{line}\nMEDIA_ROOT="my media"\n')
    values = shown(tmp_path)
    assert values["NAME_MAX_LENGTH"] == "20"
    assert values["MEDIA_ROOT"] == str(tmp_path / "my media")


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("NAME_MAX_LENGTH=20\nMESSAGE_MAX_LENGTH=30\n")
    values = shown(tmp_path, NAME_MAX_LENGTH="40")
    assert (values["NAME_MAX_LENGTH"], values["MESSAGE_MAX_LENGTH"]) == ("40", "30")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("NAME_MAX_LENGTH=20 # characters", "has a comment behind its value"),
        ("NAME_MAX_LENGTH=", "''"),
        ("NAME_MAX_LENGTH=twenty", "'twenty'"),
    ],
)
def test_a_wrong_value_in_the_file_ends_the_start_with_one_line(
    tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / ".env").write_text(f"{line}\n")
    done = run(tmp_path, "serve", "--port", "0")
    assert_refused(done, "NAME_MAX_LENGTH", words, "1 to 10000")


def test_a_file_that_is_no_text_ends_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"NAME_MAX_LENGTH=\xff\n")
    assert_refused(run(tmp_path, "serve", "--port", "0"), ".env")


def test_the_example_lists_exactly_the_settings_and_their_defaults() -> None:
    lines = EXAMPLE.read_text().splitlines()
    listed = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert listed == defaults()
    assert "DATABASE_URL" in listed


def test_each_setting_of_the_example_has_its_comment_above() -> None:
    blocks = EXAMPLE.read_text().strip().split("\n\n")
    assert len(blocks) > 1
    for block in blocks[1:]:
        assert block.startswith("# "), block
        assert "=" in block, block


def test_a_server_starts_with_the_example_as_it_is(tmp_path: Path, database_url: str) -> None:
    shutil.copy(EXAMPLE, tmp_path / ".env")
    with Server(tmp_path, DATABASE_URL=database_url) as server:
        assert httpx2.get(f"{server.url}/getchatts").status_code == 200
        assert server.stop() == 0
        assert server.log == ""


def defaults() -> dict[str, str]:
    """Every call of `_setting` in the settings' source: its name and its default."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / "chatterd" / "settings.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_setting":
            name, default = node.args[0], node.args[2]
            assert isinstance(name, ast.Constant)
            assert isinstance(default, ast.Constant)
            found[str(name.value)] = str(default.value)
    return found
