"""The tables, and the `Select`s that read them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    ColumnElement,
    DateTime,
    Delete,
    FetchedValue,
    Float,
    Index,
    Insert,
    MetaData,
    Select,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    table,
    text,
    true,
    tuple_,
    union,
)
from sqlalchemy.dialects import postgresql
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
        # Who still names a file, of the few chatts that have one.
        Index("ix_chatts_image", "image", postgresql_where=text("image IS NOT NULL")),
        Index("ix_chatts_video", "video", postgresql_where=text("video IS NOT NULL")),
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


class Media(Base):
    """A stored file, which any number of chatts may name. The files of adopted chatts have none.

    key: its name under MEDIA_ROOT.
    size: in bytes.
    width, height: of a picture, in pixels, right way up.
    stored: when somebody uploaded it last; a file that is not named by then is about to be.
    """

    __tablename__ = "media"

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int | None]
    height: Mapped[int | None]
    stored: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp()
    )


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

_KEYS = bindparam("keys", type_=ARRAY(Text))
_OLDER_THAN = bindparam("older_than", type_=Float)
_STALE = Media.stored < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, _OLDER_THAN)


def _page(limit: int, *where: ColumnElement[bool], backward: bool = False) -> Select[Any]:
    """Select the feed's first rows, or its last, newest first; then each one's (time, seq)."""
    order = (column.desc() if backward else column for column in (Chatt.time, Chatt.seq))
    return (
        select(*_ROW, Chatt.time.label("at"), Chatt.seq).where(*where).order_by(*order).limit(limit)
    )


def _within(size: int, page: Select[Any], *, backward: bool = False) -> Select[Any]:
    """Select the rows of `page` as far as they begin within `size` bytes of text.

    One more column, `read`, has the bytes up to the row's end. Where the last row's is `size` or
    more, rows may have been left out.
    """
    octets = func.octet_length(Chatt.name) + func.octet_length(Chatt.message)
    rows = page.add_columns(octets.label("octets")).subquery()
    order = [column.desc() if backward else column for column in (rows.c.at, rows.c.seq)]
    read = func.sum(rows.c.octets).over(order_by=order, rows=(None, 0))
    counted = select(rows, read.label("read")).subquery()
    order = [column.desc() if backward else column for column in (counted.c.at, counted.c.seq)]
    columns = (column for column in counted.c if column.key != "octets")
    return select(*columns).where(counted.c.read - counted.c.octets < size).order_by(*order)


def feed_newest(limit: int, size: int) -> Select[Any]:
    """Select the state of the feed and its last rows as `feed_page_before` does.

    The state is its epoch, its table and its newest seq. A table that has been restored from a
    dump keeps its epoch and is another table. Always at least one row; where there is no chatt,
    the page's columns are NULL. One statement sees one state.
    """
    newest = select(func.coalesce(func.max(Chatt.seq), 0)).scalar_subquery()
    page = _within(size, _page(limit, backward=True), backward=True).lateral("page")
    return select(Feed.epoch, _TABLE.label("table"), newest.label("newest"), page).select_from(
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


def feed_page_before(limit: int, size: int) -> Select[Any]:
    """Select the last `limit` rows earlier than `:time`, newest first.

    Only as far as they begin within `size` bytes of text: see `_within`.
    """
    earlier = Chatt.time < bindparam("time", type_=DateTime(timezone=True))
    return _within(size, _page(limit, earlier, backward=True), backward=True)


def feed_page(
    after: tuple[datetime, int] | None,
    before: datetime | None,
    limit: int,
    size: int | None = None,
) -> Select[Any]:
    """Select the first `limit` rows behind the (time, seq) of `after`, in the feed's order.

    `before`: only rows earlier than that. `size`: only as far as they begin within so many bytes
    of text, see `_within`. The columns behind the row's own are its (time, seq), as at and seq.
    """
    where = []
    if after is not None:
        where.append(tuple_(Chatt.time, Chatt.seq) > after)
    if before is not None:
        where.append(Chatt.time < before)
    page = _page(limit, *where)
    return page if size is None else _within(size, page)


def place_of(chatt_id: UUID) -> Select[datetime, int]:
    """Select the (time, seq) of a chatt."""
    return select(Chatt.time, Chatt.seq).where(Chatt.id == chatt_id)


def feed_page_back(before: tuple[datetime, int] | None, limit: int) -> Select[Any]:
    """Select the last `limit` rows before the (time, seq) of `before`, newest first."""
    where = () if before is None else (tuple_(Chatt.time, Chatt.seq) < before,)
    return _page(limit, *where, backward=True)


def insert_chatts() -> Insert:
    """Insert as many chatts as the arrays have elements: one statement for any number."""
    columns = ("name", "message", "image", "video")
    arrays = [bindparam(column, type_=ARRAY(Text)) for column in columns]
    rows = func.unnest(*arrays).table_valued(*columns).render_derived("posted")
    return insert(Chatt).from_select(columns, select(rows), include_defaults=False)


def upsert_media() -> Insert:
    """Insert what is known of stored files; of those that are there, note that they are used."""
    return postgresql.insert(Media).on_conflict_do_update(
        index_elements=[Media.key], set_={"stored": func.clock_timestamp()}
    )


def media_is_whole() -> Select[bool]:
    """Select whether chatts and feed are complete.

    In the midst of a restore, chatts has few rows or none; then come those of feed, and last the
    indexes.
    """
    indexes = [func.to_regclass(f"ix_chatts_{slot}").is_not(None) for slot in ("image", "video")]
    return select(and_(*indexes, exists(select(Feed.epoch))))


def media_named() -> Select[str]:
    """Select those of `:keys` that a chatt names."""
    keys = func.unnest(_KEYS).table_valued(column("key", Text)).render_derived("asked")
    slots = (exists().where(slot == keys.c.key) for slot in (Chatt.image, Chatt.video))
    return select(keys.c.key).where(or_(*slots))


def named_media_after(limit: int) -> Select[str]:
    """Select the first `limit` keys behind `:after` that chatts name, in order, each once."""
    after = bindparam("after", type_=Text)
    pages = (
        select(slot.label("key")).where(slot > after).distinct().order_by(slot).limit(limit)
        for slot in (Chatt.image, Chatt.video)
    )
    keys = union(*(select(page.subquery()) for page in pages)).subquery()
    return select(keys.c.key).order_by(keys.c.key).limit(limit)


def media_size() -> Select[int]:
    """Select the bytes of `:keys` in all, as far as they are known."""
    return select(cast(func.sum(Media.size), BigInteger)).where(Media.key == func.any(_KEYS))


def stale_media_after(limit: int) -> Select[str]:
    """Select the first `limit` keys of media behind `:after` not stored for `:older_than` s."""
    after = bindparam("after", type_=Text)
    return select(Media.key).where(Media.key > after, _STALE).order_by(Media.key).limit(limit)


def delete_stale_media() -> Delete:
    """Delete the rows of `:keys` whose files nobody has stored for `:older_than` seconds."""
    return delete(Media).where(Media.key == func.any(_KEYS), _STALE)
