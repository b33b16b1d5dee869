"""Statements of every request: written with SQLAlchemy, compiled once, and handed to the driver without it.

SQLAlchemy's own way of running a statement that it has compiled costs five times what SQLite needs for it, some thirty
times in each attestation. What is left of it here keeps values true: parameters by name, types of columns, its errors, and
its event, so that whoever listens to statements hears of these too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sqlalchemy import Connection, Dialect
    from sqlalchemy.sql.expression import Executable
    from sqlalchemy.types import TypeEngine

    Convert = Callable[[Any], Any]


class Prepared:
    """One statement. Its parameters are ``bindparam``s, or the ``columns`` of an INSERT; a row is a dict by column name."""

    def __init__(self, statement: Executable, columns: Iterable[str] | None = None) -> None:
        """Keep the statement; it is compiled when it first runs."""
        self._statement = statement
        self._columns = None if columns is None else list(columns)
        self._plans: dict[str, _Plan] = {}

    def run(self, connection: Connection, values: Mapping[str, object]) -> list[dict[str, Any]]:
        """Run it in the connection's transaction and give its rows. Raises SQLAlchemy's errors."""
        plan = self._plans.get(connection.dialect.name)
        if plan is None:
            plan = _Plan(self._statement, connection.dialect, self._columns)
            self._plans[connection.dialect.name] = plan
        return plan.run(connection, values)


class _Plan:
    """A statement as one dialect has it."""

    def __init__(self, statement: Executable, dialect: Dialect, columns: list[str] | None) -> None:
        compiled: Any = statement.compile(dialect=dialect, column_keys=columns)  # type: ignore[attr-defined]  # every statement has it
        self._sql = str(compiled)
        self._error = dialect.loaded_dbapi.Error
        self._positional = compiled.positional
        names = compiled.positiontup if compiled.positional else list(compiled.params)
        self._asked = frozenset(name for name in names if compiled.binds[name].required)
        self._fixed = {name: compiled.params[name] for name in names if name not in self._asked}
        self._parameters = [(name, _binding(compiled.binds[name].type, dialect)) for name in names]
        self._results = [
            (column.keyname, _reading(column.type, dialect))
            for column in compiled._result_columns or ()  # noqa: SLF001 - there is no public name
        ]

    def run(self, connection: Connection, values: Mapping[str, object]) -> list[dict[str, Any]]:
        if values.keys() != self._asked:  # what is left out must not become NULL
            raise TypeError(self._sql, sorted(values))
        given = {**self._fixed, **values}
        bound = {
            name: given[name] if convert is None else convert(given[name])
            for name, convert in self._parameters
        }
        parameters: Any = [bound[name] for name, _ in self._parameters] if self._positional else bound
        cursor = connection.connection.cursor()
        try:
            for listener in connection.dispatch.before_cursor_execute:
                listener(connection, cursor, self._sql, parameters, None, False)  # noqa: FBT003 - the event's form: not many at once
            cursor.execute(self._sql, parameters)
            found = cursor.fetchall() if self._results else ()
        except self._error as error:
            raise DBAPIError.instance(
                self._sql,
                None,
                error,
                self._error,
                hide_parameters=True,
                dialect=connection.dialect,
            ) from error
        finally:
            cursor.close()
        return [
            {
                name: value if convert is None else convert(value)
                for (name, convert), value in zip(self._results, row, strict=True)
            }
            for row in found
        ]


def _binding(kind: TypeEngine[Any], dialect: Dialect) -> Convert | None:
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _reading(kind: TypeEngine[Any], dialect: Dialect) -> Convert | None:
    return kind.dialect_impl(dialect).result_processor(dialect, None)
