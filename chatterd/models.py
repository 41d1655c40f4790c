"""The tables, and the `Select`s that read them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    FetchedValue,
    Index,
    Insert,
    MetaData,
    Select,
    Text,
    UniqueConstraint,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal_column,
    select,
    table,
    true,
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


_TABLE = literal_column("to_regclass('chatts')::oid::bigint", BigInteger)
# As the feed shows them: RFC 3339 in UTC with six fraction digits, a UUID in lower case.
_ROW = (
    Chatt.name,
    Chatt.message,
    cast(Chatt.id, Text).label("id"),
    func.to_char(func.timezone("UTC", Chatt.time), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"').label("time"),
    Chatt.image,
    Chatt.video,
)


def feed_newest(limit: int) -> Select[Any]:
    """Select the state of the feed and its last `limit` rows, newest first.

    The state is its epoch, its table and its newest seq. A table that has been restored from a
    dump keeps its epoch and is another table. Always at least one row; where there is no chatt,
    its own columns are NULL. One statement sees one state.
    """
    newest = select(func.coalesce(func.max(Chatt.seq), 0)).scalar_subquery()
    page = select(*_ROW).order_by(Chatt.time.desc(), Chatt.seq.desc()).limit(limit).lateral("page")
    return select(Feed.epoch, _TABLE.label("table"), newest.label("seq"), page).select_from(
        Feed.__table__.join(page, true(), isouter=True)
    )


def feed_changes(limit: int) -> Select[Any]:
    """Select `feed_state`'s epoch and table, and the rows whose seq is over `:seq`, in its order.

    Always at least one row; where nothing has changed, its own columns are NULL. `last_seq` is
    the last number given out, `:seq` or more unless the table has gone back in time.
    """
    changed = (
        select(Chatt.seq, *_ROW)
        .where(Chatt.seq > bindparam("seq", type_=BigInteger))
        .order_by(Chatt.seq)
        .limit(limit)
        .lateral("changed")
    )
    sequence = table("chatts_seq", column("last_value", BigInteger))
    return select(
        Feed.epoch, _TABLE.label("table"), sequence.c.last_value.label("last_seq"), changed
    ).select_from(Feed.__table__.join(sequence, true()).join(changed, true(), isouter=True))


def feed_page_before(limit: int) -> Select[Any]:
    """Select the last `limit` rows earlier than `:time`, newest first."""
    return (
        select(*_ROW)
        .where(Chatt.time < bindparam("time", type_=DateTime(timezone=True)))
        .order_by(Chatt.time.desc(), Chatt.seq.desc())
        .limit(limit)
    )


def feed_page(
    after: tuple[datetime, int] | None, before: datetime | None, limit: int
) -> Select[Any]:
    """Select the first `limit` rows behind the (time, seq) of `after`, in the feed's order.

    `before`: only rows earlier than that. The two last columns are the row's (time, seq).
    """
    statement = (
        select(*_ROW, Chatt.time.label("at"), Chatt.seq)
        .order_by(Chatt.time, Chatt.seq)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(tuple_(Chatt.time, Chatt.seq) > after)
    if before is not None:
        statement = statement.where(Chatt.time < before)
    return statement


def place_of(chatt_id: UUID) -> Select[datetime, int]:
    """Select the (time, seq) of a chatt."""
    return select(Chatt.time, Chatt.seq).where(Chatt.id == chatt_id)


def feed_page_back(before: tuple[datetime, int] | None, limit: int) -> Select[Any]:
    """Select the last `limit` rows before the (time, seq) of `before`, newest first."""
    statement = select(*_ROW).order_by(Chatt.time.desc(), Chatt.seq.desc()).limit(limit)
    if before is not None:
        statement = statement.where(tuple_(Chatt.time, Chatt.seq) < before)
    return statement


def insert_chatts() -> Insert:
    """Insert as many chatts as the arrays have elements: one statement for any number."""
    columns = ("name", "message", "image", "video")
    arrays = [bindparam(column, type_=ARRAY(Text)) for column in columns]
    rows = func.unnest(*arrays).table_valued(*columns).render_derived("posted")
    return insert(Chatt).from_select(columns, select(rows), include_defaults=False)
