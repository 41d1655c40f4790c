"""Chatts as the resource routes and the stream show them, made from what the database has."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

if TYPE_CHECKING:
    import asyncpg
    import httpx2

    from tests.multipart import Connection

    Object: TypeAlias = dict[str, Any]

TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".heic": "image/heic",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}

_OBJECTS = """
    SELECT id::text, name, message, image, video,
        to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS time,
        picture.size, picture.width, picture.height, film.size AS video_size
    FROM chatts
    LEFT JOIN media AS picture ON picture.key = image
    LEFT JOIN media AS film ON film.key = video
"""

TOMBSTONE = (
    "UPDATE chatts SET deleted = true, name = '', message = '', image = NULL, video = NULL,"
    " delete_token_hash = NULL"
)
"""What deleting makes of a chatt, as another program may do it."""


async def objects(db: Connection, base: str, order: str = "time, seq") -> list[Object]:
    """Every chatt that was not deleted, with addresses under `base`."""
    rows = await db.fetch(f"{_OBJECTS} WHERE NOT deleted ORDER BY {order}")
    return [_object(row, f"{base}/media/") for row in rows]


def _object(row: asyncpg.Record, media_url: str) -> Object:
    image = video = None
    if row["image"] is not None:
        image = _file(row["image"], media_url)
        image |= {name: row[name] for name in ("size", "width", "height")}
    if row["video"] is not None:
        video = _file(row["video"], media_url) | {"size": row["video_size"]}
    texts = {name: row[name] for name in ("id", "name", "message", "time")}
    return texts | {"image": image, "video": video}


def _file(key: str, media_url: str) -> Object:
    kind = TYPES.get(PurePath(key).suffix, "application/octet-stream")
    return {"url": media_url + quote(key), "type": kind}


def base_of(client: httpx2.AsyncClient) -> str:
    return str(client.base_url).rstrip("/")


async def post(client: httpx2.AsyncClient, message: str, **headers: str) -> Object:
    """Post a chatt; return it, with its delete token."""
    draft = {"name": "ann", "message": message}
    response = await client.post("/v1/chatts", json=draft, headers=headers)
    assert response.status_code == 201, response.content
    found: Object = response.json()
    return found


async def delete(client: httpx2.AsyncClient, chatt: Object) -> None:
    headers = {"Chatterd-Delete-Token": chatt["delete_token"]}
    response = await client.delete(f"/v1/chatts/{chatt['id']}", headers=headers)
    assert (response.status_code, response.content) == (204, b"")
