"""What crosses the wire, both ways: checked drafts coming in, rows going out (contract §1)."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from chatterd import settings
from chatterd.errors import Problem

_TEXT_FIELDS: Final = frozenset({"name", "username", "message"})


class Draft(NamedTuple):
    """A chatt as its author sent it, checked: PostgreSQL will take both texts."""

    name: str
    message: str


def draft_from_json(body: bytes) -> Draft:
    """Return the draft in the JSON object `body`.

    Raises `Problem` 422 for what is no JSON object or has missing, unknown or unusable fields,
    400 for a text over its limit.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise Problem("json-invalid", f"The body is not valid JSON: {reason}.") from error
    if not isinstance(fields, dict):
        raise Problem("json-invalid", "The body must be a JSON object with name and message.")
    return draft_from_fields(fields)


def draft_from_fields(fields: Mapping[str, Any]) -> Draft:
    """Return the draft in `fields`, which came as JSON or as a form; raises as `draft_from_json`.

    The author stands under `name` or, in older clients, `username`.
    """
    for key in fields:
        if key not in _TEXT_FIELDS:
            raise Problem(
                "field-unknown",
                f"There is no field {key[:64]!r}; a chatt has name (or username) and message.",
            )
    name = fields.get("name", fields.get("username"))
    if "name" in fields and fields.get("username", name) != name:
        raise Problem("name-ambiguous", "name and username differ; send one of them.")
    if "name" not in fields and "username" not in fields:
        raise Problem("name-missing", "name is missing; it says who is posting.")
    if "message" not in fields:
        raise Problem("message-missing", "message is missing; it may be empty.")
    draft = Draft(_text("name", name), _text("message", fields["message"]))
    if not draft.name.strip():
        raise Problem("name-blank", "name is blank; it says who is posting.")
    _limit("name", draft.name, settings.NAME_MAX_LENGTH)
    _limit("message", draft.message, settings.MESSAGE_MAX_LENGTH)
    return draft


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise Problem(f"{field}-invalid", f"{field} must be a string.")
    # Valid JSON, but PostgreSQL's text has no place for it.
    if "\0" in value:
        raise Problem(f"{field}-invalid", f"{field} must not contain the character U+0000.")
    return value


def _limit(field: str, value: str, limit: int) -> None:
    # Code points on both sides: Python's len() and PostgreSQL's char_length() agree.
    if len(value) > limit:
        raise Problem(
            f"{field}-too-long",
            f"Message too long: {field} has {len(value)} characters, the limit is {limit}.",
        )
