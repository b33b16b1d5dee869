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
from sqlalchemy import text

from kagimori_verifier.store import (
    Conflict,
    Store,
    StoreOutdated,
    StoreUnavailable,
    database,
    redemptions,
    schema,
    settings,
    vms,
)


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
    script = ScriptDirectory.from_config(configuration)
    assert script.get_current_head() == database.SCHEMA
    assert tuple(reversed([one.revision for one in script.walk_revisions()])) == database.SCHEMAS


def _made_by(path: Path, version: str) -> None:
    """Make a database as the release of that version did, with a volume, a used session and a line of the ledger."""
    made = Store(f"sqlite:///{path}")
    path.touch(mode=0o600)
    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(database.MIGRATIONS))
    with made._engine.connect() as connection, connection.begin():
        configuration.attributes["connection"] = connection
        alembic.command.upgrade(configuration, version)
    made.close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO profile VALUES ('debian', '{}', 1)")
        other.execute("INSERT INTO vm VALUES ('web1', 'debian', 1, '[]', '[]', 1)")
        other.execute("INSERT INTO volume VALUES ('web1', 'uuid', 'active', x'aa', 1, 0, 'cryptroot', 1)")
        row = ("session", x := b"\0", "web1", "unlock", "keys", "svsm-vtpm", "VCEK", x, x, x, 1, 2)
        other.execute(
            "INSERT INTO redemption VALUES (x'00', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, NULL)", row
        )
        other.execute("INSERT INTO ledger VALUES (1, x'00', x'01', 1, 'vm-added', 'web1', NULL, '{}')")


def test_a_database_of_the_first_release_is_upgraded_and_kept_as_it_was(path: Path, tmp_path: Path) -> None:
    """No key and no used session is lost; a release that is taken back finds its own tables in the copy."""
    _made_by(path, "0001")
    with pytest.raises(StoreOutdated) as caught:
        Store.open(f"sqlite:///{path}")
    assert "kagimori-verifier upgrade" in (caught.value.todo or "")
    assert Store.upgrade(f"sqlite:///{path}", lambda found: tmp_path / f"kept-{found}") == (
        "0001",
        tmp_path / "kept-0001",
    )
    upgraded = Store.open(f"sqlite:///{path}")
    with upgraded.read() as txn:
        (volume,) = vms.volumes(txn, "web1")
        used = redemptions.find(txn, b"\0")
    with upgraded._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    with pytest.raises(Conflict, match="append-only"), upgraded.write() as txn:
        txn.execute(text("DELETE FROM ledger"))
    upgraded.close()
    assert (volume.wrapped, volume.origin, volume.epoch_given) == (b"\xaa", "made", 0)
    assert used is not None
    assert (used.session, used.verifier_key) == ("session", None)
    with closing(sqlite3.connect(tmp_path / "kept-0001")) as kept:
        assert kept.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert kept.execute("SELECT count(*) FROM redemption").fetchall() == [(1,)]
    assert Store.upgrade(f"sqlite:///{path}", lambda _: tmp_path / "unused") == (database.SCHEMA, None)
    assert not (tmp_path / "unused").exists()


def test_an_upgrade_that_fails_in_the_middle_leaves_the_old_tables(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the older release goes on with them."""
    _made_by(path, "0001")
    upgrade = alembic.command.upgrade

    def interrupted(configuration: alembic.config.Config, revision: str) -> None:
        upgrade(configuration, revision)
        raise KeyboardInterrupt

    monkeypatch.setattr(alembic.command, "upgrade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store.upgrade(f"sqlite:///{path}", lambda _: tmp_path / "kept")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert "origin" not in {row[1] for row in other.execute("PRAGMA table_info(volume)")}


def test_without_room_for_a_copy_nothing_is_upgraded(path: Path, tmp_path: Path) -> None:
    """A copy that is there already is of somebody else."""
    _made_by(path, "0001")
    (tmp_path / "kept").touch()
    with pytest.raises(StoreUnavailable):
        Store.upgrade(f"sqlite:///{path}", lambda _: tmp_path / "kept")
    with pytest.raises(StoreOutdated, match="schema 0001"):
        Store.open(f"sqlite:///{path}")


@pytest.mark.parametrize("version", ["9999", "0000"])
def test_an_upgrade_touches_no_tables_of_a_version_that_it_does_not_know(
    store: Store, path: Path, tmp_path: Path, version: str
) -> None:
    """A newer release's least of all."""
    store.close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = ?", (version,))
    with pytest.raises(StoreOutdated, match=f"schema {version}"):
        Store.upgrade(f"sqlite:///{path}", lambda _: tmp_path / "kept")


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
