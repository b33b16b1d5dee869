"""The engine: connections, transactions, migrations, and a name for everything that a database can do wrong."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Executable, create_engine, inspect, text
from sqlalchemy.engine import CursorResult, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.store import sqlite
from kagimori_verifier.store.turns import NoTurn, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kagimori_verifier.store.prepared import Prepared

MIGRATIONS: Final = Path(__file__).with_name("migrations")
SCHEMAS: Final = ("0001", "0002", "0003", "0004", "0005")
"""Every migration, in order; a test holds that alembic says the same."""
SCHEMA: Final = SCHEMAS[-1]

_UNKNOWN: Final = ("store.broken", "See the verifier's log, and `kagimori-verifier ledger verify`.")


class StoreUnavailable(OperatorError):
    """The database cannot be used now. Nothing of the transaction that met this was kept."""

    default_code = "store.broken"


class StoreOutdated(OperatorError):
    """The database's tables are older or newer than this release."""

    default_code = "store.schema"


class Conflict(OperatorError):
    """A change contradicts what the database holds: a name that is taken, a row that others need, the ledger."""

    default_code = "store.conflict"


class Txn:
    """One transaction. Reads hand out values, never live rows."""

    def __init__(self, connection: Connection) -> None:
        """Keep the connection."""
        self._connection = connection

    def execute(self, statement: Executable) -> CursorResult[Any]:
        """Run a statement."""
        return self._connection.execute(statement)

    def rows(self, statement: Prepared, **values: object) -> list[dict[str, Any]]:
        """Run a prepared statement, with values for its parameters; give its rows, none for one that has none."""
        return statement.run(self._connection, values)

    def row(self, statement: Prepared, **values: object) -> dict[str, Any] | None:
        """Give the one row that a prepared statement finds at most, or None."""
        return next(iter(statement.run(self._connection, values)), None)


class Store:
    """A database of this release's schema. Make one with ``create`` or ``open``; share it between threads."""

    def __init__(self, url: str) -> None:
        """Prepare an engine; nothing is opened yet. Raises OperatorError for a URL that names no database."""
        self._file: tuple[int, int] | None = None
        self._turns = Turns(self._begun_to_write)
        self._idle: list[Connection] = []
        try:
            parsed = make_url(url)
            self._path = Path(parsed.database or "") if parsed.get_backend_name() == sqlite.NAME else None
            if self._path is None:
                self._engine = create_engine(parsed)
            elif self._path.name in {"", ":memory:"}:
                raise ArgumentError("SQLite without a file keeps nothing")
            else:
                # Only the verifier's own limits bound how many threads wait here.
                path = self._path
                self._engine = create_engine(parsed, creator=lambda: sqlite.connect(path), max_overflow=-1)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
            raise OperatorError(
                "The database's URL cannot be used.",
                code="store.url",
                expected="sqlite:/// and the path of a file",
                found=str(error),
                todo="Correct `database` in verifier.toml.",
            ) from error

    @classmethod
    def create(cls, url: str) -> Store:
        """Make the tables of a new database, all or none; leave those of this version alone.

        Raises StoreOutdated if there are tables of another version, and StoreUnavailable.
        """
        store = cls(url)
        with store._closed_on_failure():
            if store._path is not None:
                with _explained_file():
                    sqlite.create_file(store._path)
            store._remember_file()
            with store._begun(sqlite.BEGIN_WRITE) as connection:
                if inspect(connection).get_table_names():
                    _require_current(connection)
                else:
                    _migrate(connection)
        return store

    @classmethod
    def open(cls, url: str) -> Store:
        """Open a database that ``create`` made. Raises StoreUnavailable, StoreOutdated."""
        store = cls(url)
        with store._closed_on_failure():
            store._remember_file()
            with store._begun(sqlite.BEGIN_READ) as connection:
                _require_current(connection)
        return store

    @classmethod
    def upgrade(cls, url: str, keep: Callable[[str], Path]) -> tuple[str, Path | None]:
        """Bring an older release's tables to this one's; tells their version before, and where they were kept as they were.

        ``keep`` says where, for a version. Raises StoreOutdated for tables that are no older release's, StoreUnavailable;
        nothing has changed then.
        """
        store = cls(url)
        with store._closed_on_failure():
            store._remember_file()
            with store._begun(sqlite.BEGIN_WRITE) as connection:
                found = _schema(connection)
                if found == SCHEMA or found not in SCHEMAS:
                    _require_current(connection)
                    return found or SCHEMA, None
                kept = keep(found)
                store.snapshot(kept)
                _migrate(connection)
                return found, kept

    def snapshot(self, to: Path) -> None:
        """Copy the database as it is now into the new file ``to``, also while others write. Raises StoreUnavailable."""
        with self._by_itself() as path:
            sqlite.copy(path, to)

    def check(self) -> None:
        """Read all of the database. Raises StoreUnavailable where it is broken."""
        with self._by_itself() as path:
            sqlite.check(path)

    @contextlib.contextmanager
    def _by_itself(self) -> Iterator[Path]:
        """Give the file to what opens it by itself, and explain what that meets."""
        if self._path is None:
            raise _unavailable("store.file", "a database that is no file", "Use the database's own tools.")
        with _explained_file():
            self._require_same_file()
            try:
                yield self._path
            except sqlite3.Error as error:
                code, todo = sqlite.problem(error) or _UNKNOWN
                raise _unavailable(code, str(error), todo) from error

    @contextlib.contextmanager
    def read(self) -> Iterator[Txn]:
        """Read in one transaction: what is seen does not change meanwhile."""
        with self._begun(sqlite.BEGIN_READ) as connection:
            yield Txn(connection)

    @contextlib.contextmanager
    def write(self) -> Iterator[Txn]:
        """Write all of it or nothing: what was written is kept and synchronised when the block has ended.

        Threads that write at once share a transaction, and each waits for its commit (``turns``). A thread that writes
        must not begin another write before it has ended this one.
        """
        try:
            with _explained(), self._turns.one(sqlite.BUSY_S) as connection:
                yield Txn(connection)
        except NoTurn:
            code, todo = sqlite.LOCKED
            raise _unavailable(code, f"other threads have written for {sqlite.BUSY_S} s", todo) from None

    def ping(self) -> None:
        """Raise StoreUnavailable if the database cannot be read."""
        with self.read() as txn:
            txn.execute(text("SELECT count(*) FROM setting"))

    def close(self) -> None:
        """Close every connection; whoever reads or writes later opens new ones."""
        while self._idle:
            self._idle.pop().close()
        self._engine.dispose()

    @contextlib.contextmanager
    def _begun_to_write(self) -> Iterator[Connection]:
        """Begin a transaction that writes, and is committed only to the file that it was begun on."""
        with self._begun(sqlite.BEGIN_WRITE) as connection:
            yield connection
            self._require_same_file()

    @contextlib.contextmanager
    def _begun(self, statement: str) -> Iterator[Connection]:
        """Begin a transaction that is committed at the end, or rolled back with whatever is raised."""
        with _explained():
            self._require_same_file()
            # Of our own: taking one from SQLAlchemy's pool and giving it back costs as much as a transaction.
            try:
                connection = self._idle.pop()
            except IndexError:  # asked for, not looked at before: other threads take, too
                connection = self._engine.connect()
            try:
                with connection.begin():
                    if self._path is not None:
                        connection.exec_driver_sql(statement)
                    yield connection
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _remember_file(self) -> None:
        self._file = self._identity()
        if self._path is not None and self._file is None:
            raise StoreUnavailable(
                "There is no database.",
                code="store.gone",
                expected=f"a database at {self._path}",
                found="no such file",
                todo="Run `kagimori-verifier init` for a new verifier, or restore from your backup.",
            )

    def _require_same_file(self) -> None:
        """A deleted file can still be written, and every redeemed session would be unused again after a restart."""
        found = self._identity()
        if found != self._file:
            raise StoreUnavailable(
                "The database was taken away while it was in use.",
                code="store.gone",
                expected=f"the same file at {self._path}",
                found="no file" if found is None else "another file",
                todo="Stop the verifier before you restore or move its database, and start it again.",
            )

    def _identity(self) -> tuple[int, int] | None:
        """Tell which file the database is now; None if there is none, or if it is not a file."""
        if self._path is None:
            return None
        with _explained_file():
            try:
                return sqlite.file_identity(self._path)
            except FileNotFoundError:
                return None


def _migrate(connection: Connection) -> None:
    """Bring the tables to this release's version, within the caller's transaction."""
    import alembic.command  # noqa: PLC0415 - a third of a second that only this needs
    import alembic.config  # noqa: PLC0415 - as above

    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    configuration.attributes["connection"] = connection
    alembic.command.upgrade(configuration, "head")


def _schema(connection: Connection) -> str | None:
    """Give the version of the tables, or None where there are none of ours."""
    tables = inspect(connection).get_table_names()
    query = text("SELECT version_num FROM alembic_version")
    found = connection.execute(query).scalar_one_or_none() if "alembic_version" in tables else None
    return None if found is None else str(found)


def _require_current(connection: Connection) -> None:
    found = _schema(connection)
    if found in SCHEMAS and found != SCHEMA:
        raise StoreOutdated(
            "The database's tables are those of an older release.",
            expected=f"schema {SCHEMA}",
            found=f"schema {found}",
            todo="Stop the verifier, and run `kagimori-verifier upgrade`: it keeps a copy of what was.",
        )
    if found != SCHEMA:
        raise StoreOutdated(
            "The database's tables are not those of this release.",
            expected=f"schema {SCHEMA}",
            found=f"schema {found or 'none'}",
            todo="Use the release that made it, or restore a backup that fits this one."
            if found
            else "Run `kagimori-verifier init` for a new verifier, or correct `database` in verifier.toml.",
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what the database raises into an OperatorError that says what to do."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(error, IntegrityError) or sqlite.is_conflict(cause):
            raise Conflict(
                "The database refuses a change.",
                expected="one that agrees with what it holds",
                found=str(cause),
            ) from error
        code, todo = sqlite.problem(cause) or _UNKNOWN
        raise _unavailable(code, str(cause), todo) from error


@contextlib.contextmanager
def _explained_file() -> Iterator[None]:
    """Turn what the file system raises about the database's file into a StoreUnavailable."""
    try:
        yield
    except OSError as error:
        code, todo = sqlite.problem_of_file(error)
        raise _unavailable(code, str(error.strerror), todo) from error


def _unavailable(code: str, found: str, todo: str) -> StoreUnavailable:
    return StoreUnavailable(
        "The database cannot be used.", code=code, expected="a database that answers", found=found, todo=todo
    )
