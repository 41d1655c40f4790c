"""What `chatterd doctor` looks at, and how it says what it found.

This module needs no settings: they are among what may be wrong.
"""

import textwrap
from typing import Final, Literal, NamedTuple, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "fault"]

_WIDTH: Final = 80
_TEXT: Final = " " * 21
"""What the words of a finding stand behind: the level and the check's name."""
_COLOURS: Final = {"ok": "32", "warning": "33", "fault": "31"}


class Finding(NamedTuple):
    """What a check has found.

    level: a fault costs posts, answers or files, or soon will; a warning may come to that.
    found: what is, for people.
    mend: what to do about it, and `commands`, each to be given to a shell as it stands; empty
        where all is well.
    """

    level: Level
    found: str
    mend: str = ""
    commands: tuple[str, ...] = ()

    def text(self, check: str, *, is_coloured: bool = False) -> str:
        """Return the lines that say it, 80 columns wide but for commands."""
        level = f"{self.level:<7}"
        if is_coloured:
            level = f"\033[{_COLOURS[self.level]}m{level}\033[0m"
        found = textwrap.wrap(_printable(self.found), _WIDTH - len(_TEXT), break_on_hyphens=False)
        lines = [f"{level}  {check:<11} {found[0]}", *(_TEXT + line for line in found[1:])]
        mend = textwrap.wrap(_printable(self.mend), _WIDTH - len(_TEXT), break_on_hyphens=False)
        lines += [_TEXT + line for line in mend]
        lines += [f"{_TEXT}  {_printable(command)}" for command in self.commands]
        return "\n".join(lines) + "\n"


def ok(found: str) -> Finding:
    """Return that all is well."""
    return Finding("ok", found)


def warning(found: str, mend: str, *commands: str) -> Finding:
    """Return what may come to cost something, and how to mend it."""
    return Finding("warning", found, mend, commands)


def fault(found: str, mend: str, *commands: str) -> Finding:
    """Return what is wrong, and how to mend it."""
    return Finding("fault", found, mend, commands)


def _printable(text: str) -> str:
    """Return `text`, which may come from any file, without what a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
