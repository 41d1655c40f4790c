"""Chatts as objects, the way the resource routes and the stream show them (contract §2)."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.parse import quote

import msgspec

from chatterd import settings
from chatterd.keys import Posted
from chatterd.media import media_type_of
from chatterd.schemas import Draft

_ENCODER: Final = msgspec.json.Encoder()


class StoredChatt(NamedTuple):
    """A chatt with what is known of its files: the columns of `models.chatt`."""

    name: str
    message: str
    id: str
    time: str
    image: str | None
    video: str | None
    image_size: int | None
    image_width: int | None
    image_height: int | None
    video_size: int | None

    @classmethod
    def of(cls, record: Any) -> Self:  # noqa: ANN401 - SQLAlchemy's row or asyncpg's record
        """Return the chatt that stands at the end of a row of the database."""
        return cls(*tuple(record)[-len(cls._fields) :])


class Picture(msgspec.Struct):
    """Where a picture is, and what it is like; null is what is not known of an adopted one."""

    url: str
    type: str
    size: int | None
    width: int | None
    height: int | None


class Video(msgspec.Struct):
    """Where a video is, and what it is like."""

    url: str
    type: str
    size: int | None


class Chatt(msgspec.Struct):
    """A chatt."""

    id: str
    name: str
    message: str
    time: str
    image: Picture | None
    video: Video | None


class NewChatt(Chatt):
    """A chatt as whoever posted it sees it, once: with what deletes it."""

    delete_token: str


class Deleted(msgspec.Struct):
    """What is left of a chatt that was deleted."""

    id: str


class Chatts(msgspec.Struct):
    """A page of chatts, oldest first, and the cursor after which changes are news."""

    chatts: list[msgspec.Raw]
    cursor: str


class Changes(msgspec.Struct):
    """What happened after a cursor, and the next one.

    With `reset`, that cannot be told: the feed is to be read anew, and followed from here.
    """

    chatts: list[msgspec.Raw]
    deleted: list[str]
    reset: bool
    cursor: str


def encoded(chatt: StoredChatt, media_url: str) -> bytes:
    """Return the JSON of a chatt, with addresses under `media_url`."""
    return _ENCODER.encode(Chatt(*_members(chatt, media_url)))


def encoded_new(draft: Draft, posted: Posted, media_url: str) -> bytes:
    """Return the JSON of a chatt that has just been posted, or is posted again."""
    image, video = posted.files.get("image"), posted.files.get("video")
    stored = StoredChatt(
        draft.name,
        draft.message,
        str(posted.id),
        rfc3339(posted.time),
        image and image.key,
        video and video.key,
        image and image.size,
        image and image.width,
        image and image.height,
        video and video.size,
    )
    return _ENCODER.encode(NewChatt(*_members(stored, media_url), posted.delete_token))


def encoded_page(chatts: Iterable[StoredChatt], cursor: str, media_url: str) -> bytes:
    """Return the JSON of a page."""
    raw = [msgspec.Raw(encoded(chatt, media_url)) for chatt in chatts]
    return _ENCODER.encode(Chatts(raw, cursor))


def media_url_of(scheme: str, host: str) -> str:
    """Return what stands before the keys in media addresses, for a request of this origin."""
    # A WebSocket's address has schemes of its own: ws and wss.
    scheme = scheme.replace("ws", "http", 1)
    base = settings.PUBLIC_URL or f"{scheme}://{host}{settings.ROOT_PATH}"
    return f"{base}/media/"


def rfc3339(time: datetime) -> str:
    """Return a time as the feed shows it: in UTC, with six fraction digits."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _members(
    chatt: StoredChatt, media_url: str
) -> tuple[str, str, str, str, Picture | None, Video | None]:
    image = video = None
    if chatt.image is not None:
        image = Picture(
            media_url + quote(chatt.image),
            media_type_of(Path(chatt.image)),
            chatt.image_size,
            chatt.image_width,
            chatt.image_height,
        )
    if chatt.video is not None:
        video = Video(
            media_url + quote(chatt.video), media_type_of(Path(chatt.video)), chatt.video_size
        )
    return chatt.id, chatt.name, chatt.message, chatt.time, image, video
