"""Whether the migrations build what the models say, and can be taken back.

`make check` runs it as `python -m tests.check_migrations`, on a database of its own.
"""

import sys
from pathlib import Path
from typing import TextIO

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from chatterd import embedded, settings
from chatterd.embedded_home import EmbeddedPostgresError
from tests.process import open_folder


def alembic_config(url: str, stdout: TextIO = sys.stdout) -> Config:
    """Return the configuration of pyproject.toml for the database at `url`."""
    root = Path(__file__).parent.parent
    return Config(toml_file=root / "pyproject.toml", stdout=stdout, attributes={"url": url})


def main() -> None:
    """Migrate up, compare, migrate down and up again."""
    with (
        open_folder() as folder,
        embedded.postgres(folder, bin_dir=settings.PG_BIN, options=["fsync=off"]) as url,
    ):
        config = alembic_config(url)
        command.upgrade(config, "head")
        command.check(config)
        command.downgrade(config, "base")
        command.upgrade(config, "head")


if __name__ == "__main__":
    try:
        main()
    except (CommandError, DBAPIError, EmbeddedPostgresError) as error:
        sys.exit(f"migrations: {error}")
