"""The table is the log; a tutorial's table is adopted.

docs/decisions/0002-log-order.md says why each trigger is there.
"""

import sqlalchemy as sa
from alembic import context, op
from alembic.util import CommandError

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


class AdoptionError(CommandError):
    """The table `chatts` that is there cannot become ours. Nothing has been changed."""


def upgrade() -> None:
    """Create the log and its triggers, and fill it with the chatts of a tutorial's table."""
    _set_up_transaction()
    access = None if context.is_offline_mode() else _take_rows(op.get_bind())
    op.create_table(
        "chatts",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column(
            "time",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("image", sa.Text(), nullable=True),
        sa.Column("video", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_chatts")),
        sa.UniqueConstraint("id", name=op.f("uq_chatts_id")),
        sa.CheckConstraint(
            "time >= '0001-01-01 00:00:00+00' AND time < '10000-01-01 00:00:00+00'",
            name=op.f("ck_chatts_time_years_1_to_9999"),
        ),
    )
    op.create_index(op.f("ix_chatts_time_seq"), "chatts", ["time", "seq"])
    op.execute("CREATE SEQUENCE chatts_seq AS bigint OWNED BY chatts.seq")
    op.create_table(
        "feed",
        sa.Column("singleton", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("epoch", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_feed")),
        sa.CheckConstraint("singleton", name=op.f("ck_feed_singleton")),
    )
    op.execute("INSERT INTO feed DEFAULT VALUES")
    if access is not None:
        _put_rows(op.get_bind(), access)
    _create_triggers()


def downgrade() -> None:
    """Leave a tutorial's table, with every chatt in the feed's order; an empty one goes too."""
    _set_up_transaction()
    op.execute("LOCK TABLE chatts IN ACCESS EXCLUSIVE MODE")
    # The order of equal times is from now on the order on disk.
    op.execute("CLUSTER chatts USING ix_chatts_time_seq")
    op.execute(
        "DROP FUNCTION chatts_lock(), chatts_number(), chatts_notify(), chatts_new_epoch() CASCADE"
    )
    op.drop_table("feed")
    op.drop_constraint(op.f("ck_chatts_time_years_1_to_9999"), "chatts", type_="check")
    op.drop_constraint(op.f("uq_chatts_id"), "chatts", type_="unique")
    op.drop_column("chatts", "seq")  # and with it its key, its index and its sequence
    for key, url in (("image", "imageurl"), ("video", "videourl")):
        # What a URL gives a meaning to is escaped. A change of type rewrites the table in its
        # order, where an UPDATE would move rows.
        op.execute(
            f"ALTER TABLE chatts ALTER COLUMN {key} TYPE text USING '/media/' ||"
            f" replace(replace(replace({key}, '%', '%25'), '?', '%3F'), '#', '%23')"
        )
        op.alter_column("chatts", key, new_column_name=url)
    op.execute(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM chatts) THEN DROP TABLE chatts; END IF; END $$"
    )


def _set_up_transaction() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    # The functions keep this path, so that no caller's path or temporary table misleads them.
    op.execute(
        "SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true)"
    )


def _create_triggers() -> None:
    # TRUNCATE and DELETE take the lock as well, so that all take it before the row of `feed`.
    _create_trigger(
        "chatts_lock",
        "BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON chatts FOR EACH STATEMENT",
        f"PERFORM pg_advisory_xact_lock({int.from_bytes(b'chatts', 'big')}); RETURN NULL;",
    )
    _create_trigger(
        "chatts_number",
        "BEFORE INSERT OR UPDATE ON chatts FOR EACH ROW",
        "NEW.seq := nextval('chatts_seq'); RETURN NEW;",
    )
    _create_trigger(
        "chatts_notify",
        "AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON chatts FOR EACH STATEMENT",
        "PERFORM pg_notify('chatts', ''); RETURN NULL;",
    )
    _create_trigger(
        "chatts_new_epoch",
        "AFTER DELETE ON chatts REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT",
        """
        IF TG_OP = 'DELETE' THEN  -- TRUNCATE has no transition table
            IF NOT EXISTS (SELECT FROM deleted) THEN
                RETURN NULL;
            END IF;
        END IF;
        UPDATE feed SET epoch = gen_random_uuid();
        RETURN NULL;
        """,
    )
    op.execute(
        "CREATE TRIGGER chatts_new_epoch_after_truncate AFTER TRUNCATE ON chatts"
        " FOR EACH STATEMENT EXECUTE FUNCTION chatts_new_epoch()"
    )
    # Whoever remembers rows by id and time could not find the old row again.
    op.execute(
        "CREATE TRIGGER chatts_new_epoch_after_move AFTER UPDATE ON chatts FOR EACH ROW"
        " WHEN (NEW.id <> OLD.id OR NEW.time <> OLD.time) EXECUTE FUNCTION chatts_new_epoch()"
    )


def _create_trigger(name: str, event: str, body: str) -> None:
    # As its owner: who may write chatts needs no rights on the sequence and the epoch.
    op.execute(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
        f" SET search_path FROM CURRENT AS $$ BEGIN {body} END $$"
    )
    op.execute(f"CREATE TRIGGER {name} {event} EXECUTE FUNCTION {name}()")


def _take_rows(connection: sa.Connection) -> list[str] | None:
    """Move the rows of a table `chatts` that is there to `chatts_adopted`, and drop it.

    Returns the statements that give its successor the same owner and grants; None without a table.
    Raises AdoptionError, with nothing changed, when it is not a tutorial's table.
    """
    kind = connection.scalar(
        sa.text("SELECT relkind FROM pg_class WHERE oid = to_regclass('chatts')")
    )
    if kind is None:
        return None
    if kind != b"r":
        raise AdoptionError("chatts is there, but it is not an ordinary table: rename it.")
    # A program that still writes must end first.
    op.execute("LOCK TABLE chatts IN ACCESS EXCLUSIVE MODE")
    columns = _suitable_columns(connection)
    access = list(connection.scalars(_ACCESS))
    op.execute(_MEDIA_KEY_FUNCTION)
    op.execute(
        _COLLECT.format(
            author="name" if "name" in columns else "username",
            imageurl="imageurl" if "imageurl" in columns else "NULL",
            videourl="videourl" if "videourl" in columns else "NULL",
        )
    )
    op.execute("DROP FUNCTION pg_temp.chatts_media_key(text)")
    op.execute("DROP TABLE chatts")
    return access


def _put_rows(connection: sa.Connection, access: list[str]) -> None:
    """Fill the new table from `chatts_adopted` and print what had to be repaired."""
    op.execute(
        "INSERT INTO chatts (seq, name, message, id, time, image, video)"
        " SELECT seq, name, message, id, time, image, video FROM chatts_adopted ORDER BY seq"
    )
    count = connection.scalar(
        sa.text("SELECT setval('chatts_seq', count(*) + 1, false) - 1 FROM chatts")
    )
    for statement in access:
        op.execute(statement)
    repaired = set()
    for seq, chatt_id, column, was, now in connection.execute(_REPAIRS):
        repaired.add(seq)
        context.config.print_stdout(
            "%s", f"chatts: {chatt_id}: {column} was {_quoted(was)}, is {_quoted(now)}"
        )
    context.config.print_stdout("%s", f"chatts: adopted {count} rows, {len(repaired)} repaired")


def _quoted(value: str | None) -> str:
    return "NULL" if value is None else repr(value)


def _suitable_columns(connection: sa.Connection) -> set[str]:
    types = {row.name: row for row in connection.execute(_COLUMNS)}
    faults = []
    for name, column in types.items():
        if name not in _TYPES:
            faults.append(
                f"column {name} is unknown (ALTER TABLE chatts DROP COLUMN {column.quoted};)"
            )
        elif column.type not in _TYPES[name]:
            right = _TYPES[name][0]
            faults.append(
                f"column {name} is {column.type} (ALTER TABLE chatts"
                f" ALTER COLUMN {name} TYPE {right} USING {name}::{right};)"
            )
    if {"name", "username"} <= types.keys():
        faults.append(
            "columns name and username are both there"
            " (ALTER TABLE chatts DROP COLUMN the one that is not the author;)"
        )
    missing = {"message", "id", "time"} - types.keys()
    if not types.keys() & {"name", "username"}:
        missing.add("name")
    faults.extend(
        f"column {name} is missing (ALTER TABLE chatts ADD COLUMN {name} {_TYPES[name][0]};)"
        for name in sorted(missing)
    )
    faults.extend(connection.scalars(_FAULTS))
    if faults:
        raise AdoptionError(f"the table chatts cannot be adopted: {', '.join(faults)}.")
    return set(types)


_TEXT = ("text", "character varying", "character")
_TYPES = {
    "name": _TEXT,
    "username": _TEXT,
    "message": _TEXT,
    "id": ("uuid",),
    "time": ("timestamp with time zone", "timestamp without time zone"),
    "imageurl": _TEXT,
    "videourl": _TEXT,
}

_COLUMNS = sa.text("""
    SELECT attname AS name, quote_ident(attname) AS quoted, format_type(atttypid, NULL) AS type
    FROM pg_attribute
    WHERE attrelid = to_regclass('chatts') AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
""")

# Whoever could use the table still can.
_ACCESS = sa.text("""
    SELECT format('ALTER TABLE chatts OWNER TO %I', pg_get_userbyid(relowner))
    FROM pg_class
    WHERE oid = to_regclass('chatts') AND pg_get_userbyid(relowner) <> current_user
    UNION ALL
    SELECT format(
        'GRANT %s ON chatts TO %s%s',
        privilege_type,
        CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
        CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
    )
    FROM pg_class, aclexplode(relacl)
    WHERE oid = to_regclass('chatts') AND grantee <> relowner
""")

# What would be lost without a word when the table is replaced.
_FAULTS = sa.text("""
    SELECT format(
        'it belongs to %I (ALTER TABLE chatts OWNER TO %I;)',
        pg_get_userbyid(relowner), current_user
    )
    FROM pg_class WHERE oid = to_regclass('chatts') AND NOT pg_has_role(relowner, 'USAGE')
    UNION ALL
    SELECT format('trigger %s is on it (DROP TRIGGER %I ON chatts;)', tgname, tgname)
    FROM pg_trigger WHERE tgrelid = to_regclass('chatts') AND NOT tgisinternal
    UNION ALL
    SELECT format('policy %s is on it (DROP POLICY %I ON chatts;)', polname, polname)
    FROM pg_policy WHERE polrelid = to_regclass('chatts')
    UNION ALL
    SELECT format('rule %s is on it (DROP RULE %I ON chatts;)', rulename, rulename)
    FROM pg_rewrite WHERE ev_class = to_regclass('chatts')
    UNION ALL
    SELECT DISTINCT format('view %s reads it (DROP VIEW %s;)', view, view)
    FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid, CAST(ev_class AS regclass) AS view
    WHERE classid = CAST('pg_rewrite' AS regclass) AND refobjid = to_regclass('chatts')
        AND ev_class <> refobjid
    UNION ALL
    SELECT format(
        'foreign key %s binds it (ALTER TABLE %s DROP CONSTRAINT %I;)',
        conname, CAST(conrelid AS regclass), conname
    )
    FROM pg_constraint WHERE contype = 'f' AND to_regclass('chatts') IN (conrelid, confrelid)
""")

# The key in a media URL: the percent-decoded segment behind /media/, if it is safe as the name of
# a file.
_MEDIA_KEY_FUNCTION = """
    CREATE FUNCTION pg_temp.chatts_media_key(url text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    DECLARE
        path text := regexp_replace(
            regexp_replace(url, '[?#].*', ''), '^([a-z][a-z0-9+.-]*:)?//[^/]*', '', 'i'
        );
        key text := substring(path FROM '/media/([^/]+)$');
    BEGIN
        IF key ~ '%' THEN
            SELECT convert_from(
                string_agg(
                    CASE WHEN part[1] ~ '^%.' THEN decode(substr(part[1], 2), 'hex')
                    ELSE convert_to(part[1], 'UTF8') END,
                    '' ORDER BY place
                ),
                'UTF8'
            )
            INTO key
            FROM regexp_matches(key, '%[0-9A-Fa-f]{2}|%|[^%]+', 'g')
                WITH ORDINALITY AS parts (part, place);
        END IF;
        IF key ~ '^[.]|/' OR octet_length(convert_to(key, 'UTF8')) > 255 THEN
            RETURN NULL;
        END IF;
        RETURN key;
    EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN
        RETURN NULL;  -- what was escaped is not UTF-8, or is NUL
    END $$
"""

# The tutorial shows ORDER BY time; PostgreSQL puts NULL last, and equal times mostly as inserted.
# A timestamp without zone was written by now() in the session's TimeZone, and is read in it.
# A time that cannot be kept becomes the one before it in the feed, which keeps the order.
_COLLECT = """
    CREATE TEMPORARY TABLE chatts_adopted ON COMMIT DROP AS
    WITH ordered AS (
        SELECT row_number() OVER (ORDER BY time NULLS LAST, ctid) AS seq,
            {author}::text AS was_name, message::text AS was_message, id AS was_id,
            time AS was_time,
            nullif({imageurl}::text, '') AS was_imageurl,
            nullif({videourl}::text, '') AS was_videourl,
            -- beyond these the cast itself may fail
            CASE WHEN time > '4000-01-01 BC' AND time < '20000-01-01' THEN time::timestamptz END
                AS instant
        FROM chatts
    ), limited AS (
        SELECT *, CASE WHEN instant >= '0001-01-01 00:00:00+00'
            AND instant < '10000-01-01 00:00:00+00' THEN instant END AS possible
        FROM ordered
    )
    SELECT *, coalesce(was_name, 'anonymous') AS name, coalesce(was_message, '') AS message,
        CASE WHEN was_id IS NOT NULL AND row_number() OVER (PARTITION BY was_id ORDER BY seq) = 1
            THEN was_id ELSE gen_random_uuid() END AS id,
        coalesce(
            max(possible) OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING),
            min(possible) OVER (),
            now()
        ) AS time,
        pg_temp.chatts_media_key(was_imageurl) AS image,
        pg_temp.chatts_media_key(was_videourl) AS video
    FROM limited
"""

_REPAIRS = sa.text("""
    SELECT seq, id, repair.name, repair.was, repair.now
    FROM chatts_adopted, LATERAL (VALUES
        (was_id IS DISTINCT FROM id, 'id', was_id::text, id::text),
        (was_name IS NULL, 'name', NULL, chatts_adopted.name),
        (was_message IS NULL, 'message', NULL, message),
        (instant IS DISTINCT FROM time, 'time', was_time::text, time::text),
        (was_imageurl IS NOT NULL AND image IS NULL, 'imageurl', was_imageurl, NULL),
        (was_videourl IS NOT NULL AND video IS NULL, 'videourl', was_videourl, NULL)
    ) AS repair (needed, name, was, now)
    WHERE needed
    ORDER BY seq
""")
