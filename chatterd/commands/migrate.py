"""chatterd migrate."""

import argparse
import sys

from chatterd import database, settings
from chatterd.commands.database import opened_database


def run(_options: argparse.Namespace) -> None:
    """Bring the schema to head; raises `SchemaError`."""
    if settings.DATABASE_URL is None:
        with opened_database():
            pass
    else:
        database.migrate(settings.DATABASE_URL)
    sys.stdout.write(f"The schema is at revision {database.head_revision()}.\n")
