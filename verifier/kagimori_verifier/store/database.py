"""The engine: connections, transactions, migrations, and a name for everything that a database can do wrong.

All that is SQLite's own stands here: WAL, full synchronisation, and write transactions that take their lock first.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Executable, create_engine, event, inspect, text
from sqlalchemy.engine import CursorResult, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from kagimori_protocol.errors import OperatorError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRATIONS: Final = Path(__file__).with_name("migrations")
SCHEMA: Final = "0001"
"""The newest migration; a test holds that alembic says the same."""
BUSY_S: Final = 5

_SQLITE: Final = "sqlite"
_CODES: Final = {
    sqlite3.SQLITE_BUSY: ("store.locked", "Another program holds the database; stop it, or try again."),
    sqlite3.SQLITE_LOCKED: ("store.locked", "Another program holds the database; stop it, or try again."),
    sqlite3.SQLITE_FULL: ("store.full", "Make room on the disk that holds the database."),
    sqlite3.SQLITE_READONLY: (
        "store.read-only",
        "Let the verifier's user write the database and its directory.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "store.gone",
        "Is the database where verifier.toml says, and its directory writable?",
    ),
    sqlite3.SQLITE_IOERR: (
        "store.broken",
        "The disk fails: see the system's log, and restore from your backup.",
    ),
    sqlite3.SQLITE_CORRUPT: ("store.broken", "Restore the database from your backup."),
    sqlite3.SQLITE_NOTADB: ("store.broken", "This file is no database: see verifier.toml."),
}
_UNKNOWN: Final = ("store.broken", "See the verifier's log, and `kagimori-verifier ledger verify`.")


class StoreUnavailable(OperatorError):
    """The database cannot be used now. Nothing of the transaction that met this was kept."""

    default_code = "store.broken"


class StoreOutdated(OperatorError):
    """The database's tables are older or newer than this release."""

    default_code = "store.schema"


class Txn:
    """One transaction. Reads hand out values, never live rows."""

    def __init__(self, connection: Connection) -> None:
        """Keep the connection."""
        self._connection = connection

    def execute(self, statement: Executable) -> CursorResult[Any]:
        """Run a statement."""
        return self._connection.execute(statement)


class Store:
    """A database of this release's schema. Make one with ``create`` or ``open``; share it between threads."""

    def __init__(self, url: str) -> None:
        """Prepare an engine; nothing is opened yet."""
        self._sqlite = make_url(url).get_backend_name() == _SQLITE
        arguments = {"timeout": BUSY_S, "check_same_thread": False} if self._sqlite else {}
        self._engine = create_engine(url, connect_args=arguments)
        if self._sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)

    @classmethod
    def create(cls, url: str) -> Store:
        """Make the tables of a new database. Raises StoreOutdated if there are tables of another version."""
        store = cls(url)
        try:
            with _explained():
                with store._engine.connect() as connection:
                    if inspect(connection).get_table_names():
                        store._require_current(connection)
                        return store
                store.migrate()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, url: str) -> Store:
        """Open a database that ``create`` made. Raises StoreUnavailable, StoreOutdated."""
        path = make_url(url).database
        if url.startswith(_SQLITE) and path and not Path(path).is_file():
            raise StoreUnavailable(
                "There is no database.",
                code="store.gone",
                expected=f"a database at {path}",
                found="no such file",
                todo="Run `kagimori-verifier init` for a new verifier, or restore from your backup.",
            )
        store = cls(url)
        try:
            with _explained(), store._engine.connect() as connection:
                store._require_current(connection)
        except BaseException:
            store.close()
            raise
        return store

    @contextlib.contextmanager
    def read(self) -> Iterator[Txn]:
        """Read in one transaction: what is seen does not change meanwhile."""
        with _explained(), self._engine.connect() as connection, connection.begin():
            if self._sqlite:
                connection.execute(text("BEGIN"))
            yield Txn(connection)

    @contextlib.contextmanager
    def write(self) -> Iterator[Txn]:
        """Write in one transaction: all of it is kept and synchronised at the end, or none."""
        with _explained(), self._engine.connect() as connection, connection.begin():
            if self._sqlite:
                connection.execute(text("BEGIN IMMEDIATE"))
            yield Txn(connection)

    def ping(self) -> None:
        """Raise StoreUnavailable if the database cannot be read."""
        with self.read() as txn:
            txn.execute(text("SELECT count(*) FROM setting"))

    def migrate(self) -> None:
        """Bring the tables to this release's version."""
        import alembic.command  # noqa: PLC0415 - a third of a second that only this needs
        import alembic.config  # noqa: PLC0415 - as above

        with _explained(), self._engine.connect() as connection, connection.begin():
            configuration = alembic.config.Config()
            configuration.set_main_option("script_location", str(MIGRATIONS))
            configuration.attributes["connection"] = connection
            alembic.command.upgrade(configuration, "head")

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _require_current(self, connection: Connection) -> None:
        tables = inspect(connection).get_table_names()
        query = text("SELECT version_num FROM alembic_version")
        found = connection.execute(query).scalar_one_or_none() if "alembic_version" in tables else None
        if found != SCHEMA:
            raise StoreOutdated(
                "The database's tables are not those of this release.",
                expected=f"schema {SCHEMA}",
                found=f"schema {found or 'none'}",
                todo="Use the release that made it, or restore a backup that fits this one.",
            )


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401 - a DBAPI connection
    """Durable and strict: the ledger is worth what its last line's synchronisation is."""
    connection.isolation_level = None  # we begin transactions ourselves, see Store.write
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_S * 1000}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what the database raises into a StoreUnavailable that says what to do."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        code, todo = _CODES.get(getattr(cause, "sqlite_errorcode", -1) & 0xFF, _UNKNOWN)
        raise StoreUnavailable(
            "The database cannot be used.",
            code=code,
            expected="a database that answers",
            found=str(cause),
            todo=todo,
        ) from error
