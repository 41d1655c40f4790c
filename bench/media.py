"""What is measured with pictures and videos beside requests per second."""

import json
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bench import load, pictures, uploads
from bench.load import Load, Run
from bench.pictures import FORM_TYPE, VIDEO_BYTES, Form
from bench.programs import Program
from bench.scenarios import Outcome

_MIB: Final = 1 << 20
MAX_BYTES: Final = 10 * _MIB
"""chatterd's limit for a picture."""
_HELD: Final = 32
_HELD_SENT_BYTES: Final = 8_000_000
_OVER_LIMIT_BYTES: Final = 400_000_000
_SOCKET_BUFFERS_BYTES: Final = 8 * _MIB
_BESIDE: Final = 20


def upload(program: Program, body: bytes) -> None:
    """Upload a form; raises `RuntimeError` with what the answer says where it is refused."""
    answer = program.request("/postimages", "POST", FORM_TYPE, body)
    if answer.status != 200:
        try:
            detail = json.loads(answer.body)["detail"]
        except (ValueError, KeyError, TypeError):
            detail = answer.body[:300].decode(errors="replace")
        raise RuntimeError(f"{program.name} answers an upload {answer.status}: {detail}")


def video_path(chatterd: Program) -> str:
    """Upload the video; return the path at which it is served."""
    upload(chatterd, pictures.video_body())
    newest = json.loads(chatterd.request("/getimages").body)[-1]
    path: str = urlsplit(newest[5]).path
    if chatterd.download(path) != VIDEO_BYTES:
        raise RuntimeError("the video has not the length that it should have")
    return path


def memory(outcome: Outcome, chatterd: Program, form: Form) -> None:
    """Compare a server that has just started with itself while it waits for many uploads."""
    server, together = chatterd.server_bytes(), chatterd.resident_bytes()
    children = together - server
    with uploads.held(chatterd.port, form, _HELD, _HELD_SENT_BYTES):
        chatterd.settle()
        server_grown = chatterd.server_bytes() - server
        children_grown = chatterd.resident_bytes() - together - server_grown
    each = server_grown / _HELD / _MIB
    outcome.unit = "MiB"
    outcome.figures["chatterd"] = each
    outcome.stay_within("allowed", 1.0, each)
    outcome.note = (
        f"{_HELD} uploads: the server {server / _MIB:.1f} + {server_grown / _MIB:.1f} MiB,"
        f" its children {children / _MIB:.1f} + {children_grown / _MIB:.1f} MiB"
    )


def over_limit(outcome: Outcome, chatterd: Program, form: Form) -> None:
    """See how much of an upload that is too large is taken, and how much of it on the disk."""
    before = uploads.size(chatterd.media)
    with uploads.LargestSize(chatterd.media) as largest:
        refusal = uploads.refused(chatterd.port, form, _OVER_LIMIT_BYTES)
    if refusal.status != 413:
        raise RuntimeError(f"the upload is answered {refusal.status}")
    grown = max(0, largest.bytes - before) / _MIB
    taken = refusal.taken_bytes / _MIB
    outcome.unit = "MiB"
    outcome.figures["chatterd"] = taken
    outcome.stay_within("allowed", (MAX_BYTES + _SOCKET_BUFFERS_BYTES) / _MIB, taken)
    outcome.stay_within("allowed on the disk", MAX_BYTES / _MIB, grown)
    outcome.note = (
        f"{refusal.status} after {taken:.1f} MiB, {refusal.sent_bytes / _MIB:.1f} MiB until the"
        f" end; on the disk {grown:.1f} MiB, in {largest.looks} looks"
    )


class Beside:
    """How long a reader waits while others upload, and just before."""

    def __init__(self, chatterd: Program, form: Path, bodies: Path) -> None:
        self._chatterd = chatterd
        self._form = form
        self._bodies = bodies
        self._idle: list[Run] = []
        self._busy: list[Run] = []
        self._answers: Counter[str] = Counter()

    def before(self) -> None:
        """Measure for a second. Only before any uploads: for a while after them it is slower."""
        self._idle.append(self._read(1))

    def round(self, seconds: int) -> None:
        """Measure for so many seconds while the uploads run."""
        chatterd = self._chatterd
        with uploads.endless(chatterd.port, self._form, chatterd.media, _BESIDE) as found:
            self._busy.append(self._read(seconds))
        self._answers.update(found.answers)
        chatterd.settle()
        uploads.remove(chatterd.media)

    def _read(self, seconds: int) -> Run:
        return load.run(Load(1), self._chatterd.port, seconds, self._bodies)

    def note(self, outcome: Outcome) -> None:
        """Note the medians of the rounds."""
        idle, busy = (
            statistics.median(run.latency_p99 for run in runs) for runs in (self._idle, self._busy)
        )
        outcome.runs = {
            "before": [asdict(run) for run in self._idle],
            "chatterd": [asdict(run) for run in self._busy],
        }
        outcome.unit = "ms"
        outcome.figures["chatterd"] = busy
        outcome.stay_within("allowed", 3 * idle, busy)
        outcome.note = f"before {idle:.2f} ms; answers to uploads {dict(self._answers)}"
        if set(self._answers) - {"200", "503"} or not self._answers["200"]:
            outcome.fault = "invalid"
        errors = {kind for run in (*self._idle, *self._busy) for kind in run.errors}
        if errors:
            outcome.fault = "invalid"
            outcome.note += f"; the reader's errors {sorted(errors)}"
