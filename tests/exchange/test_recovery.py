"""A recovery code brings a volume's key back: entered at a verifier, released to an attested VM, typed at no console."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.desks import UUID, Desk, Done, Terminal
from tests.worlds import SVSM, VM, Enrolled, Owner, make_verifier

from kagimori_agent.unlock import unlock
from kagimori_protocol import recovery_code
from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import vms

KEY = bytes(range(7, 39))
CODE = recovery_code.encode(KEY)


def typed(desk: Desk, code: str, *words: str) -> Done:
    """Import a code by a descriptor."""
    reader, writer = os.pipe()
    os.write(writer, code.encode() + b"\n")
    os.close(writer)
    try:
        return desk(
            "--json", "recovery", "import", "--vm", "web1", "--uuid", UUID, "--code-fd", str(reader), *words
        )
    finally:
        os.close(reader)


def kept(desk: Desk) -> list[bytes]:
    """Unwrap what the verifier keeps of the VM."""
    unlock_keys = UnlockKeys(FileKek(desk.directory / "kek").read())
    store = desk.store()
    with store.read() as txn:
        rows = vms.volumes(txn, "web1")
    store.close()
    return [unlock_keys.unwrap(row.wrapped, row.vm_id, row.uuid, row.version) for row in rows]


def test_a_code_becomes_the_unlock_key_of_its_volume(furnished: Desk) -> None:
    """Wrapped, in the ledger, and told apart from keys that were made here."""
    done = typed(furnished, CODE.upper())
    assert done.code == 0, done.err
    assert (done.json["origin"], done.json["state"]) == ("recovery", "active")
    assert kept(furnished) == [KEY]
    (line,) = furnished.good("ledger", "list", "--limit", "1")
    assert (line["event"], line["body"]["uuid"]) == ("recovery-imported", UUID)
    bare = CODE.replace("-", "")
    for secret in (CODE, bare, KEY.hex()):
        assert secret not in done.out + done.err
    for content in furnished.contents().values():
        assert KEY not in content
        assert bare.encode() not in content
    assert UUID in furnished.good("vm", "config", "web1")["agent_toml"]


def test_a_typo_is_named_by_its_place_and_nothing_is_kept(furnished: Desk) -> None:
    """And the error quotes nothing of the code."""
    wrong = CODE[:12] + ("q" if CODE[12] != "q" else "p") + CODE[13:]
    done = typed(furnished, wrong)
    assert done.error == "recovery.checksum"
    assert done.json["error"]["found"] == "a typo in character 3 of group 3, if there is only one"
    for group in CODE.split("-")[1:]:
        assert group not in done.out + done.err
    assert kept(furnished) == []


def test_a_code_is_typed_at_a_terminal_unseen_or_read_from_stdin(
    furnished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never taken from an argument."""
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return CODE

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("getpass.getpass", ask)
    furnished.good("recovery", "import", "--vm", "web1", "--uuid", UUID.upper())
    assert asked == ["Recovery code (not shown): "]
    furnished.good("volume", "remove", "--vm", "web1", UUID)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    saved, (reader, writer) = os.dup(0), os.pipe()
    try:
        os.write(writer, CODE.encode())
        os.close(writer)
        os.dup2(reader, 0)
        furnished.good("recovery", "import", "--vm", "web1", "--uuid", UUID)
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(reader)
    assert kept(furnished) == [KEY]


def test_a_key_that_is_here_already_is_not_replaced(furnished: Desk) -> None:
    """It may be the better one; its owner removes it first."""
    assert typed(furnished, CODE).code == 0
    other = recovery_code.encode(bytes(32))
    assert typed(furnished, other).error == "volume.exists"
    assert kept(furnished) == [KEY]


def test_a_name_in_the_vm_is_taken_once(furnished: Desk) -> None:
    """As with any volume."""
    assert typed(furnished, CODE).code == 0
    words = ("--json", "recovery", "import", "--vm", "web1", "--uuid", UUID.replace("0", "1"))
    reader, writer = os.pipe()
    os.write(writer, CODE.encode())
    os.close(writer)
    assert furnished(*words, "--code-fd", str(reader)).error == "volume.name"
    os.close(reader)


@pytest.mark.slow
def test_a_new_verifier_unlocks_a_vm_by_a_recovery_code(
    enrolled: Enrolled, amd: AmdRoot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verifier burned down, and there is no backup: another one, a new agent.toml, and the paper."""
    shutil.rmtree(enrolled.owner.directory)
    make_verifier(tmp_path / "second", amd)
    desk = Desk(tmp_path / "second", capsys)
    with Owner.opened(desk.directory, amd) as owner, owner.served():
        owner.enrol_profile("grub", "grub", "svsm-vtpm", SVSM)
        owner.enrol_vm(VM, "grub")
        owner.accept_boot(VM, "grub", measured_boot.grub(), "grub")
        reader, writer = os.pipe()
        os.write(writer, recovery_code.encode(enrolled.unlock_key).encode() + b"\n")
        os.close(writer)
        words = ("recovery", "import", "--vm", VM, "--uuid", enrolled.volume.uuid, "--code-fd", str(reader))
        desk.good(*words)
        os.close(reader)
        with replace(enrolled, owner=owner).booted() as (_, config):
            session = unlock(config, lambda _: None, prove=True)
        assert session.confirmed
        assert owner.events()[-2:] == ["released", "confirmed-opened"]
