"""The tables, and the `Select`s that read them."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    FetchedValue,
    Index,
    MetaData,
    Select,
    Text,
    UniqueConstraint,
    func,
    select,
    tuple_,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The declarative base. Every constraint has a name, so that a migration can change it."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        }
    )


class Chatt(Base):
    """One post.

    seq: its place in commit order. Triggers give it at INSERT and a new one at every UPDATE,
        whatever the statement says, so `seq > cursor` finds all that changed after the cursor.
    id: what clients know it by.
    name, message: the author and the text, as posted.
    time: when it was posted. The feed is ordered by (time, seq).
    image, video: keys of media files, never URLs.
    """

    __tablename__ = "chatts"

    seq: Mapped[int] = mapped_column(
        BigInteger,
        primary_key=True,
        autoincrement=False,
        server_default=FetchedValue(),
        server_onupdate=FetchedValue(),
    )
    name: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)
    id: Mapped[UUID] = mapped_column(server_default=func.gen_random_uuid())
    time: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp()
    )
    image: Mapped[str | None] = mapped_column(Text)
    video: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        UniqueConstraint("id"),
        Index(None, "time", "seq"),
        # What RFC 3339 and Python's datetime can say; PostgreSQL's infinity is beyond it.
        CheckConstraint(
            "time >= '0001-01-01 00:00:00+00' AND time < '10000-01-01 00:00:00+00'",
            name="time_years_1_to_9999",
        ),
    )
    # An UPDATE changes seq: to the ORM, a chatt's identity is its id.
    __mapper_args__ = {"primary_key": ["id"]}  # noqa: RUF012 SQLAlchemy reads it once


class Feed(Base):
    """The feed as a whole: always one row.

    epoch: random, and new whenever rows were removed rather than changed (DELETE, TRUNCATE).
        A cursor of another epoch cannot be resumed.
    """

    __tablename__ = "feed"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default="true")
    epoch: Mapped[UUID] = mapped_column(server_default=func.gen_random_uuid())

    __table_args__ = (CheckConstraint("singleton", name="singleton"),)


def feed_page(
    after: tuple[datetime, int] | None, limit: int
) -> Select[str, str, UUID, datetime, str | None, str | None, int]:
    """Select the first `limit` chatts behind the (time, seq) of `after`, in the feed's order."""
    statement = (
        select(
            Chatt.name,
            Chatt.message,
            Chatt.id,
            Chatt.time,
            Chatt.image,
            Chatt.video,
            Chatt.seq,
        )
        .order_by(Chatt.time, Chatt.seq)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(tuple_(Chatt.time, Chatt.seq) > after)
    return statement
