"""A volume gets its keyslot whole or not at all, whatever fails in between. Real cryptsetup, on files."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

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

    def add(self, *, passphrase: bytes = PASSPHRASE, label: str = "cryptroot") -> VolumeRow:
        """Enrol the image."""
        return enrolment.add_volume(
            self.store,
            KEK,
            vm_id="web1",
            device=self.image,
            label=label,
            passphrase=passphrase,
            at_s=1,
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
    assert luks_enrol.opens(desk.image, desk.key())
    assert luks_enrol.opens(desk.image, PASSPHRASE)
    assert desk.events() == ["volume-added"]


def test_the_new_keyslot_is_cheap_and_tried_first(desk: Desk) -> None:
    """Each boot would pay for the slow derivation of a passphrase otherwise."""
    desk.add()
    header = luks_enrol._output(desk.image, "luksDump", "--", str(desk.image)).decode()
    slot = header.partition("  1: luks2")[2].partition("  2: luks2")[0]
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


def test_a_keyslot_that_does_not_prove_is_taken_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keyslot goes first, then the row: no keyslot stays whose key is forgotten."""
    monkeypatch.setattr(enrolment, "_prove", _failing)
    with pytest.raises(DiskError):
        desk.add()
    assert luks_enrol.keyslots(desk.image) == {0}
    assert luks_enrol.opens(desk.image, PASSPHRASE)
    assert desk.rows() == ()


def test_a_key_stays_where_its_keyslot_cannot_be_taken_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row stays ``adding``, and the same command completes it."""
    with monkeypatch.context() as patch:
        patch.setattr(enrolment, "_prove", _failing)
        patch.setattr(luks_enrol, "remove_keyslots", _failing)
        with pytest.raises(DiskError) as caught:
            desk.add()
    assert "adding" in (caught.value.todo or "")
    assert [row.state for row in desk.rows()] == ["adding"]
    assert desk.add().state == "active"
    assert luks_enrol.keyslots(desk.image) == {0, 1}


@pytest.mark.parametrize(
    ("room", "name", "slots"),
    [
        (luks_enrol, "add_keyslot", {0}),
        (enrolment, "_prove", {0, 1}),
        (ledger, "append", {0, 1}),
    ],
    ids=["before the keyslot", "after the keyslot", "in the last transaction"],
)
def test_killed_at_any_point_the_same_command_completes_it_with_the_same_key(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, room: object, name: str, slots: set[int]
) -> None:
    """``adding`` shows, no key is lost, and repeating adds one keyslot in all."""
    with monkeypatch.context() as patch:
        patch.setattr(room, name, _killed)
        with pytest.raises(_Killed):
            desk.add()
    assert luks_enrol.keyslots(desk.image) == slots
    assert [row.state for row in desk.rows()] == ["adding"]
    key = desk.key()
    assert desk.add().state == "active"
    assert desk.key() == key
    assert luks_enrol.keyslots(desk.image) == {0, 1}
    assert luks_enrol.opens(desk.image, key)
    assert desk.events() == ["volume-added"]


def test_a_volume_removed_meanwhile_is_not_called_active(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operators at once: the one who adds is told which keyslot has lost its key."""

    def removed(*_: object) -> None:
        with desk.store.write() as txn:
            for row in vms.volumes(txn, "web1", state=None):
                vms.remove_volume(txn, "web1", row.uuid, row.version)

    monkeypatch.setattr(enrolment, "_prove", removed)
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
    assert luks_enrol.keyslots(desk.image) == {0, 1}


@pytest.mark.parametrize("taken", ["cryptroot", "control"])
def test_two_volumes_of_a_vm_have_two_names(desk: Desk, formatted: Path, taken: str) -> None:
    """agent.toml could not hold them otherwise, and device-mapper keeps one name to itself."""
    desk.add()
    other = desk.image.with_name("other.img")
    disk.make_volume(other, PASSPHRASE)
    with pytest.raises(OperatorError) as caught:
        Desk(desk.store, other).add(label=taken)
    assert caught.value.code == "volume.name"
    assert luks_enrol.keyslots(other) == {0}


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
    assert caught.value.code == "volume.luks2"
    assert desk.rows() == ()


def test_a_device_named_like_an_option_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a path is taken for an option of cryptsetup."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiskError) as caught:
        luks_enrol.luks2_uuid(Path("--help"))
    assert caught.value.code == "volume.luks2"


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
    assert luks_enrol.keyslots(desk.image) == {0}


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
    monkeypatch.setattr(enrolment, "_prove", _failing)
    errors: list[KagimoriError] = []
    for passphrase in (b"another passphrase", PASSPHRASE):
        with pytest.raises(KagimoriError) as caught:
            desk.add(passphrase=passphrase)
        errors.append(caught.value)
    text = " ".join(repr(error) + str(error.as_dict()) for error in errors)
    for secret in ("another passphrase", PASSPHRASE.decode()):
        assert secret not in text
