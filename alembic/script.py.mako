"""${message}."""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Upgrade the schema."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    ${upgrades if upgrades and upgrades != "pass" else ""}


def downgrade() -> None:
    """Downgrade the schema."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    ${downgrades if downgrades and downgrades != "pass" else ""}
