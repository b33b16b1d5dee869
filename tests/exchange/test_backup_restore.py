"""The verifier burned down: what a backup brings back, and what it must not."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, Attacker
from tests.desks import Desk, run
from tests.worlds import CHIP_ID, DIRECT, VM, Enrolled, Owner, enrol_direct_vm

from kagimori_agent.unlock import unlock
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier import enrolling, ledger, settings
from kagimori_verifier.store import Store, enrolments, identities, vms

PASSPHRASE = b"a passphrase of some length"


@contextmanager
def handed(secret: bytes) -> Iterator[str]:
    """Hand a secret over by a descriptor."""
    reader, writer = os.pipe()
    os.write(writer, secret + b"\n")
    os.close(writer)
    try:
        yield str(reader)
    finally:
        os.close(reader)


@pytest.fixture
def desk(office: Owner, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Give the owner's command line on the verifier of ``office``."""
    return Desk(office.directory, capsys)


def restored(desk: Desk, file: Path, name: str = "restored") -> Desk:
    """Restore a backup into a new directory, with the KEK's own copy."""
    directory = desk.directory.with_name(name)
    words = ("restore", file, "--dir", directory, "--kek", desk.directory / "kek")
    done = run(desk.capsys, "--json", *words)
    assert done.code == 0, done.err
    return Desk(directory, desk.capsys)


def refused(desk: Desk, file: Path, *key: str | Path) -> str:
    """Try to restore; gives the error's code, having seen that nothing was left."""
    directory = desk.directory.with_name("refused")
    done = run(
        desk.capsys,
        "--json",
        "restore",
        file,
        "--dir",
        directory,
        *(key or ("--kek", desk.directory / "kek")),
    )
    assert not directory.exists()
    assert not directory.with_name(".refused.restoring").exists()
    return done.error


@pytest.mark.slow
def test_a_restored_verifier_unlocks_the_vm_that_the_first_one_knew(
    enrolled: Enrolled, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real agent, whose agent.toml pins the keys that were in the backup; made while the first one serves."""
    desk = Desk(enrolled.owner.directory, capsys)
    with enrolled.booted() as (_, config):
        assert unlock(config, lambda _: None, prove=True).confirmed
    desk.good("backup", enrolled.directory / "backup")
    second = restored(desk, enrolled.directory / "backup")
    shutil.rmtree(desk.directory)  # the verifier burned down
    with Owner.opened(second.directory, enrolled.owner.root) as owner, owner.served():
        with replace(enrolled, owner=owner).booted() as (_, config):
            session = unlock(config, lambda _: None, prove=True)
            assert session.confirmed
        events = owner.events()
    assert events[-3:] == ["restored", "released", "confirmed-opened"]
    assert events.count("released") == 2


def test_a_backup_holds_nothing_in_the_clear_and_restores_everything_that_it_says(
    desk: Desk, office: Owner, tmp_path: Path
) -> None:
    """Settings, endorsements, keys, ledger; the KEK only by its own way."""
    enrol_direct_vm(office, UUID, UNLOCK_KEY)
    made = desk.good("backup", tmp_path / "backup")
    raw = (tmp_path / "backup").read_bytes()
    kek = (desk.directory / "kek").read_bytes()
    for secret in (kek, UNLOCK_KEY, b"verifier.toml", b"SQLite format"):
        assert secret not in raw
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
    second = restored(desk, tmp_path / "backup")
    assert (second.directory / "kek").read_bytes() == kek
    assert (second.directory / "kek").stat().st_mode & 0o777 == 0o600
    kept = desk.directory / "endorsements"
    for path in kept.rglob("*.der"):
        assert (second.directory / "endorsements" / path.relative_to(kept)).read_bytes() == path.read_bytes()
    assert (second.directory / "verifier.toml").read_bytes() == desk.config.read_bytes()
    lines = second.good("ledger", "list")
    assert [line["event"] for line in lines[:2]] == ["restored", "backup"]
    assert lines[0]["body"]["backup_head"] == made["head"]
    assert lines[0]["body"]["backup_lines"] == made["lines"]
    assert {path.name for path in tmp_path.iterdir()} == {"owner", "restored", "backup"}


def test_a_backup_with_the_kek_needs_its_passphrase_and_nothing_else(desk: Desk, tmp_path: Path) -> None:
    """For an owner who keeps one thing, and remembers another."""
    file = tmp_path / "backup"
    with handed(PASSPHRASE) as descriptor:
        assert desk.good("backup", file, "--with-kek", "--passphrase-fd", descriptor)["with_kek"]
    with handed(b"another passphrase") as descriptor:
        assert refused(desk, file, "--passphrase-fd", descriptor) == "backup.passphrase"
    directory = tmp_path / "there"
    with handed(PASSPHRASE) as descriptor:
        done = run(desk.capsys, "--json", "restore", file, "--dir", directory, "--passphrase-fd", descriptor)
    assert done.code == 0, done.err
    assert (directory / "kek").read_bytes() == (desk.directory / "kek").read_bytes()
    assert Desk(directory, desk.capsys).good("ledger", "list")[1]["body"] == {"with_kek": True}


def test_a_passphrase_comes_with_the_kek_or_not_at_all(desk: Desk, tmp_path: Path) -> None:
    """And a short one is refused before anything is written."""
    with handed(PASSPHRASE) as descriptor:
        assert desk("--json", "backup", tmp_path / "b", "--passphrase-fd", descriptor).error == "usage"
    assert desk("--json", "backup", tmp_path / "b", "--with-kek").error == "usage"
    with handed(b"short") as descriptor:
        words = ("backup", tmp_path / "b", "--with-kek", "--passphrase-fd", descriptor)
        assert desk("--json", *words).error == "backup.passphrase"
    assert not (tmp_path / "b").exists()
    desk.good("backup", tmp_path / "b")
    with handed(PASSPHRASE) as descriptor:
        assert refused(desk, tmp_path / "b", "--passphrase-fd", descriptor) == "backup.kek"


def test_what_is_no_whole_backup_of_this_kek_restores_nothing(desk: Desk, tmp_path: Path) -> None:
    """A flipped byte, a cut file, another KEK, a KEK that others could read."""
    file = tmp_path / "backup"
    desk.good("backup", file)
    raw = bytearray(file.read_bytes())
    for name, changed in {
        "flipped": bytes(raw[: len(raw) // 2])
        + bytes([raw[len(raw) // 2] ^ 1])
        + bytes(raw[len(raw) // 2 + 1 :]),
        "cut": bytes(raw[:-20]),
        "longer": bytes(raw) + b"\0",
    }.items():
        (tmp_path / name).write_bytes(changed)
        assert refused(desk, tmp_path / name) == "backup.broken"
    other = tmp_path / "kek"
    other.write_bytes(b"l" * 32)
    other.chmod(0o600)
    assert refused(desk, file, "--kek", other) == "kek.other"
    other.chmod(0o644)
    assert refused(desk, file, "--kek", other) == "kek.mode"
    assert refused(desk, tmp_path / "absent") == "file.read"


def test_nothing_that_is_there_is_touched(desk: Desk, tmp_path: Path) -> None:
    """Neither a backup of that name, nor a directory with anything in it."""
    desk.good("backup", tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    assert desk("--json", "backup", tmp_path / "backup").error == "backup.exists"
    assert (tmp_path / "backup").read_bytes() == before
    files = desk.contents()
    words = ("restore", tmp_path / "backup", "--kek", desk.directory / "kek", "--dir")
    assert run(desk.capsys, "--json", *words, desk.directory).error == "restore.exists"
    assert run(desk.capsys, "--json", *words, tmp_path / "backup").error == "restore.exists"
    assert desk.contents() == files
    (tmp_path / "empty").mkdir()
    assert run(desk.capsys, "--json", *words, tmp_path / "empty").code == 0


def test_a_backup_is_consistent_while_others_write(desk: Desk, office: Owner, tmp_path: Path) -> None:
    """A line of the ledger is in it with what it tells of, and its chain holds."""
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with office.verifier.store.write() as txn:
                ledger.append(
                    txn, at_s=number, event="a line", vm_id=None, session=None, body={"number": number}
                )

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(3):
            desk.good("backup", tmp_path / f"backup-{number}")
    finally:
        ended.set()
        thread.join()
    for number in range(3):
        second = restored(desk, tmp_path / f"backup-{number}", f"restored-{number}")
        assert second.good("ledger", "verify")["lines"] >= 2


def test_a_ledger_that_is_broken_is_not_backed_up_as_if_it_were_whole(
    desk: Desk, office: Owner, tmp_path: Path
) -> None:
    """It could not be restored; its owner hears of it today."""
    desk.good("backup", tmp_path / "first")
    office.verifier.store.close()
    with contextlib.closing(_raw(desk)) as raw:
        raw.execute("DROP TRIGGER ledger_no_update")
        raw.execute("UPDATE ledger SET event = 'another' WHERE seq = 1")
    assert desk("--json", "backup", tmp_path / "second").error == "ledger.broken"
    assert not (tmp_path / "second").exists()


def _raw(desk: Desk):  # type: ignore[no-untyped-def]  # noqa: ANN202 - sqlite3.Connection, imported where it is used
    import sqlite3

    return sqlite3.connect(desk.directory / "verifier.db", isolation_level=None)


@pytest.mark.slow
def test_no_session_that_was_open_at_the_backup_is_redeemed_after_it(
    office: Owner, desk: Desk, tmp_path: Path
) -> None:
    """A challenge that was answered after the backup would be unused again, for other evidence."""
    enrol_direct_vm(office, UUID, UNLOCK_KEY)
    attacker = _direct(office)
    parts = attacker.evidence()
    desk.good("backup", tmp_path / "backup")
    assert attacker.keys(attacker.send(parts)) == {UUID: UNLOCK_KEY}
    second = restored(desk, tmp_path / "backup")
    second.good("vm", "enable", VM)  # as an owner who does not wait would
    with Owner.opened(second.directory, office.root) as owner:
        again = _direct(owner)
        again.key = attacker.key
        assert again.send(parts).denial == "stale-session"
        assert owner.refusals()[0].code == "session.token"


@pytest.mark.slow
def test_an_answer_that_was_given_before_the_backup_is_not_given_again_after_it(
    office: Owner, desk: Desk, tmp_path: Path
) -> None:
    """The same evidence had the same answer for as long as the session lived; that life ends here."""
    enrol_direct_vm(office, UUID, UNLOCK_KEY)
    attacker = _direct(office)
    parts = attacker.evidence()
    told = attacker.send(parts)
    desk.good("backup", tmp_path / "backup")
    second = restored(desk, tmp_path / "backup")
    with Owner.opened(second.directory, office.root) as owner:
        assert _direct(owner).send(parts).denial == "stale-session"
        confirm = attacker.confirm(told, attacker.open(told))
        assert _direct(owner).send_confirm(confirm) == "opened", (
            "what was released before is confirmed as ever"
        )


@pytest.mark.slow
def test_a_vm_without_a_tpm_waits_for_its_owner_after_a_restore(
    office: Owner, desk: Desk, tmp_path: Path
) -> None:
    """Which of its boots have had their one answer since the backup, nobody knows: it is disabled until it is off."""
    enrol_direct_vm(office, UUID, UNLOCK_KEY)
    desk.good("backup", tmp_path / "backup")
    running = _direct(office)
    assert running.keys(running.send(running.evidence())) == {UUID: UNLOCK_KEY}
    second = restored(desk, tmp_path / "backup")
    assert second.good("ledger", "list")[0]["body"]["disabled"] == [VM]
    with Owner.opened(second.directory, office.root) as owner:
        again = _direct(owner)
        again.machine = running.machine  # root of the guest that has its keys, in the same boot
        assert again.refused_challenge(again.hello()) == "unknown-vm"


def test_codes_of_enrolments_are_void_after_a_restore(office: Owner, desk: Desk, tmp_path: Path) -> None:
    """One that was used since the backup would be good again."""
    enrol_direct_vm(office, UUID, UNLOCK_KEY)
    with office.verifier.store.write() as txn:
        row = vms.get(txn, VM)
        assert row is not None
        vms.update(txn, replace(row, purposes=["unlock", "enrol"]))
        enrolling.make_code(txn, VM, office.now_s())
    desk.good("backup", tmp_path / "backup")
    second = restored(desk, tmp_path / "backup")
    with _reading(second) as store, store.read() as txn:
        assert enrolments.code(txn, VM) is None
        assert [row.state for row in identities.all(txn, "token")] == ["retired", "current"]


@contextmanager
def _reading(desk: Desk) -> Iterator[Store]:
    store = desk.store()
    try:
        yield store
    finally:
        store.close()


def test_settings_that_lead_elsewhere_are_written_anew(desk: Desk, office: Owner, tmp_path: Path) -> None:
    """The new machine need not have the places of the old one; all else stays, and the old text is kept beside."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    office.verifier.store.close()
    for name in ("verifier.db", "endorsements", "kek"):
        shutil.move(desk.directory / name, elsewhere / name)
    text = desk.config.read_text(encoding="utf-8")
    for relative, absolute in (
        ("sqlite:///verifier.db", f"sqlite:///{elsewhere}/verifier.db"),
        ('endorsements = "endorsements"', f'endorsements = "{elsewhere}/endorsements"'),
        ('path = "kek"', f'path = "{elsewhere}/kek"'),
    ):
        assert relative in text
        text = text.replace(relative, absolute)
    desk.config.write_text(text + '\n[tls]\ncertificate = "tls.crt"\nkey = "tls.key"\n', encoding="utf-8")
    desk.good("backup", tmp_path / "backup")
    words = ("restore", tmp_path / "backup", "--kek", elsewhere / "kek", "--dir", tmp_path / "new")
    done = run(desk.capsys, "--json", *words)
    assert done.code == 0, done.err
    assert done.json["settings_rewritten"]
    new, old = (settings.load(one) for one in (tmp_path / "new" / "verifier.toml", desk.config))
    same = ("listen", "public_urls", "limits", "tls")
    assert [getattr(new, name) for name in same] == [getattr(old, name) for name in same]
    assert new.database_path == tmp_path / "new" / "verifier.db"
    assert (tmp_path / "new" / "kek").exists()
    assert (tmp_path / "new" / "verifier.toml.of-the-backup").read_text(
        encoding="utf-8"
    ) == desk.config.read_text(encoding="utf-8")
    assert Desk(tmp_path / "new", desk.capsys).good("identity", "show")["key_id"]


def test_a_kek_that_is_a_credential_is_not_written_anywhere(
    desk: Desk, office: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restored settings have it where the first ones had it."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    shutil.move(desk.directory / "kek", credentials / "kagimori-kek")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    text = desk.config.read_text(encoding="utf-8").replace('provider = "file"', 'provider = "credential"')
    desk.config.write_text(text, encoding="utf-8")
    desk.good("backup", tmp_path / "backup")
    words = ("restore", tmp_path / "backup", "--kek", credentials / "kagimori-kek", "--dir", tmp_path / "new")
    done = run(desk.capsys, "--json", *words)
    assert done.code == 0, done.err
    assert done.json["kek"] is None
    assert not (tmp_path / "new" / "kek").exists()


def _direct(owner: Owner) -> Attacker:
    machine = SnpMachine(owner.root, chip_id=CHIP_ID, svsm=False, measurement=DIRECT, report_version=3)
    return Attacker(owner, machine, None, None)
