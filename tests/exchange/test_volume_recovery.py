"""``volume recovery``: a key on paper, shown once, by which another verifier opens the volume in its VM."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests import volumes
from tests.desks import Desk, Done
from tests.unit.luks.attacker import Host
from tests.worlds import SVSM, VM, Enrolled, Owner, make_verifier

from kagimori_agent.unlock import unlock
from kagimori_protocol import recovery_code
from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import vms

pytestmark = pytest.mark.slow  # cryptsetup's derivations


class Paper(io.StringIO):
    """A terminal that somebody copies from."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@dataclass
class Shelf:
    """An owner's desk, and the disk of its VM."""

    desk: Desk
    image: Path
    uuid: str

    def words(self, *words: str) -> tuple[str, ...]:
        """Give the verb and what it always needs."""
        return ("volume", "recovery", "--vm", VM, "--uuid", self.uuid, "--device", str(self.image), *words)

    def code(self) -> str:
        """Have a code made, by a descriptor."""
        reader, writer = os.pipe()
        try:
            done = self.desk("--json", *self.words("--output-fd", str(writer)))
            assert done.code == 0, done.err
            code = os.read(reader, 4096).decode().removesuffix("\n")
        finally:
            os.close(reader)
            os.close(writer)
        assert code not in done.out + done.err
        assert json.loads(done.out) == {"uuid": self.uuid, "keyslot": 2}
        return code


def by_pipe(desk: Desk, secret: str, option: str, *words: str) -> Done:
    """Run a verb that reads a secret from a descriptor."""
    reader, writer = os.pipe()
    os.write(writer, secret.encode() + b"\n")
    os.close(writer)
    try:
        return desk("--json", *words, option, str(reader))
    finally:
        os.close(reader)


@pytest.fixture
def shelf(enrolled: Enrolled, capsys: pytest.CaptureFixture[str]) -> Shelf:
    """Give a VM whose volume has been enrolled by `volume add`, beside the keyslot that it was made with."""
    desk = Desk(enrolled.owner.directory, capsys)
    desk.good("volume", "remove", "--vm", VM, enrolled.volume.uuid)
    key_file = enrolled.directory / "key-file"
    key_file.write_bytes(enrolled.unlock_key)
    words = ("volume", "add", "--vm", VM, "--device", enrolled.volume.device, "--key-file", key_file)
    desk.good(*words)
    return Shelf(desk, enrolled.volume.device, enrolled.volume.uuid)


def test_a_code_opens_its_volume_and_is_nowhere_but_where_it_was_shown(shelf: Shelf) -> None:
    """Neither the database nor the ledger has it; the keyslots of before stay as they were."""
    before = volumes.keyslots(shelf.image)
    code = shelf.code()
    key = recovery_code.decode(code)
    assert volumes.opens(shelf.image, key)
    assert volumes.keyslots(shelf.image) == before | {2}
    (line,) = shelf.desk.good("ledger", "list", "--limit", "1")
    assert (line["event"], line["body"]) == (
        "recovery-added",
        {"uuid": shelf.uuid, "keyslot": "2", "header_epoch": 1},
    )
    for content in shelf.desk.contents().values():
        assert key not in content
        assert code.replace("-", "").encode() not in content


def test_a_terminal_is_shown_the_code_in_lines_that_fit(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the UUID that `recovery import` will ask for."""
    paper = Paper()
    monkeypatch.setattr("sys.stdout", paper)
    assert shelf.desk(*shelf.words()).code == 0
    told = paper.getvalue().splitlines()
    assert shelf.uuid in told[0]
    assert volumes.opens(shelf.image, recovery_code.decode("\n".join(told[1:4])))


@pytest.mark.parametrize("more", [(), ("--json",), ("--output-fd", "9999")], ids=["a file", "JSON", "closed"])
def test_a_code_that_nobody_would_see_is_not_made(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """A log that took it would be a second paper."""
    if "--json" in more:
        monkeypatch.setattr("sys.stdout", Paper())
    before = shelf.image.read_bytes()
    done = shelf.desk(*shelf.words(*more))
    assert done.code == 2
    monkeypatch.undo()
    assert shelf.image.read_bytes() == before


def test_a_header_that_is_not_the_owners_gets_no_recovery_keyslot(shelf: Shelf) -> None:
    """An image that came back from its host: what it added would be sealed in."""
    kept = shelf.image.read_bytes()
    shelf.desk.good("volume", "reseal", "--vm", VM, "--uuid", shelf.uuid, "--device", str(shelf.image))
    shelf.image.write_bytes(kept)
    _, writer = os.pipe()
    assert shelf.desk("--json", *shelf.words("--output-fd", str(writer))).error == "luks.epoch"
    other = "11111111-2222-4333-8444-555555555555"
    words = ("volume", "recovery", "--vm", VM, "--uuid", other, "--device", str(shelf.image))
    assert shelf.desk("--json", *words, "--output-fd", str(writer)).error == "volume.unknown"
    assert shelf.image.read_bytes() == kept


def test_a_new_verifier_opens_the_volume_in_its_vm_by_the_code(
    shelf: Shelf, enrolled: Enrolled, amd: AmdRoot, tmp_path: Path
) -> None:
    """The verifier burned down, and there is no backup: another one, another agent.toml, and the paper."""
    code = shelf.code()
    shutil.rmtree(shelf.desk.directory)
    make_verifier(tmp_path / "second", amd)
    desk = Desk(tmp_path / "second", shelf.desk.capsys)
    with Owner.opened(desk.directory, amd) as owner, owner.served():
        owner.enrol_profile("grub", "grub", "svsm-vtpm", SVSM)
        owner.enrol_vm(VM, "grub")
        owner.accept_boot(VM, "grub", measured_boot.grub(), "grub")
        done = by_pipe(desk, code, "--code-fd", "recovery", "import", "--vm", VM, "--uuid", shelf.uuid)
        assert done.code == 0, done.err
        with replace(enrolled, owner=owner).booted() as (_, config):
            assert unlock(config, lambda _: None, prove=True).confirmed
        assert owner.events()[-2:] == ["released", "confirmed-opened"]


def test_a_code_stays_good_when_other_keyslots_change(shelf: Shelf, enrolled: Enrolled) -> None:
    """Its token vouches for its own keyslot alone."""
    code = shelf.code()
    shelf.desk.good("volume", "reseal", "--vm", VM, "--uuid", shelf.uuid, "--device", str(shelf.image))
    shelf.desk.good("volume", "remove", "--vm", VM, shelf.uuid)
    done = by_pipe(shelf.desk, code, "--code-fd", "recovery", "import", "--vm", VM, "--uuid", shelf.uuid)
    assert done.code == 0, done.err
    with enrolled.booted() as (_, config):
        assert unlock(config, lambda _: None, prove=True).confirmed


def test_a_volume_whose_key_came_from_paper_gets_a_new_one_by_its_code(shelf: Shelf) -> None:
    """A key that lies in a drawer is not one to boot by."""
    code = shelf.code()
    add = ("volume", "add", "--vm", VM, "--device", str(shelf.image))
    shelf.desk.good("volume", "remove", "--vm", VM, shelf.uuid)
    wrong = code[:-1] + ("q" if code[-1] != "q" else "p")
    assert by_pipe(shelf.desk, wrong, "--recovery-code-fd", *add).error == "recovery.checksum"
    done = by_pipe(shelf.desk, code, "--recovery-code-fd", *add)
    assert done.code == 0, done.err
    unlock_keys = UnlockKeys(FileKek(shelf.desk.directory / "kek").read())
    with closing(shelf.desk.store()) as store, store.read() as txn:
        (row,) = vms.volumes(txn, VM)
    key: Any = unlock_keys.unwrap(row.wrapped, VM, row.uuid, row.version)
    assert row.origin == "made"
    assert key != recovery_code.decode(code)
    assert volumes.opens(shelf.image, key)


def test_no_recovery_key_vouches_for_a_header_that_the_hosts_hand_was_in(shelf: Shelf) -> None:
    """One copy is the owner's still, so the volume opens by it; the newer one, which would be worked on, is not."""

    def other_sectors(document: Any) -> None:  # noqa: ANN401 - JSON
        segment = document["segments"]["0"]
        segment["sector_size"] = 512 if segment["sector_size"] == 4096 else 4096

    Host(shelf.image).forge(other_sectors, copies=(0,), newer=1)
    before = shelf.image.read_bytes()
    done = shelf.desk("--json", *shelf.words("--output-fd", "2"))
    assert done.error == "luks.mac"
    assert shelf.image.read_bytes() == before
