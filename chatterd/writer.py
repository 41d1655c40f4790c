"""The one way in: a chatt is stored when `Writer.post` returns."""

from chatterd.database import Database
from chatterd.models import Chatt
from chatterd.schemas import Draft


class Writer:
    """Stores chatts, one transaction each."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def post(self, draft: Draft, image: str | None = None, video: str | None = None) -> None:
        """Store a chatt; returning means committed.

        `image` and `video` are keys of files that are in place. Raises `DatabaseUnavailable`.
        """
        async with self._database.transaction() as session:
            session.add(
                Chatt(name=draft.name, message=draft.message, image=image, video=video),
            )
