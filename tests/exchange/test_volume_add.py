"""``volume add`` as an owner runs it: the real program, a real LUKS2 file, and where the key is afterwards."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests import volumes

from kagimori_simulator import disk
from kagimori_verifier import settings
from kagimori_verifier.cli import main
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import Store, sqlite, vms

pytestmark = pytest.mark.slow  # the quick suite has three minutes

PASSPHRASE = "the passphrase of an installer"
FLOOR = "Milan:boot_loader=4,tee=0,snp=24,microcode=219"
WAIT_S = 60

# The verifier's own main, in a process that is killed when the header was written and nobody has said so.
KILLED = """
import os, signal, sys
from kagimori_verifier import luks_enrol
from kagimori_verifier.cli import main
write = luks_enrol.Disk.write
luks_enrol.Disk.write = lambda *words: (write(*words), os.kill(os.getpid(), signal.SIGKILL))
main(sys.argv[1:])
"""


@dataclass
class Done:
    """What a program, or the command line in this process, gave."""

    code: int
    out: str
    err: str


@dataclass
class Desk:
    """A verifier with one VM, a disk image beside it, and all that was printed."""

    directory: Path
    capsys: pytest.CaptureFixture[str]
    printed: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        """The verifier's settings."""
        return self.directory / "verifier" / "verifier.toml"

    @property
    def image(self) -> Path:
        """The disk."""
        return self.directory / "disk.img"

    def run(self, *words: str) -> Done:
        """Run the command line in this process."""
        self.capsys.readouterr()
        code = main(["--config", str(self.config), *words])
        return self._seen(Done(code, *self.capsys.readouterr()))

    def json(self, *words: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Run a verb that must work, and read its JSON."""
        done = self.run("--json", *words)
        assert done.code == 0, done.err
        return json.loads(done.out)

    def add(self, *words: str, passphrase: str = PASSPHRASE) -> Done:
        """Enrol the disk, with a passphrase on a pipe."""
        reader, writer = os.pipe()
        os.write(writer, passphrase.encode() + b"\n")
        os.close(writer)
        try:
            return self.run(*self.words(), "--passphrase-fd", str(reader), *words)
        finally:
            os.close(reader)

    def add_outside(self, *program: str) -> Done:
        """Enrol the disk by a process of its own."""
        done = subprocess.run(
            [sys.executable, *program, "--config", self.config, *self.words(), "--passphrase-fd", "0"],
            input=PASSPHRASE + "\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        return self._seen(Done(done.returncode, done.stdout, done.stderr))

    def words(self) -> tuple[str, ...]:
        """Give the verb and what it always needs."""
        return ("volume", "add", "--vm", "web1", "--device", str(self.image))

    def key(self) -> bytes:
        """Unwrap the one key that is kept, as release would."""
        loaded = settings.load(self.config)
        store = Store.open(loaded.database_url)
        with closing(store), store.read() as txn:
            (row,) = vms.volumes(txn, "web1", state=None)
        return UnlockKeys(loaded.kek_provider().read()).unwrap(row.wrapped, "web1", row.uuid, row.version)

    def _seen(self, done: Done) -> Done:
        assert "Traceback" not in done.err
        self.printed += [done.out, done.err]
        return done


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a verifier with a VM and a disk, to copy."""
    directory = tmp_path_factory.mktemp("desk")
    config = str(directory / "verifier" / "verifier.toml")
    profile = ("profile", "add", "debian", "--boot-way", "grub", "--tcb-floor", FLOOR)
    assert main(["init", "--dir", str(directory / "verifier")]) == 0
    assert main(["--config", config, *profile]) == 0
    assert main(["--config", config, "vm", "add", "web1", "--profile", "debian"]) == 0
    disk.make_volume(directory / "disk.img", PASSPHRASE.encode())
    return directory


@pytest.fixture
def desk(tmp_path: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Give an owner's desk."""
    shutil.copytree(template, tmp_path / "desk")
    return Desk(tmp_path / "desk", capsys)


def test_a_volume_is_enrolled_and_its_key_is_nowhere_to_be_found(desk: Desk) -> None:
    """The unwrapped key opens the volume; files, outputs and ledger hold neither it nor the passphrase."""
    done = desk.add_outside("-m", "kagimori_verifier")
    assert done.code == 0, done.err
    (volume,) = desk.json("volume", "list")
    assert (volume["state"], volume["label"]) == ("active", "cryptroot")
    desk.run("vm", "show", "web1")
    desk.run("vm", "config", "web1")
    desk.json("ledger", "list")
    key = desk.key()
    assert volumes.opens(desk.image, key)
    places = {str(path): path.read_bytes() for path in desk.directory.rglob("*") if path.is_file()}
    places["outputs"] = "\n".join(desk.printed).encode()
    for form in (
        key,
        key.hex().encode(),
        key.hex().upper().encode(),
        repr(key).encode(),
        PASSPHRASE.encode(),
    ):
        assert [where for where, content in places.items() if form in content] == []


def test_a_key_file_is_taken_as_it_is_newline_and_all(desk: Desk) -> None:
    """Unlike a passphrase that somebody types."""
    key_file = desk.directory / "key"
    key_file.write_bytes(PASSPHRASE.encode() + b"\n")
    words = (*desk.words(), "--key-file", str(key_file))
    assert desk.run(*words).code == 8
    key_file.write_bytes(PASSPHRASE.encode())
    assert desk.run(*words).code == 0


def test_a_wrong_passphrase_is_named_and_changes_nothing(desk: Desk) -> None:
    """Exit code 8, what cryptsetup said, and no half volume."""
    before = desk.image.read_bytes()
    done = desk.add(passphrase="another")
    assert done.code == 8
    assert "no keyslot opens with this passphrase" in done.err
    assert "to do:" in done.err
    assert desk.json("volume", "list") == []
    assert desk.image.read_bytes() == before


def test_without_a_passphrase_nothing_happens(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal, an empty line, a descriptor that is none: nobody is asked, and nothing is kept."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    tries = [
        desk.run("--json", *desk.words()),
        desk.run("--json", *desk.words(), "--passphrase-fd", "999"),
        desk.add("--json", passphrase=""),
    ]
    for done in tries:
        assert done.code == 2
        assert json.loads(done.out)["error"]["code"] == "volume.passphrase"
    assert desk.json("volume", "list") == []


def test_killed_after_the_header_was_written_the_same_command_completes_it(desk: Desk) -> None:
    """``adding`` shows, agents are not told of it, and the key in the new keyslot is the one that becomes active."""
    killed = desk.add_outside("-c", KILLED)
    assert killed.code == -signal.SIGKILL
    assert [row["state"] for row in desk.json("volume", "list")] == ["adding"]
    assert "interrupted" in desk.run("volume", "list").err
    assert "[[volumes]]" not in desk.run("vm", "config", "web1").out
    key = desk.key()
    assert volumes.opens(desk.image, key)
    assert desk.add().code == 0
    assert [row["state"] for row in desk.json("volume", "list")] == ["active"]
    assert desk.key() == key
    assert volumes.keyslots(desk.image) == {0, 1}
    assert [row["event"] for row in desk.json("ledger", "list")].count("volume-added") == 1


def test_a_database_that_another_program_holds_is_named_with_what_to_do(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3 after a short wait, and the disk untouched."""
    before = desk.image.read_bytes()
    path = desk.directory / "verifier" / "verifier.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
        done = desk.add("--json")
    assert done.code == 3
    error = json.loads(done.out)["error"]
    assert error["code"] == "store.locked"
    assert error["todo"]
    assert desk.image.read_bytes() == before


def test_a_kek_that_others_can_read_wraps_nothing(desk: Desk) -> None:
    """The disk is not even looked at."""
    kek = desk.directory / "verifier" / "kek"
    kek.chmod(0o640)
    done = desk.add("--json")
    assert done.code == 3
    assert json.loads(done.out)["error"]["code"] == "kek.mode"
    assert volumes.keyslots(desk.image) == {0}
