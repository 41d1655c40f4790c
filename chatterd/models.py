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
    LargeBinary,
    MetaData,
    Select,
    Text,
    UniqueConstraint,
    Uuid,
    and_,
    bindparam,
    cast,
    column,
    delete,
    exists,
    false,
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
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, aliased, mapped_column
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate
from sqlalchemy.sql.selectable import LateralFromClause, TableValuedAlias
from sqlalchemy.types import TypeEngine


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
    deleted: a tombstone: its texts are empty and it has no files, so that those who follow the
        log learn of it.
    delete_token_hash: SHA-256 of what whoever posted it deletes it with; None where nobody can.
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
    deleted: Mapped[bool] = mapped_column(server_default=false())
    delete_token_hash: Mapped[bytes | None]

    __table_args__ = (
        UniqueConstraint("id"),
        # The feed, which has no tombstones; those who follow the log go by seq.
        Index(None, "time", "seq", postgresql_where=text("NOT deleted")),
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


class IdempotencyKey(Base):
    """What a post with an `Idempotency-Key` was answered, for when it is sent again.

    key_hash: SHA-256 of the key.
    fingerprint: SHA-256 of the post's route and content.
    salt: what the chatt's delete token is made of, with the key itself.
    chatt_id, time: those of the chatt, which may be gone.
    files: what the answer says of its files, as JSON.
    """

    __tablename__ = "idempotency_keys"

    key_hash: Mapped[bytes] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes]
    salt: Mapped[bytes]
    chatt_id: Mapped[UUID]
    time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    files: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp(), index=True
    )


MEDIA_LOCK = int.from_bytes(b"media", "big")
"""The advisory lock of MEDIA_ROOT: shared by all who remove files that no chatt names, and held
alone by a backup and a restore, to which chatts of another time name them."""

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

_NEWEST_SEQ = select(func.coalesce(func.max(Chatt.seq), 0)).scalar_subquery()
_IMAGE = aliased(Media, name="image_file")
_VIDEO = aliased(Media, name="video_file")
_FILES = (
    _IMAGE.size.label("image_size"),
    _IMAGE.width.label("image_width"),
    _IMAGE.height.label("image_height"),
    _VIDEO.size.label("video_size"),
)

_KEYS = bindparam("keys", type_=ARRAY(Text))
_OLDER_THAN = bindparam("older_than", type_=Float)
_STALE = Media.stored < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, _OLDER_THAN)


def _page(limit: int, *where: ColumnElement[bool], backward: bool = False) -> Select[Any]:
    """Select the feed's first rows, or its last, newest first; then each one's (time, seq)."""
    order = (column.desc() if backward else column for column in (Chatt.time, Chatt.seq))
    return (
        select(*_ROW, Chatt.time.label("at"), Chatt.seq)
        .where(~Chatt.deleted, *where)
        .order_by(*order)
        .limit(limit)
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
    return _state(_within(size, _page(limit, backward=True), backward=True).lateral("page"))


def _state(page: LateralFromClause) -> Select[Any]:
    return select(Feed.epoch, _TABLE.label("table"), _NEWEST_SEQ.label("newest"), page).select_from(
        Feed.__table__.join(page, true(), isouter=True)
    )


def feed_changes(limit: int) -> Select[Any]:
    """Select `feed_state`'s epoch and table, and the rows whose seq is over `:seq`, in its order.

    Always at least one row; where nothing has changed, its own columns are NULL. `last_seq` is
    the last number given out, `:seq` or more unless the table has gone back in time.
    """
    changed = (
        select(Chatt.seq, Chatt.deleted, *_ROW)
        .where(Chatt.seq > bindparam("seq", type_=BigInteger))
        .order_by(Chatt.seq)
        .limit(limit)
        .lateral("changed")
    )
    return _since(changed)


def _since(changed: LateralFromClause) -> Select[Any]:
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
    """Select the (time, seq) of a chatt, also of one that was deleted.

    Whoever reads the feed page by page goes on from there.
    """
    return select(Chatt.time, Chatt.seq).where(Chatt.id == chatt_id)


def feed_page_back(before: tuple[datetime, int] | None, limit: int) -> Select[Any]:
    """Select the last `limit` rows before the (time, seq) of `before`, newest first."""
    where = () if before is None else (tuple_(Chatt.time, Chatt.seq) < before,)
    return _page(limit, *where, backward=True)


def _chatts(*columns: InstrumentedAttribute[Any]) -> Select[Any]:
    """Select chatts with what is known of their files."""
    return (
        select(*columns, *_ROW, *_FILES)
        .outerjoin(_IMAGE, _IMAGE.key == Chatt.image)
        .outerjoin(_VIDEO, _VIDEO.key == Chatt.video)
    )


def chatts_page(
    before: tuple[datetime, int] | None, after: tuple[datetime, int] | None, limit: int
) -> Select[Any]:
    """Select the state of the feed as `feed_newest` does, and up to `limit` of its chatts.

    Those before or after a (time, seq), nearest first; else the newest, newest first.
    """
    place = tuple_(Chatt.time, Chatt.seq)
    order = (Chatt.time, Chatt.seq) if after else (Chatt.time.desc(), Chatt.seq.desc())
    chatts = _chatts().where(~Chatt.deleted)
    if after is not None:
        chatts = chatts.where(place > after)
    elif before is not None:
        chatts = chatts.where(place < before)
    page = chatts.order_by(*order).limit(limit).lateral("page")
    return _state(page)


def chatt(chatt_id: UUID) -> Select[Any]:
    """Select a chatt that was not deleted."""
    return _chatts().where(Chatt.id == chatt_id, ~Chatt.deleted)


def log_end() -> Select[Any]:
    """Select the state of the feed as `feed_newest` does."""
    return select(Feed.epoch, _TABLE.label("table"), _NEWEST_SEQ.label("newest"))


def log_after(limit: int) -> Select[Any]:
    """Select what `feed_changes` does, with what is known of each chatt's files."""
    changed = (
        _chatts(Chatt.seq, Chatt.deleted)
        .where(Chatt.seq > bindparam("seq", type_=BigInteger))
        .order_by(Chatt.seq)
        .limit(limit)
        .lateral("changed")
    )
    return _since(changed)


def deletable(chatt_id: UUID) -> Select[bytes | None, str | None, str | None]:
    """Select what a chatt is deleted with, and its media keys; nothing if it is deleted."""
    return select(Chatt.delete_token_hash, Chatt.image, Chatt.video).where(
        Chatt.id == chatt_id, ~Chatt.deleted
    )


def tombstone(chatt_id: UUID) -> ReturningUpdate[UUID]:
    """Leave of a chatt that it was there; return its id unless it was deleted already."""
    return (
        update(Chatt)
        .where(Chatt.id == chatt_id, ~Chatt.deleted)
        .values(deleted=True, name="", message="", image=None, video=None, delete_token_hash=None)
        .returning(Chatt.id)
    )


def _unnested(**types: type[TypeEngine[Any]]) -> TableValuedAlias:
    """Return arrays, parameters of these names and element types, as a table."""
    arrays = [bindparam(name, type_=ARRAY(kind)) for name, kind in types.items()]
    columns = (column(name, kind) for name, kind in types.items())
    return func.unnest(*arrays).table_valued(*columns).render_derived("asked")


_POSTED = {
    "id": Uuid,
    "name": Text,
    "message": Text,
    "image": Text,
    "video": Text,
    "delete_token_hash": LargeBinary,
}


def insert_chatts() -> ReturningInsert[UUID, datetime]:
    """Insert as many chatts as the arrays have elements: one statement for any number.

    Returns the id and time of each.
    """
    return _insert_chatts(_unnested(**_POSTED))


def insert_chatts_and_keys() -> Select[UUID, datetime]:
    """Insert chatts as `insert_chatts` does, and what is kept of those that came with a key.

    Where there is none, `key_hash` is NULL. A key that is there already is a unique violation.
    """
    kept = {"key_hash": LargeBinary, "fingerprint": LargeBinary, "salt": LargeBinary, "files": Text}
    asked = _unnested(**_POSTED, **kept)
    posted = _insert_chatts(asked).cte("posted")
    keys = insert(IdempotencyKey).from_select(
        [*kept, "chatt_id", "time"],
        select(*(asked.c[name] for name in kept), posted.c.id, posted.c.time)
        .select_from(asked.join(posted, posted.c.id == asked.c.id))
        .where(asked.c.key_hash.is_not(None)),
        include_defaults=False,
    )
    return select(posted.c.id, posted.c.time).add_cte(keys.cte("kept"))


def _insert_chatts(asked: TableValuedAlias) -> ReturningInsert[UUID, datetime]:
    rows = select(*(asked.c[name] for name in _POSTED))
    return (
        insert(Chatt)
        .from_select(list(_POSTED), rows, include_defaults=False)
        .returning(Chatt.id, Chatt.time)
    )


def kept_answers() -> Select[Any]:
    """Give up the locks `:unlock`; select what is kept of `:key_hash`, and try to lock each.

    A lock, of the number in `:lock`, is this session's, and counts how often it was got. It tells
    other processes that the first answer is under way. Always at least one row; where nothing is
    asked, its columns are NULL. One round trip for both: whoever ends and who begins come together.
    """
    ended = func.unnest(bindparam("unlock", type_=ARRAY(BigInteger))).table_valued("lock")
    ended = ended.render_derived("ended")
    unlocked = select(func.count(func.pg_advisory_unlock(ended.c.lock)).label("count")).subquery()
    asked = _unnested(key_hash=LargeBinary, lock=BigInteger)
    names = ("fingerprint", "salt", "chatt_id", "time", "files")
    kept = [IdempotencyKey.__table__.c[name] for name in names]
    return select(
        unlocked.c.count,
        asked.c.key_hash,
        func.pg_try_advisory_lock(asked.c.lock).label("is_locked"),
        *kept,
    ).select_from(
        unlocked.join(asked, true(), isouter=True).outerjoin(
            IdempotencyKey.__table__, IdempotencyKey.key_hash == asked.c.key_hash
        )
    )


def delete_old_keys(limit: int) -> Delete:
    """Delete up to `limit` keys that are older than `:seconds`."""
    seconds = func.make_interval(0, 0, 0, 0, 0, 0, bindparam("seconds", type_=Float))
    old = (
        select(IdempotencyKey.key_hash)
        .where(IdempotencyKey.created < func.now() - seconds)
        .order_by(IdempotencyKey.created)
        .limit(limit)
    )
    return delete(IdempotencyKey).where(IdempotencyKey.key_hash.in_(old))


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


def hold_media() -> Select[bool]:
    """Try to be one of those who remove files, until the transaction ends; false beside a backup.

    Select this before it is known which files chatts name.
    """
    return select(func.pg_try_advisory_xact_lock_shared(MEDIA_LOCK))


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
