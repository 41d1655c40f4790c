"""Files are stored under their content's digest; what is known of each stands in `media`.

docs/decisions/0009-media-store.md says why.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, and the indexes by which a file's chatts are found."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "media",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column(
            "stored",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_media")),
    )
    for slot in ("image", "video"):
        op.create_index(
            f"ix_chatts_{slot}", "chatts", [slot], postgresql_where=sa.text(f"{slot} IS NOT NULL")
        )


def downgrade() -> None:
    """Take both back; the files stay, under the keys that the chatts name."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    for slot in ("image", "video"):
        op.drop_index(f"ix_chatts_{slot}", "chatts")
    op.drop_table("media")
