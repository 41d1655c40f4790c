"""A check of `chatterd doctor` with settings of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from chatterd.doctor import Finding
from tests.process import environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ALONE = """
import json, os, sys
import asyncpg, PIL.Image, sqlalchemy.ext.asyncio, starlette.config  # once: they take longest
module, function, *arguments = json.loads(sys.argv[1])
for given in json.loads(sys.argv[2]):
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    os.environ.update(given)
    check = getattr(__import__(f"chatterd.doctor.{module}", fromlist=["*"]), function)
    print(json.dumps(check(*arguments)))
    sys.stdout.flush()
    os._exit(0)
"""


def alone(
    folder: Path, check: Sequence[str | None], *cases: Mapping[str, str]
) -> list[list[Finding]]:
    """Run a check once for each of these settings, in processes of their own: what each finds."""
    words = [json.dumps(check), json.dumps(cases)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [[Finding(*each) for each in json.loads(line)] for line in done.stdout.splitlines()]
    assert len(found) == len(cases), done.stderr
    return found
