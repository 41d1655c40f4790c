"""Chatts can be deleted by who posted them, and a post that is sent again is not stored again.

docs/decisions/0010-deleting.md and 0011-idempotency-keys.md say why.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what deleting needs to chatts, and the table of keys."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column(
        "chatts",
        sa.Column("deleted", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.add_column("chatts", sa.Column("delete_token_hash", sa.LargeBinary(), nullable=True))
    _index_feed(where="NOT deleted")
    op.create_table(
        "idempotency_keys",
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("chatt_id", sa.Uuid(), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("files", sa.Text(), nullable=False),
        sa.Column(
            "created",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created"), "idempotency_keys", ["created"])


def downgrade() -> None:
    """Take both back. What was deleted goes for good, and cursors with it."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_table("idempotency_keys")
    op.execute("DELETE FROM chatts WHERE deleted")
    _index_feed(where=None)
    op.drop_column("chatts", "delete_token_hash")
    op.drop_column("chatts", "deleted")


def _index_feed(where: str | None) -> None:
    op.drop_index("ix_chatts_time_seq", "chatts")
    condition = None if where is None else sa.text(where)
    op.create_index("ix_chatts_time_seq", "chatts", ["time", "seq"], postgresql_where=condition)
