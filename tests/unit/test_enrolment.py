"""A volume gets its keyslot whole or not at all, whatever fails in between. Real cryptsetup, on files."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from tests import volumes

from kagimori_protocol import luks2_change
from kagimori_protocol.errors import DiskError, KagimoriError, OperatorError
from kagimori_simulator import disk
from kagimori_verifier import enrolment, ledger, luks_enrol
from kagimori_verifier.appraise.policy import Policy, TcbFloor
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import Store, profiles, vms
from kagimori_verifier.store.vms import VolumeRow

PASSPHRASE = b"an installer's passphrase"
KEK = bytes(range(32))
FLOOR = TcbFloor(boot_loader=1, tee=1, snp=1, microcode=1)


@dataclass
class Desk:
    """An owner's machine: a database that knows one VM, and an image with a LUKS2 header."""

    store: Store
    image: Path

    @property
    def backup(self) -> Path:
        """Where the header goes as it was."""
        return self.image.with_name("header-before")

    def add(self, *, passphrase: bytes = PASSPHRASE, label: str = "cryptroot") -> VolumeRow:
        """Enrol the image."""
        return enrolment.add_volume(
            self.store,
            KEK,
            vm_id="web1",
            device=self.image,
            label=label,
            passphrase=passphrase,
            backup=self.backup,
            at_s=1,
        )

    def reseal(self, *, restored: bool = False, changed: bool = False, number: int = 0) -> VolumeRow:
        """Seal the header of the one volume as it is now."""
        (row,) = self.rows()
        return enrolment.reseal_volume(
            self.store,
            KEK,
            vm_id="web1",
            uuid=row.uuid,
            device=self.image,
            backup=self.image.with_name(f"header-before-{number}"),
            at_s=2,
            restored=restored,
            changed=changed,
        )

    def rows(self) -> tuple[VolumeRow, ...]:
        """Give all that is kept."""
        with self.store.read() as txn:
            return vms.volumes(txn, "web1", state=None)

    def events(self) -> list[str]:
        """Give the ledger's events."""
        with self.store.read() as txn:
            return [entry.event for entry in ledger.read(txn)]

    def key(self) -> bytes:
        """Unwrap the one key that is kept."""
        (row,) = self.rows()
        return UnlockKeys(KEK).unwrap(row.wrapped, "web1", row.uuid, row.version)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a database with one VM, to copy."""
    path = tmp_path_factory.mktemp("database") / "verifier.db"
    store = Store.create(f"sqlite:///{path}")
    policy = Policy(boot_way="grub", tcb_floors={"Milan": FLOOR})
    with store.write() as txn:
        profiles.add(txn, profiles.ProfileRow("debian", msgspec.json.encode(policy).decode(), 0))
        vms.add(txn, vms.VmRow("web1", "debian", enabled=True, purposes=["unlock"], chips=[], created=0))
    store.close()
    return path


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an image to copy."""
    path = tmp_path_factory.mktemp("luks") / "disk.img"
    disk.make_volume(path, PASSPHRASE)
    return path


@pytest.fixture
def desk(tmp_path: Path, formatted: Path, database: Path) -> Iterator[Desk]:
    """Give a desk where nothing is enrolled."""
    image = tmp_path / "disk.img"
    shutil.copyfile(formatted, image)
    shutil.copyfile(database, tmp_path / "verifier.db")
    store = Store.open(f"sqlite:///{tmp_path}/verifier.db")
    try:
        yield Desk(store, image)
    finally:
        store.close()


def _failing(_: object, *__: object) -> None:
    raise DiskError("The disk fails.", code="volume.test", expected="success", found="failure")


class _Killed(BaseException):
    """The process ends here."""


def _killed(*_: object, **__: object) -> None:
    raise _Killed


def test_a_volume_is_active_once_its_own_key_has_opened_it(desk: Desk) -> None:
    """The kept key, unwrapped, opens the volume beside the passphrase, and the ledger has a line."""
    row = desk.add()
    assert row.state == "active"
    assert volumes.opens(desk.image, desk.key())
    assert volumes.opens(desk.image, PASSPHRASE)
    assert desk.events() == ["volume-added"]


def test_the_new_keyslot_is_cheap_and_tried_first(desk: Desk) -> None:
    """Each boot would pay for the slow derivation of a passphrase otherwise."""
    desk.add()
    slot = volumes.dump(desk.image).partition("  1: luks2")[2].partition("  2: luks2")[0]
    assert "Priority:   preferred" in slot
    assert "PBKDF:      pbkdf2" in slot
    assert "Iterations: 1000" in slot


def test_a_wrong_passphrase_leaves_header_and_database_as_they_were(desk: Desk) -> None:
    """Nothing was added, so nothing is kept."""
    before = desk.image.read_bytes()
    with pytest.raises(DiskError) as caught:
        desk.add(passphrase=b"another")
    assert caught.value.code == "volume.keyslot"
    assert "no keyslot opens" in (caught.value.found or "")
    assert desk.rows() == ()
    assert desk.events() == []
    assert desk.image.read_bytes() == before


def test_the_header_is_sealed_and_the_old_one_is_kept(desk: Desk) -> None:
    """What is kept brings back the header as it was, by cryptsetup alone; nobody else may read it."""
    before = desk.image.read_bytes()
    row = desk.add()
    assert row.header_epoch == 1
    with luks_enrol.opened(desk.image) as opened:
        sealed = luks2_change.sealed_by(opened.load(), desk.key())
    assert sealed is not None
    assert (sealed.slot, sealed.epoch) == ("1", 1)
    assert desk.backup.stat().st_mode & 0o777 == 0o600
    command = ["cryptsetup", "luksHeaderRestore", "--batch-mode", str(desk.image)]
    subprocess.run([*command, "--header-backup-file", str(desk.backup)], check=True)
    assert volumes.keyslots(desk.image) == {0}
    assert desk.image.read_bytes()[: 16 << 20] == before[: 16 << 20]


def test_a_file_that_is_there_is_not_written_over_and_the_header_stays(desk: Desk) -> None:
    """It may be the only copy of an older header."""
    before = desk.image.read_bytes()
    desk.backup.write_bytes(b"another header")
    with pytest.raises(OperatorError) as caught:
        desk.add()
    assert caught.value.code == "volume.backup"
    assert desk.backup.read_bytes() == b"another header"
    assert desk.image.read_bytes() == before
    assert desk.rows() == ()


def test_a_keyslot_that_does_not_prove_never_reaches_the_disk(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made in memory, and is gone with it."""
    before = desk.image.read_bytes()
    monkeypatch.setattr(luks2_change, "prove", _failing)
    with pytest.raises(DiskError):
        desk.add()
    assert desk.image.read_bytes() == before
    assert desk.rows() == ()


def test_a_key_stays_where_writing_has_begun_and_failed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row stays ``adding``, and the same command completes it."""
    with monkeypatch.context() as patch:
        patch.setattr(luks_enrol, "_write", _failing)
        with pytest.raises(DiskError) as caught:
            desk.add()
    assert str(desk.backup) in (caught.value.todo or "")
    assert [row.state for row in desk.rows()] == ["adding"]
    desk.backup.unlink()
    assert desk.add().state == "active"
    assert volumes.keyslots(desk.image) == {0, 1}


def test_a_header_that_another_program_changes_meanwhile_is_left_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its change would be lost."""
    keep = luks_enrol.keep

    def meanwhile(change: luks2_change.Change, path: Path) -> None:
        keep(change, path)
        with desk.image.open("r+b") as file:
            file.seek(16384 + 16)
            file.write(b"\xff")

    monkeypatch.setattr(luks_enrol, "keep", meanwhile)
    with pytest.raises(DiskError) as caught:
        desk.add()
    assert caught.value.code == "volume.changed"
    assert desk.rows() == ()
    with luks_enrol.opened(desk.image), pytest.raises(DiskError) as caught:
        desk.add()
    assert caught.value.code == "volume.busy"


def _with_the_last_write_missing(desk: Desk, patch: pytest.MonkeyPatch) -> None:
    """Let a run end before the primary copy is written."""
    write = luks_enrol._write

    def cut(file: int, offset: int, data: bytes) -> None:
        if offset == 0:
            raise _Killed
        write(file, offset, data)

    patch.setattr(luks_enrol, "_write", cut)
    with pytest.raises(_Killed):
        desk.add()


@pytest.mark.parametrize(
    ("room", "name", "slots"),
    [
        (luks_enrol, "keep", {0}),
        (luks_enrol, "_write", {0}),
        (luks2_change, "prove", {0}),
        (ledger, "append", {0, 1}),
    ],
    ids=[
        "before the old header is kept",
        "before the first write",
        "before the proof",
        "in the last transaction",
    ],
)
def test_killed_at_any_point_the_same_command_completes_it_with_the_same_key(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, room: object, name: str, slots: set[int]
) -> None:
    """``adding`` shows, no key is lost, and repeating adds one keyslot in all."""
    with monkeypatch.context() as patch:
        patch.setattr(room, name, _killed)
        with pytest.raises(_Killed):
            desk.add()
    assert volumes.keyslots(desk.image) == slots
    assert [row.state for row in desk.rows()] == ["adding"]
    key = desk.key()
    desk.backup.unlink(missing_ok=True)
    assert desk.add().state == "active"
    assert desk.key() == key
    assert volumes.keyslots(desk.image) == {0, 1}
    assert volumes.opens(desk.image, key)
    assert desk.events() == ["volume-added"]


def test_killed_between_two_copies_of_the_header_the_same_command_completes_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer copy is whole, so the volume opens by it; both are whole after the next run."""
    with monkeypatch.context() as patch:
        _with_the_last_write_missing(desk, patch)
    key = desk.key()
    with luks_enrol.opened(desk.image) as opened:
        image = opened.load()
        assert image.whole == {16384}
        luks2_change.prove(image, luks_enrol.cryptsetup, key, 1)
    assert desk.add().state == "active"
    assert desk.key() == key


def test_a_volume_of_a_release_that_did_not_seal_is_sealed_on_request(desk: Desk) -> None:
    """Its keyslot stays, its header gets a token, and from then on an older header is refused."""
    row = desk.add()
    command = ["cryptsetup", "token", "remove", "--token-id", "0", str(desk.image)]
    subprocess.run(command, check=True)
    with desk.store.write() as txn:
        vms.set_header_epoch(txn, "web1", row.uuid, row.version, 0)
    assert desk.reseal().header_epoch == 1
    assert [one.header_epoch for one in desk.rows()] == [1]
    assert volumes.keyslots(desk.image) == {0, 1}
    assert desk.events() == ["volume-resealed", "volume-added"]


def test_an_old_header_is_sealed_only_by_who_says_that_he_restored_it(desk: Desk) -> None:
    """Otherwise a host shows it and has it made new, with the keyslots that the owner has removed since."""
    desk.add()
    old = desk.image.read_bytes()[: 16 << 20]
    assert desk.reseal(number=1).header_epoch == 2
    assert desk.reseal(number=2).header_epoch == 3
    with desk.image.open("r+b") as file:
        file.write(old)
    with pytest.raises(DiskError) as caught:
        desk.reseal(number=3)
    assert caught.value.code == "volume.epoch"
    assert [one.header_epoch for one in desk.rows()] == [3]
    assert desk.reseal(restored=True, number=4).header_epoch == 4


def test_what_cannot_be_sealed_is_named(desk: Desk, formatted: Path) -> None:
    """Another volume, one whose keyslot is gone, one that is not enrolled."""
    desk.add()
    subprocess.run(["cryptsetup", "luksKillSlot", "-q", str(desk.image), "1"], check=True)
    with pytest.raises(DiskError) as caught:
        desk.reseal(changed=True)
    assert caught.value.code == "volume.prove"
    disk.make_volume(desk.image, PASSPHRASE)
    with pytest.raises(DiskError) as caught:
        desk.reseal()
    assert caught.value.code == "volume.other"
    with pytest.raises(OperatorError) as missing:
        enrolment.reseal_volume(
            desk.store, KEK, vm_id="web1", uuid="no", device=desk.image, backup=desk.backup, at_s=0
        )
    assert missing.value.code == "volume.unknown"


def test_a_volume_removed_meanwhile_is_not_called_active(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operators at once: the one who adds is told which keyslot has lost its key."""

    def removed(*_: object) -> None:
        with desk.store.write() as txn:
            for row in vms.volumes(txn, "web1", state=None):
                vms.remove_volume(txn, "web1", row.uuid, row.version)

    monkeypatch.setattr(luks2_change, "prove", removed)
    with pytest.raises(OperatorError) as caught:
        desk.add()
    assert caught.value.code == "volume.removed"
    assert desk.events() == []


def test_an_enrolled_volume_is_not_enrolled_again(desk: Desk) -> None:
    """Its key would be replaced silently."""
    desk.add()
    with pytest.raises(OperatorError) as caught:
        desk.add()
    assert caught.value.code == "volume.exists"
    assert volumes.keyslots(desk.image) == {0, 1}


@pytest.mark.parametrize("taken", ["cryptroot", "control"])
def test_two_volumes_of_a_vm_have_two_names(desk: Desk, formatted: Path, taken: str) -> None:
    """agent.toml could not hold them otherwise, and device-mapper keeps one name to itself."""
    desk.add()
    other = desk.image.with_name("other.img")
    disk.make_volume(other, PASSPHRASE)
    with pytest.raises(OperatorError) as caught:
        Desk(desk.store, other).add(label=taken)
    assert caught.value.code == "volume.name"
    assert volumes.keyslots(other) == {0}


@pytest.mark.parametrize("kind", ["no file", "an empty file", "noise", "a directory", "LUKS1"])
def test_what_is_no_luks2_volume_is_named(desk: Desk, kind: str) -> None:
    """Before anything is kept or asked."""
    path = desk.image.with_name("thing")
    make: dict[str, Callable[[], object]] = {
        "no file": lambda: None,
        "an empty file": path.touch,
        "noise": lambda: path.write_bytes(secrets.token_bytes(1 << 20)),
        "a directory": path.mkdir,
        "LUKS1": lambda: path.write_bytes(b"LUKS\xba\xbe\x00\x01" + bytes(1 << 20)),
    }
    make[kind]()
    with pytest.raises(DiskError) as caught:
        Desk(desk.store, path).add()
    assert caught.value.code == ("volume.device" if kind in {"no file", "a directory"} else "volume.luks2")
    assert desk.rows() == ()


def test_a_device_named_like_an_option_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a path is taken for an option of cryptsetup."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiskError) as caught, luks_enrol.opened(Path("--help")):
        pass
    assert caught.value.code == "volume.device"


def test_cryptsetup_is_not_looked_for_in_path(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever enrols is often root, and PATH may be anybody's."""
    fake = tmp_path / "cryptsetup"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert desk.add().state == "active"


def test_a_missing_cryptsetup_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator can install it."""
    monkeypatch.setattr(luks_enrol, "SEARCH", "/nonexistent")
    with pytest.raises(OperatorError) as caught:
        desk.add()
    assert caught.value.code == "volume.cryptsetup"


def test_a_cryptsetup_that_hangs_is_ended_and_nothing_is_lost(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dying disk must not hold an operator for ever."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cryptsetup").write_text(
        '#!/bin/sh\n[ "$1" = luksAddKey ] && exec sleep 60\nPATH=/usr/sbin:/sbin:/usr/bin:/bin exec cryptsetup "$@"\n'
    )
    (tools / "cryptsetup").chmod(0o755)
    monkeypatch.setattr(luks_enrol, "SEARCH", f"{tools}:{luks_enrol.SEARCH}")
    monkeypatch.setattr(luks_enrol, "CRYPTSETUP_S", 1)
    with pytest.raises(DiskError) as caught:
        desk.add()
    assert caught.value.code == "volume.timeout"
    assert desk.rows() == ()
    assert volumes.keyslots(desk.image) == {0}


def test_secrets_reach_cryptsetup_by_pipe_only(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither passphrase nor key is in any argument or in the environment of what is started."""
    tools, seen = tmp_path / "tools", tmp_path / "seen"
    tools.mkdir()
    (tools / "cryptsetup").write_text(
        f"#!/bin/sh\ntr '\\0' ' ' </proc/$$/cmdline >>{seen}\ntr '\\0' ' ' </proc/$$/environ >>{seen}\n"
        'PATH=/usr/sbin:/sbin:/usr/bin:/bin exec cryptsetup "$@"\n'
    )
    (tools / "cryptsetup").chmod(0o755)
    monkeypatch.setattr(luks_enrol, "SEARCH", f"{tools}:{luks_enrol.SEARCH}")
    desk.add()
    told = seen.read_bytes()
    assert b"luksAddKey" in told
    for secret in (PASSPHRASE, desk.key(), desk.key().hex().encode()):
        assert secret not in told
    assert b"HOME=" not in told


def test_no_error_of_enrolment_carries_a_secret(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are printed and logged."""
    monkeypatch.setattr(luks2_change, "prove", _failing)
    errors: list[KagimoriError] = []
    for passphrase in (b"another passphrase", PASSPHRASE):
        with pytest.raises(KagimoriError) as caught:
            desk.add(passphrase=passphrase)
        errors.append(caught.value)
    text = " ".join(repr(error) + str(error.as_dict()) for error in errors)
    for secret in ("another passphrase", PASSPHRASE.decode()):
        assert secret not in text
