"""Bring a database to the tables of this version."""

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from rbee_queen.store.base import StoreFailed
from rbee_queen.store.schema import REVISION


def configuration(connection: Connection | None = None) -> Config:
    """Give Alembic's settings; there is no alembic.ini."""
    config = Config()
    config.set_main_option("script_location", "rbee_queen:store/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def migrate(connection: Connection) -> None:
    """Run the migrations that are missing, inside the transaction of the connection.

    Raises:
        StoreFailed: a newer version has been here.
    """
    config = configuration(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise StoreFailed(
                f"the database is at revision {revision!r}, this version of rbee knows {REVISION!r} as the "
                "newest: a newer rbee has used it. Start that version, or restore the backup made before."
            )
    command.upgrade(config, "head")
