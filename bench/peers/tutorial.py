"""The tutorial's program: Starlette, a psycopg pool, raw SQL, one statement per request.

Its JSON is made by `pydantic_core.to_json`, in one step from rows to bytes. Served by Granian with
one worker. It knows neither compression nor conditional or narrow reads.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypedDict

from psycopg_pool import AsyncConnectionPool
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

SCHEMA = """
    CREATE TABLE chatts (
        name varchar(255) NOT NULL,
        message varchar(4096) NOT NULL,
        id uuid NOT NULL,
        time timestamptz NOT NULL DEFAULT now()
    )
"""


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


app = Starlette(
    routes=[
        Route("/getchatts", _get_chatts, methods=["GET"]),
        Route("/postchatt", _post_chatt, methods=["POST"]),
    ],
    lifespan=_lifespan,
)
