"""Settings: what is refused at start, what is accepted, where they come from."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest
from sqlalchemy.engine import make_url

from chatterd import settings as settings_module
from tests.process import Server, assert_refused, run

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / ".env.example"
URL = "postgresql://ann:geheim@localhost/chatter"


def read(folder: Path, name: str, **settings: str) -> str:
    """Return the setting as a program that starts in this folder has it, as text."""
    done = run(folder, "show.py", program="runpy", **settings) if False else _show(folder, settings)
    assert (done.returncode, done.stderr) == (0, ""), done
    values: dict[str, str] = json.loads(done.stdout)
    return values[name]
