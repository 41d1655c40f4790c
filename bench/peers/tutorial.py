"""The tutorial's program: Starlette, a psycopg pool, raw SQL, one statement per request.

Its JSON is made by `pydantic_core.to_json`, in one step from rows to bytes. Served by Granian with
one worker. It knows neither compression nor conditional or narrow reads. A form is received by
Starlette, which puts its files on the disk first, and its files are then read and written again.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict
from uuid import uuid4

from psycopg_pool import AsyncConnectionPool
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from werkzeug.utils import secure_filename

SCHEMA = """
    CREATE TABLE chatts (
        name varchar(255) NOT NULL,
        message varchar(4096) NOT NULL,
        id uuid NOT NULL,
        time timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE images (
        name varchar(255) NOT NULL,
        message varchar(4096) NOT NULL,
        id uuid NOT NULL,
        time timestamptz NOT NULL DEFAULT now(),
        imageurl text,
        videourl text
    )
"""
_MEDIA: Final = Path(os.environ.get("MEDIA_ROOT", "media"))


@dataclass
class _Chatt:
    name: str
    message: str


class _State(TypedDict):
    pool: AsyncConnectionPool


@asynccontextmanager
async def _lifespan(_app: Starlette) -> AsyncIterator[_State]:
    pool = AsyncConnectionPool(os.environ["TUTORIAL_CONNINFO"], open=False)
    await pool.open()
    yield {"pool": pool}
    await pool.close()


async def _get_chatts(request: Request[_State]) -> Response:
    async with request.state["pool"].connection() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT name, message, id, time FROM chatts ORDER BY time ASC")
        return Response(to_json(await cursor.fetchall()), media_type="application/json")


async def _post_chatt(request: Request[_State]) -> Response:
    chatt = _Chatt(**await request.json())
    async with request.state["pool"].connection() as connection, connection.cursor() as cursor:
        await cursor.execute(
            "INSERT INTO chatts (name, message, id) VALUES (%s, %s, gen_random_uuid())",
            (chatt.name, chatt.message),
        )
    return JSONResponse({})


async def _post_images(request: Request[_State]) -> Response:
    async with request.form() as form:
        name = str(form["username"])
        message = str(form["message"])
        imageurl = await _saved(form, "image", name, ".jpeg", request)
        videourl = await _saved(form, "video", name, ".mp4", request)
    async with request.state["pool"].connection() as connection, connection.cursor() as cursor:
        await cursor.execute(
            "INSERT INTO images (name, message, id, imageurl, videourl)"
            " VALUES (%s, %s, gen_random_uuid(), %s, %s)",
            (name, message, imageurl, videourl),
        )
    return JSONResponse({})


async def _saved(
    form: FormData, field: str, name: str, extension: str, request: Request[_State]
) -> str | None:
    """Write the file in `field`; return its address."""
    upload = form.get(field)
    if not isinstance(upload, UploadFile):
        return None
    filename = secure_filename(f"{name}-{uuid4()}{extension}")
    with (_MEDIA / filename).open("wb") as file:
        file.write(await upload.read())
    return f"{request.url.scheme}://{request.url.netloc}/media/{filename}"


app = Starlette(
    routes=[
        Route("/getchatts", _get_chatts, methods=["GET"]),
        Route("/postchatt", _post_chatt, methods=["POST"]),
        Route("/postimages", _post_images, methods=["POST"]),
    ],
    lifespan=_lifespan,
)
