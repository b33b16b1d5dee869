"""Prepared statements mean what SQLAlchemy would have made of them, and fail as it would have failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import bindparam, event, insert, select
from sqlalchemy.exc import IntegrityError

from kagimori_verifier.store import Store, schema
from kagimori_verifier.store.database import Conflict
from kagimori_verifier.store.prepared import Prepared

COLUMNS = ["session", "vm_id", "profile", "created", "confirmed", "pcrs"]
ROW = {"session": "s", "vm_id": "v", "profile": "p", "created": 7, "confirmed": True, "pcrs": "{}"}
ADD = Prepared(insert(schema.observation), COLUMNS)
GET = Prepared(
    select(schema.observation).where(
        schema.observation.c.session == bindparam("of"), schema.observation.c.confirmed.is_(bindparam("sure"))
    )
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Make a new database."""
    made = Store.create(f"sqlite:///{tmp_path}/verifier.db")
    yield made
    made.close()


def test_values_come_back_as_what_they_were(store: Store) -> None:
    """True is True and no 1, and a statement that has no rows gives none."""
    with store.write() as txn:
        assert txn.rows(ADD, **ROW) == []
        found = txn.row(GET, of="s", sure=True)
        assert found == ROW
        assert found["confirmed"] is True
        assert txn.row(GET, of="s", sure=False) is None
        asked = select(schema.observation).where(schema.observation.c.session == "s")
        assert dict(txn.execute(asked).one()._mapping) == found


@pytest.mark.parametrize(
    "values", [{}, {"of": "s"}, {"of": "s", "sure": True, "more": 1}], ids=["none", "too few", "too many"]
)
def test_a_parameter_that_is_left_out_is_no_null(store: Store, values: dict[str, object]) -> None:
    """Nor is one that nobody asked for overlooked: whoever wrote it meant something."""
    with store.read() as txn, pytest.raises(TypeError):
        txn.rows(GET, **values)


def test_a_refused_change_has_sqlalchemys_error_inside_and_ours_outside(store: Store) -> None:
    """Redemptions tell a session that was used twice by it; and no value of the row is told."""

    def add_twice() -> None:
        with store.write() as txn:
            txn.rows(ADD, **ROW)
            with pytest.raises(IntegrityError) as caught:
                txn.rows(ADD, **ROW)
            assert caught.value.params is None
            raise caught.value

    with pytest.raises(Conflict):
        add_twice()


def test_who_listens_to_statements_hears_prepared_ones(store: Store) -> None:
    """Tests of query plans and of faults do: what they do not hear of, they do not prove anything about."""
    heard: list[tuple[str, object]] = []

    @event.listens_for(store._engine, "before_cursor_execute")
    def hear(
        _connection: object, _cursor: object, statement: str, parameters: object, *_rest: object
    ) -> None:
        heard.append((statement.split(maxsplit=1)[0], parameters))

    with store.write() as txn:
        txn.rows(ADD, **ROW)
        txn.row(GET, of="s", sure=True)
    assert heard == [("BEGIN", ()), ("INSERT", list(ROW.values())), ("SELECT", ["s", 1])]
