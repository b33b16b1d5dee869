"""kill -9 the owner's command line at every write: all of a verb was done or nothing, and the same words complete it."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests import volumes
from tests.desks import CHIP, DIGEST, FLOOR, SESSION
from tests.faults import invariants
from tests.faults.programs import Launcher, Program

from kagimori_simulator import disk, measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier import learning, settings
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import Store, observations, schema, vms
from kagimori_verifier.store.observations import Observation

pytestmark = pytest.mark.slow  # a process per point

PASSPHRASE = b"the installer's passphrase"
BY_CHANCE = {
    "created",
    "expires",
    "hash",
    "previous",
    "wrapped",
    "public",
    "public_key",
    "key_id",
    "id",
    "recovery",
}
"""Columns that differ from run to run: clocks, random keys, and what follows from them."""
PARTS = 4
"""Into how many tests the points of the longest verbs are divided, for those who test in parallel."""

BEFORE: tuple[tuple[str, ...], ...] = (
    ("profile", "add", "debian", "--boot-way", "grub", "--tcb-floor", FLOOR),
    (
        *("reference", "measurement", "add", DIGEST, "--profile", "debian", "--kind", "svsm-vtpm"),
        *("--label", "svsm", "--svsm-feature", "vtpm"),
    ),
    ("vm", "add", "web1", "--profile", "debian", "--chip", CHIP),
    ("vm", "add", "web2", "--profile", "debian"),
    ("reference", "pcr", "add", "--vm", "web1", "--label", "a boot", "--event-log", "log"),
)
"""What the owner has done before a story begins."""

VERBS: dict[str, tuple[str, ...]] = {
    "profile add": ("profile", "add", "other", "--boot-way", "direct", "--tcb-floor", FLOOR),
    "profile edit": ("profile", "edit", "debian", "--file", "policy.json"),
    "measurement add": (
        *("reference", "measurement", "add", "77" * 48, "--profile", "debian", "--kind", "svsm-vtpm"),
        *("--label", "another", "--svsm-feature", "vtpm"),
    ),
    "measurement remove": ("reference", "measurement", "remove", DIGEST, "--profile", "debian"),
    "boot state add": ("reference", "pcr", "add", "--vm", "web2", "--label", "more", "--event-log", "log"),
    "accept": ("reference", "accept", SESSION, "--yes"),
    "vm add": ("vm", "add", "web3", "--profile", "debian", "--chip", CHIP),
    "vm code": ("vm", "code", "web1", "--recovery-fd", "2"),
    "vm disable": ("vm", "disable", "web1"),
    "vm chip add": ("vm", "chip", "add", "web2", CHIP),
    "vm remove": ("vm", "remove", "web1"),
    "root add": ("endorsements", "root", "add", "--certificate", "ark.der", "--label", "simulated"),
}
"""What the owner is doing when the power of the verb's process ends, by what it is called here."""
DONE_ALREADY = ("exists", "unknown")
"""How the code of an error ends that tells an owner that a repeated verb has nothing to do."""


@dataclass
class Desk:
    """A verifier in a directory, and its owner's hands."""

    launcher: Launcher
    directory: Path

    def run(self, *words: str, **failpoints: Any) -> Program:  # noqa: ANN401 - the arguments of failpoints.arm
        """Run a verb; words that name a file of the directory mean that file."""
        found = [str(self.directory / word) if (self.directory / word).is_file() else word for word in words]
        done = self.launcher.run(
            "verifier", "--json", "--config", self.directory / "verifier.toml", *found, **failpoints
        )
        invariants.no_traceback(done.stderr)
        return done

    def good(self, *words: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Run a verb that must work."""
        done = self.run(*words)
        assert done.code == 0, done.stderr.read_text()
        return done.json

    def copy(self, name: str) -> Desk:
        """Give another desk as this one is now."""
        return Desk(self.launcher, Path(shutil.copytree(self.directory, self.directory.with_name(name))))

    def store(self) -> Store:
        """Open the database."""
        return Store.open(settings.load(self.directory / "verifier.toml").database_url)

    def known(self) -> dict[str, list[dict[str, Any]]]:
        """Give all that the database knows but for chance and time, having verified the ledger."""
        invariants.the_ledger_holds(self.launcher, self.directory)
        with invariants.reading(self.directory) as txn:
            return {
                name: [_but_for_chance(dict(row._mapping)) for row in txn.execute(select(table))]
                for name, table in schema.metadata.tables.items()
            }


def _but_for_chance(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a row, and of what a line of the ledger tells, what differs from run to run."""
    kept = {column: value for column, value in row.items() if column not in BY_CHANCE}
    if "body" in kept:
        kept["body"] = _but_for_chance(json.loads(kept["body"]))
    return kept


def points(record: Path) -> list[str]:
    """Read the points that a run has passed."""
    found = record.read_text().splitlines()
    assert len(found) == len(set(found)) >= 6
    return found


@pytest.fixture(scope="session")
def furnished(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory, amd: AmdRoot) -> Desk:
    """Give a verifier that knows VMs, a boot and a confirmed session, to be copied."""
    desk = Desk(launcher, tmp_path_factory.mktemp("desk") / "furnished")
    assert launcher.run("verifier", "init", "--dir", desk.directory).code == 0
    log = measured_boot.grub().event_log()
    (desk.directory / "log").write_bytes(log)
    for words in BEFORE:
        desk.good(*words)
    policy = desk.good("profile", "show", "debian") | {"any_chip": True}
    (desk.directory / "policy.json").write_text(json.dumps(policy))
    (desk.directory / "ark.der").write_bytes(amd.ark_der)
    store = desk.store()
    with store.write() as txn:
        pcrs = learning.from_event_log(log)
        observations.add(txn, Observation(SESSION, "web1", "debian", 1, False, pcrs))
        observations.confirm(txn, SESSION)
    store.close()
    return desk


@pytest.fixture
def desk(furnished: Desk, tmp_path: Path) -> Desk:
    """Give a desk of its own to one story."""
    return Desk(furnished.launcher, Path(shutil.copytree(furnished.directory, tmp_path / "desk")))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_killed_at_any_write_was_done_or_was_not(desk: Desk, verb: str, tmp_path: Path) -> None:
    """Whoever gives the same words again gets what they wanted, or is told that it is so already."""
    words = VERBS[verb]
    before = desk.known()
    whole = desk.copy("whole")
    assert whole.run(*words, record=tmp_path / "record").code == 0
    after = whole.known()
    assert after != before
    met: list[bool] = []
    for number, point in enumerate(points(tmp_path / "record")):
        killed = desk.copy(str(number))
        assert killed.run(*words, at=point).code == -signal.SIGKILL, point
        found = killed.known()
        assert found in (before, after), point
        met.append(found == after)
        again = killed.run(*words)
        if found == before:
            assert again.code == 0, point
            assert killed.known() == after, point
        elif again.code != 0:
            assert again.json["error"]["code"].endswith(DONE_ALREADY), point
    assert met == sorted(met), "once it is done, it stays done"
    assert set(met) == {False, True}


@dataclass
class Disk:
    """A volume's image, and how its enrolment stands."""

    desk: Desk
    image: Path
    words: tuple[str, ...]

    @classmethod
    def beside(cls, desk: Desk, template: Path) -> Disk:
        """Put a copy of an image into a verifier's directory."""
        image = Path(shutil.copy(template, desk.directory / "disk.img"))
        (desk.directory / "passphrase").write_bytes(PASSPHRASE)
        return cls(
            desk, image, ("volume", "add", "--vm", "web1", "--device", "disk.img", "--key-file", "passphrase")
        )

    def states(self) -> list[str]:
        """Name the states of the VM's volumes, having shown that no keyslot's key is forgotten."""
        store = self.desk.store()
        with store.read() as txn:
            rows = vms.volumes(txn, "web1", state=None)
        store.close()
        kek = UnlockKeys(FileKek(self.desk.directory / "kek").read())
        kept = [kek.unwrap(row.wrapped, row.vm_id, row.uuid, row.version) for row in rows]
        opening = [volumes.opens(self.image, key) for key in kept]
        assert len(volumes.keyslots(self.image)) == 1 + sum(opening), "a keyslot that nobody has the key of"
        assert all(opens for row, opens in zip(rows, opening, strict=True) if row.state == "active")
        return [row.state for row in rows]


@pytest.fixture(scope="session")
def volume_points(furnished: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Make an image, add it once, and list the points that this passes."""
    directory = tmp_path_factory.mktemp("volume")
    disk.make_volume(directory / "disk.img", PASSPHRASE)
    desk = Desk(furnished.launcher, Path(shutil.copytree(furnished.directory, directory / "desk")))
    added = Disk.beside(desk, directory / "disk.img")
    assert desk.run(*added.words, record=directory / "record").code == 0
    assert added.states() == ["active"]
    return directory / "disk.img", points(directory / "record")


@pytest.mark.parametrize("part", range(PARTS))
def test_a_volume_add_killed_at_any_step_loses_no_key_and_is_completed_by_the_same_words(
    furnished: Desk, volume_points: tuple[Path, list[str]], part: int, tmp_path: Path
) -> None:
    """Header and database are two files, and a crash comes between them: no keyslot stays whose key is forgotten."""
    template, all_points = volume_points
    for number, point in list(enumerate(all_points))[part::PARTS]:
        desk = Desk(furnished.launcher, Path(shutil.copytree(furnished.directory, tmp_path / str(number))))
        image = Disk.beside(desk, template)
        assert desk.run(*image.words, at=point).code == -signal.SIGKILL, point
        invariants.the_ledger_holds(desk.launcher, desk.directory)
        found = image.states()
        assert found in ([], ["adding"], ["active"]), point
        again = desk.run(*image.words)
        if found == ["active"]:
            assert again.json["error"]["code"] == "volume.exists"
        else:
            assert again.code == 0, (point, again.stderr.read_text())
        assert image.states() == ["active"], point
        events = [line.event for line in invariants.lines(desk.directory)]
        assert events.count("volume-added") == 1, point
        image.image.unlink()


def test_an_import_killed_at_any_step_keeps_whole_files_only_and_lists_no_other(
    desk: Desk, amd: AmdRoot, tmp_path: Path
) -> None:
    """Half a certificate is never read, nor named among those that are kept; the same words complete it."""
    words = ("endorsements", "import")
    bundle = [tmp_path / "ark.der", tmp_path / "ask.der"]
    for path, der in zip(bundle, (amd.ark_der, amd.ask_der), strict=True):
        path.write_bytes(der)
    files = tuple(map(str, bundle))
    whole = desk.copy("whole")
    assert whole.run(*words, *files, record=tmp_path / "record").code == 0
    kept = whole.good("endorsements", "list")
    assert len(kept) == len(bundle)
    for number, point in enumerate(points(tmp_path / "record")):
        killed = desk.copy(str(number))
        assert killed.run(*words, *files, at=point).code == -signal.SIGKILL, point
        assert all(one in kept for one in killed.good("endorsements", "list")), point
        killed.good(*words, *files)
        assert killed.good("endorsements", "list") == kept, point


@pytest.mark.parametrize("part", range(PARTS))
def test_an_init_killed_at_any_step_is_completed_by_the_same_words(
    launcher: Launcher, part: int, tmp_path: Path
) -> None:
    """Power fails in the minute of the installation: the owner runs init again, and has a whole verifier."""
    words = ("--json", "init", "--listen", "127.0.0.1:0", "--dir")
    whole = launcher.run("verifier", *words, tmp_path / "whole", record=tmp_path / "record")
    assert whole.code == 0
    for number, point in list(enumerate(points(tmp_path / "record")))[part::PARTS]:
        directory = tmp_path / str(number)
        killed = launcher.run("verifier", *words, directory, at=point)
        assert killed.code == -signal.SIGKILL, point
        done = (directory / "verifier.toml").exists()
        again = launcher.run("verifier", *words, directory)
        if done:
            assert again.json["error"]["code"] == "init.exists", point
        else:
            assert again.code == 0, (point, again.stderr.read_text())
        desk = Desk(launcher, directory)
        key = desk.good("identity", "show")["public_key"]
        assert done or key == again.json["public_key"], point
        with launcher.serving(directory):
            pass  # it opens, under its KEK
        left = {path.name for path in directory.iterdir()} - {"verifier.db-wal", "verifier.db-shm"}
        assert left == {"verifier.toml", "kek", "verifier.db", "endorsements"}, point


def test_an_init_beside_another_at_work_touches_nothing(launcher: Launcher, tmp_path: Path) -> None:
    """What looks like an init that was killed may be one that is not done yet: its lock tells."""
    directory = tmp_path / "new"
    directory.mkdir()
    with (directory / "verifier.toml.new").open("w") as draft:
        fcntl.flock(draft, fcntl.LOCK_EX)
        done = launcher.run("verifier", "--json", "init", "--dir", directory)
        assert done.json["error"] | {"expected": ""} == {
            "code": "init.exists",
            "what": f"There is a verifier in {directory} already.",
            "expected": "",
            "found": "another init at work",
            "todo": "Choose another directory; nothing was touched.",
        }
        assert [path.name for path in directory.iterdir()] == ["verifier.toml.new"]
    assert launcher.run("verifier", "init", "--dir", directory).code == 0


def test_an_init_that_takes_up_a_killed_one_and_fails_leaves_what_it_found(
    launcher: Launcher, tmp_path: Path
) -> None:
    """A key that lies there is not its own to take back, even if a person put it beside the draft."""
    directory = tmp_path / "new"
    directory.mkdir()
    (directory / "verifier.toml.new").touch()
    (directory / "kek").write_bytes(bytes(range(32)))
    (directory / "kek").chmod(0o644)
    done = launcher.run("verifier", "--json", "init", "--dir", directory)
    assert done.json["error"]["code"] == "kek.mode"
    assert (directory / "kek").read_bytes() == bytes(range(32))
    assert not (directory / "verifier.db").exists()
