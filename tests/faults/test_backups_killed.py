"""kill -9 a backup or a restore at every step: what has its name is whole, and the same words complete it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.faults import invariants
from tests.faults.test_owner_killed import Desk, desk, furnished, points

pytestmark = pytest.mark.slow  # a process per point

__all__ = ["desk", "furnished"]  # fixtures


def test_a_backup_killed_at_any_step_leaves_no_half_file_under_its_name(desk: Desk, tmp_path: Path) -> None:
    """Nor any secret beside it, nor anything that is in the way of the next one."""
    kek = (desk.directory / "kek").read_bytes()
    assert desk.run("backup", str(tmp_path / "whole"), record=tmp_path / "record").code == 0
    for number, point in enumerate(points(tmp_path / "record")):
        file = tmp_path / str(number) / "backup"
        file.parent.mkdir()
        assert desk.run("backup", str(file), at=point).code == -signal.SIGKILL, point
        invariants.the_ledger_holds(desk.launcher, desk.directory)
        for left in file.parent.iterdir():
            assert kek not in left.read_bytes(), (point, left)
            assert left.stat().st_mode & 0o777 == 0o600, (point, left)
        if not file.exists():
            assert desk.run("backup", str(file)).code == 0, point
        words = (
            "restore",
            str(file),
            "--kek",
            str(desk.directory / "kek"),
            "--dir",
            str(file.with_name("new")),
        )
        done = desk.launcher.run("verifier", "--json", *words)
        assert done.code == 0, (point, done.stderr.read_text())
        assert {path.name for path in file.parent.iterdir()} <= {"backup", "new"}, point


def test_a_restore_killed_at_any_step_makes_all_of_a_verifier_or_none(desk: Desk, tmp_path: Path) -> None:
    """The directory has its name once everything in it was checked and synchronised."""
    file = tmp_path / "backup"
    desk.good("backup", str(file))
    words = ("--json", "restore", str(file), "--kek", str(desk.directory / "kek"), "--dir")
    whole = desk.launcher.run("verifier", *words, tmp_path / "whole", record=tmp_path / "record")
    assert whole.code == 0, whole.stderr.read_text()
    for number, point in enumerate(points(tmp_path / "record")):
        directory = tmp_path / f"new-{number}"
        killed = desk.launcher.run("verifier", *words, directory, at=point)
        assert killed.code == -signal.SIGKILL, point
        if not directory.exists():
            again = desk.launcher.run("verifier", *words, directory)
            assert again.code == 0, (point, again.stderr.read_text())
        made = Desk(desk.launcher, directory)
        assert [line["event"] for line in made.good("ledger", "list")][:2] == ["restored", "backup"], point
        with desk.launcher.serving(directory):
            pass  # it opens, under its KEK
        assert not (tmp_path / f".new-{number}.restoring").exists(), point
