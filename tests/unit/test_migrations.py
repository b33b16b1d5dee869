"""The tables that migrations make are the tables that the code knows, and no other version is touched."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import alembic.command
import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from kagimori_verifier.store import Store, StoreOutdated, database, schema, settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Say where the database lies."""
    return tmp_path / "verifier.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Make a new database."""
    made = Store.create(f"sqlite:///{path}")
    yield made
    made.close()


def _tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as other:
        return {name for (name,) in other.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def test_migrations_from_nothing_make_what_the_code_knows(store: Store) -> None:
    """Alembic finds no difference: no column, index, key or type was forgotten on either side."""
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_primary_and_foreign_keys_are_those_the_code_knows(store: Store, path: Path) -> None:
    """Alembic does not compare primary keys, and the single use of a session is one."""
    with closing(sqlite3.connect(path)) as other:
        for table in schema.metadata.sorted_tables:
            columns = other.execute("SELECT pk, name FROM pragma_table_info(?) WHERE pk", (table.name,))
            made = [name for _, name in sorted(columns)]
            assert made == [column.name for column in table.primary_key], table.name
            foreign = other.execute('SELECT "from", "table" FROM pragma_foreign_key_list(?)', (table.name,))
            assert set(foreign) == {(key.parent.name, key.column.table.name) for key in table.foreign_keys}, (
                table.name
            )


def test_the_newest_migration_is_the_one_that_the_code_asks_for() -> None:
    """A migration that was added without telling the store would lock every verifier out."""
    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(database.MIGRATIONS))
    assert ScriptDirectory.from_config(configuration).get_current_head() == database.SCHEMA


@pytest.mark.parametrize("version", ["9999", "0000"])
def test_tables_of_another_version_are_refused_and_left_alone(store: Store, path: Path, version: str) -> None:
    """A newer release's database may hold rules that this one does not know: it is neither read nor written."""
    store.close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = ?", (version,))
    before = path.read_bytes()
    for use in (Store.open, Store.create):
        with pytest.raises(StoreOutdated, match=f"schema {version}") as caught:
            use(f"sqlite:///{path}")
        assert caught.value.code == "store.schema"
        assert "restore a backup" in (caught.value.todo or "")
    assert path.read_bytes() == before


def test_tables_of_another_program_are_refused_and_left_alone(path: Path) -> None:
    """A path that names someone else's database does not get our tables beside theirs."""
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE bookmark (url TEXT)")
    for use in (Store.open, Store.create):
        with pytest.raises(StoreOutdated, match="schema none"):
            use(f"sqlite:///{path}")
    assert _tables(path) == {"bookmark"}


def test_an_empty_file_can_be_made_a_database_but_not_opened_as_one(path: Path) -> None:
    """It is what is left of an init that was interrupted: the error names the verb that goes on."""
    path.touch()
    with pytest.raises(StoreOutdated) as caught:
        Store.open(f"sqlite:///{path}")
    assert "kagimori-verifier init" in (caught.value.todo or "")
    Store.create(f"sqlite:///{path}").close()
    Store.open(f"sqlite:///{path}").close()


def test_making_a_database_twice_keeps_what_it_holds(store: Store, path: Path) -> None:
    """Whether there is an identity in it is for init to refuse; the tables stay as they are."""
    with store.write() as txn:
        settings.put(txn, "name", "value")
    again = Store.create(f"sqlite:///{path}")
    with again.read() as txn:
        assert settings.get(txn, "name") == "value"
    again.close()


def test_a_migration_that_fails_in_the_middle_leaves_no_tables(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tables or none: half a schema would be refused for ever as another version's."""
    upgrade = alembic.command.upgrade

    def interrupted(configuration: alembic.config.Config, revision: str) -> None:
        upgrade(configuration, revision)
        raise KeyboardInterrupt

    monkeypatch.setattr(alembic.command, "upgrade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store.create(f"sqlite:///{path}")
    assert _tables(path) == set()
    monkeypatch.undo()
    Store.create(f"sqlite:///{path}").close()
