"""Finding the one device of a volume, and the one mapping that it becomes: the host names and orders both as it likes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagimori_agent import luks
from kagimori_agent.luks import find_device, has_device_mapper
from kagimori_protocol.errors import ImageError

if TYPE_CHECKING:
    from tests.unit.luks.conftest import Vault

MAPPING_UUID = "CRYPT-LUKS2-6f1c1a588a524b7e9c8c0d6f3c7f2a11-cryptroot"


def test_a_volume_is_found_by_its_headers_uuid_alone(
    root: Path, disk: Path, tmp_path: Path, vault: Vault
) -> None:
    """Empty drives, other file systems and devices without a node are passed over."""
    other = tmp_path / "other"
    other.write_bytes(b"\0" * 8192)
    vault.attach(root, "sr0", None)
    vault.attach(root, "sda", other)
    node = vault.attach(root, "cciss!c0d0p1", disk)
    assert find_device(vault.volume(None), root) == node
    assert vault.find_and_prove(vault.volume(None), root) == "proved"


def test_two_devices_with_one_uuid_are_refused_and_named(
    root: Path, disk: Path, tmp_path: Path, vault: Vault
) -> None:
    """A planted copy wins by whichever order the kernel finds disks in; nobody chooses between them."""
    planted = tmp_path / "planted"
    shutil.copyfile(disk, planted)
    nodes = [vault.attach(root, "vda", disk), vault.attach(root, "vdb", planted)]
    error = vault.refused(lambda: find_device(vault.volume(None), root), "luks.ambiguous")
    assert all(str(node) in str(error.found) for node in nodes)
    with planted.open("r+b") as file:  # a damaged header is a candidate too
        file.seek(4096)
        file.write(b"x" * 100)
    vault.refused(lambda: find_device(vault.volume(None), root), "luks.ambiguous")


def test_no_device_with_the_uuid_is_told_together_with_what_was_looked_at(
    root: Path, disk: Path, vault: Vault
) -> None:
    """A missing driver and a wrong UUID look different in this list."""
    error = vault.refused(lambda: find_device(vault.volume(None), root), "luks.no-device")
    assert "no block device" in str(error.found)
    node = vault.attach(root, "vda", disk)
    error = vault.refused(lambda: find_device(vault.volume(None, vault.other_uuid), root), "luks.no-device")
    assert str(node) in str(error.found)


@pytest.mark.parametrize("named", [True, False])
def test_a_disk_that_appears_late_is_waited_for(root: Path, disk: Path, named: bool, vault: Vault) -> None:
    """The network may be up before the driver has found the disk."""
    node = root / "dev/vda"

    def attach() -> None:
        time.sleep(0.4)
        vault.attach(root, "vda", disk)

    thread = threading.Thread(target=attach)
    thread.start()
    volume = vault.volume(node if named else None)
    assert vault.find_and_prove(volume, root) == "proved"
    thread.join()


@pytest.mark.parametrize("named", [True, False])
def test_a_disk_that_never_appears_is_an_error_in_time(root: Path, named: bool, vault: Vault) -> None:
    """The wait is part of the limit for opening, not besides it."""
    volume = vault.volume(root / "dev/vda" if named else None)
    start = time.monotonic()
    vault.refused(
        lambda: vault.find_and_prove(volume, root, timeout_s=0.5),
        "luks.read" if named else "luks.no-device",
    )
    assert 0.2 < time.monotonic() - start < 3


def test_a_wrong_or_doubtful_disk_is_not_waited_out(root: Path, disk: Path, vault: Vault) -> None:
    """Time does not make one of two copies the right one."""
    for name in ("vda", "vdb"):
        vault.attach(root, name, disk)
    start = time.monotonic()
    vault.refused(lambda: vault.find_and_prove(vault.volume(None), root), "luks.ambiguous")
    other = vault.volume(disk, vault.other_uuid)
    vault.refused(lambda: vault.find_and_prove(other, root), "luks.other-volume")
    assert time.monotonic() - start < 5


def test_a_named_device_must_carry_the_uuid_too(disk: Path, tmp_path: Path, vault: Vault) -> None:
    """The host decides what /dev/vda3 is."""
    vault.refused(lambda: find_device(vault.volume(disk, vault.other_uuid)), "luks.other-volume")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    vault.refused(lambda: find_device(vault.volume(empty)), "luks.other-volume")
    vault.refused(lambda: find_device(vault.volume(tmp_path / "absent")), "luks.read")
    assert find_device(vault.volume(disk)) == disk


def test_a_header_that_changes_between_two_looks_is_refused(
    disk: Path, monkeypatch: pytest.MonkeyPatch, instead: Callable[[str], Path], vault: Vault
) -> None:
    """The host answers each read as it likes: what was searched by is asked again of what is judged."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    monkeypatch.setattr(luks, "claimed", lambda _device: vault.other_uuid)
    volume = vault.volume(disk, vault.other_uuid)
    vault.refused(lambda: vault.find_and_prove(volume, luks.ROOT), "luks.other-volume")
    assert not witness.exists()


def test_a_volume_whose_primary_header_is_gone_is_found_by_the_secondary(
    root: Path, disk: Path, vault: Vault
) -> None:
    """A partition table or a boot sector was written over it; the other copy is whole, and opens."""
    with disk.open("r+b") as file:
        file.write(bytes(4096))
    node = vault.attach(root, "vda", disk)
    assert find_device(vault.volume(None), root) == node
    assert vault.find_and_prove(vault.volume(None), root) == "proved"
    assert "the primary copy of the header is not used (luks.magic" in vault.said[0]


def test_without_sysfs_there_is_a_named_error(tmp_path: Path, vault: Vault) -> None:
    """An initramfs mounts /sys; if it does not, that is what has to change."""
    with pytest.raises(ImageError) as caught:
        find_device(vault.volume(None), tmp_path)
    assert caught.value.code == "luks.no-sysfs"


def test_without_device_mapper_nothing_is_opened_and_proving_is_not_chosen_instead(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """A boot that believes its disk open when it is not would go wrong later and less clearly."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    (root / "proc/misc").write_text("235 autofs\n236 device-mapper-not\n")
    assert not has_device_mapper(root)
    with pytest.raises(ImageError) as caught:
        vault.open(disk, root)
    assert caught.value.code == "luks.no-dm"
    assert "dm-crypt" in str(caught.value.todo)
    assert not witness.exists()
    (root / "proc/misc").unlink()
    assert not has_device_mapper(root)


def test_device_mapper_is_known_by_proc_misc(root: Path) -> None:
    """The kernel lists it there as soon as it can map."""
    assert has_device_mapper(root)


def test_a_volume_is_mapped_under_its_name(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """What cryptsetup is told to do, with a made-up kernel that does it."""
    dm = root / "sys/class/block/dm-0/dm"
    said = disk.parent / "arguments"
    instead(
        f'echo "$@" > {said}; mkdir -p {dm}; echo cryptroot > {dm}/name; echo {vault.mapping_uuid} > {dm}/uuid; cat >/dev/null'
    )
    assert vault.open(disk, root) == "mapped"
    arguments = said.read_text().split()
    assert arguments[-2:] == [str(disk), "cryptroot"]
    assert "--test-passphrase" not in arguments


def test_what_crypttab_wants_of_a_mapping_reaches_cryptsetup_and_a_proof_not(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """They say how to map, so they mean nothing where nothing is mapped."""
    dm = root / "sys/class/block/dm-0/dm"
    said = disk.parent / "arguments"
    instead(
        f'echo "$@" >> {said}; mkdir -p {dm}; echo cryptroot > {dm}/name; echo {vault.mapping_uuid} > {dm}/uuid; cat >/dev/null'
    )
    assert vault.open(disk, root, flags=["--allow-discards"]) == "mapped"
    shutil.rmtree(dm)
    assert vault.prove(disk) == "proved"
    mapped, proved = said.read_text().splitlines()
    assert mapped.endswith(f" --allow-discards {disk} cryptroot")
    assert "--allow-discards" not in proved


def test_a_mapping_that_cryptsetup_only_claims_is_not_believed(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """What is told as opened goes into the verifier's ledger; the kernel must agree."""
    instead("cat > /dev/null")
    vault.refused(lambda: vault.open(disk, root), "luks.not-mapped")


def test_a_volume_that_something_else_has_opened_is_not_taken_for_ours(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """A host plants a disk with a copied UUID and types its own passphrase at a prompt: our key opened nothing."""
    witness = disk.parent / "started"
    instead(f"touch {witness}")
    vault.map(root, "cryptroot", vault.mapping_uuid)
    vault.map(root, "swap", "LVM-x", dm="dm-1")
    vault.refused(lambda: vault.open(disk, root), "luks.mapping")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "uuid"),
    [
        ("cryptroot", MAPPING_UUID.replace("6f1c1a58", "00000000")),
        ("cryptroot", MAPPING_UUID.replace("LUKS2", "LUKS1")),
        ("cryptroot", MAPPING_UUID.replace("LUKS2", "PLAIN")),
        ("cryptroot", ""),
        ("luks-root", MAPPING_UUID.replace("cryptroot", "luks-root")),
    ],
)
def test_a_mapping_that_is_not_exactly_ours_refuses_the_volume(
    root: Path, disk: Path, name: str, uuid: str, vault: Vault
) -> None:
    """Whoever took the name first, or opened the volume with another key, decides nothing here."""
    vault.map(root, name, uuid)
    vault.refused(lambda: vault.open(disk, root), "luks.mapping")
