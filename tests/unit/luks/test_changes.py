"""kill -9 at every write of a header: whatever has reached the disk, the old key or the new one opens it, by our guard too."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import volumes
from tests.conformance.making.header import Json
from tests.unit.luks.attacker import Host

from kagimori_protocol import luks2_change, luks2_guard
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_change import Change, Image
from kagimori_verifier import luks_enrol

OLD = hashlib.sha256(b"an unlock key of these tests").digest()
NEW = hashlib.sha256(b"the next unlock key").digest()
THIRD = hashlib.sha256(b"a recovery key").digest()
SECTOR = 512
Make = Callable[[Image], Change]


def _salts() -> luks2_change.Salts:
    return bytes(64), bytes(range(64))


def _add(image: Image) -> Change:
    return luks2_change.add_key(
        image, luks_enrol.cryptsetup, passphrase=OLD, key=NEW, epoch=2, salts=_salts()
    )


def _add_two(image: Image) -> Change:
    first = _add(image)
    second = luks2_change.add_key(
        first.after, luks_enrol.cryptsetup, passphrase=NEW, key=THIRD, epoch=2, salts=_salts()
    )
    return luks2_change.joined(first, second, luks_enrol.cryptsetup, NEW, 2)


def _reseal(image: Image) -> Change:
    return luks2_change.reseal(image, luks_enrol.cryptsetup, key=OLD, epoch=2, salts=_salts())


def loaded(device: Path) -> Image:
    """Read a device's header."""
    with luks_enrol.opened(device) as disk:
        return disk.load()


def cuts(change: Change) -> Iterator[tuple[str, int, tuple[tuple[int, bytes], ...]]]:
    """Give what can have reached the disk: every number of whole writes, and the next one torn between two sectors."""
    for number, (offset, data) in enumerate(change.writes):
        before = change.writes[:number]
        yield f"{number} writes", offset, before
        for sectors in {1, 8, len(data) // SECTOR // 2, len(data) // SECTOR - 1}:
            kept = sectors * SECTOR
            yield f"{number} writes and {sectors} sectors", offset, (*before, (offset, data[:kept]))
            yield (
                f"{number} writes and all but {sectors} sectors",
                offset,
                (*before, (offset + kept, data[kept:])),
            )
    yield "all writes", 0, change.writes


def opening(device: Path, uuid: str) -> set[bytes]:
    """Give the keys that our guard lets to this device, each proved as an agent would use it."""
    image = loaded(device)
    found = set()
    for key in (OLD, NEW, THIRD):
        try:
            luks2_change.prove(image, luks_enrol.cryptsetup, key, 1)
        except DiskError:
            continue
        assert luks2_guard.choose(image.read, image.device_size, uuid, key, 1).header.uuid == uuid
        found.add(key)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "added"),
    [(_add, {NEW}), (_add_two, {NEW, THIRD}), (_reseal, set())],
    ids=["a key added", "two keys added", "resealed"],
)
def test_a_volume_opens_whenever_the_change_of_its_header_is_cut_off(
    disk: Path, make: Make, added: set[bytes]
) -> None:
    """The old key opens at every moment, the new one from one moment on; cryptsetup by itself opens it, too."""
    whole = disk.read_bytes()
    change = make(loaded(disk))
    uuid = change.before.header.uuid
    new_opens: list[bool] = []
    found: set[bytes] = set()
    for name, _, written in cuts(change):
        disk.write_bytes(whole)
        with disk.open("r+b") as file:
            for offset, data in written:
                file.seek(offset)
                file.write(data)
        found = opening(disk, uuid)
        assert OLD in found, name
        assert found & added in (set(), added), name
        if "sectors" not in name:
            new_opens.append(NEW in found)
        assert volumes.opens(disk, OLD), name
        # And the next try completes it.
        luks2_change.prove(make(loaded(disk)).after, luks_enrol.cryptsetup, OLD, 1)
    assert found == {OLD} | added
    assert new_opens == sorted(new_opens)


@pytest.mark.slow
def test_a_keyslot_that_is_removed_opens_until_the_header_is_without_it_and_never_after(disk: Path) -> None:
    """Its area is overwritten last: what is in it is gone, and no older header brings it back."""
    with luks_enrol.opened(disk) as opened:
        opened.write(_add(opened.load()))
    whole = disk.read_bytes()
    image = loaded(disk)
    assert luks2_change.slot_of(image, luks_enrol.cryptsetup, OLD) == "0"
    change = luks2_change.remove_key(image, "0", _salts())
    assert [offset for offset, _ in change.writes] == [16384, 0, 32768]
    for name, _, written in cuts(change):
        disk.write_bytes(whole)
        with disk.open("r+b") as file:
            for offset, data in written:
                file.seek(offset)
                file.write(data)
        assert NEW in opening(disk, image.header.uuid), name
    assert opening(disk, image.header.uuid) == {NEW}
    assert not volumes.opens(disk, OLD)
    with disk.open("r+b") as file:  # the host brings the old header back, but not what it points at
        file.write(whole[:32768])
    assert not volumes.opens(disk, OLD)
    with pytest.raises(DiskError) as caught:
        luks2_change.remove_key(change.after, "1", _salts())
    assert caught.value.code == "volume.keyslot"


@pytest.mark.parametrize(("broken", "first"), [(0, 0), (16384, 16384), (None, 16384)])
def test_the_copy_that_nobody_can_rely_on_is_written_first(
    disk: Path, broken: int | None, first: int
) -> None:
    """Otherwise a second crash would take the one that is whole."""
    if broken is not None:
        with disk.open("r+b") as file:
            file.seek(broken + 4096)
            file.write(b"x" * 100)
    change = _reseal(loaded(disk))
    assert [offset for offset, _ in change.writes] == [first, 16384 - first]


def test_only_free_places_are_written(disk: Path) -> None:
    """Keyslots in use are what an owner's passphrase is worth."""
    before = disk.read_bytes()
    change = _add(loaded(disk))
    assert [offset for offset, _ in change.writes] == [290816, 16384, 0]
    with luks_enrol.opened(disk) as opened:
        opened.write(change)
    after = disk.read_bytes()
    assert before[32768:290816] == after[32768:290816]
    assert before[548864:] == after[548864:]
    spoilt = bytearray(change.after.raw)
    spoilt[40000] ^= 1
    with pytest.raises(DiskError) as caught:
        list(luks2_change._areas(change.before, bytes(spoilt)))
    assert caught.value.code == "luks.area"


def test_a_second_key_leaves_the_token_of_the_first_as_it_is(disk: Path) -> None:
    """A key is rotated without the other VM, or the other verifier, that has a keyslot of its own."""
    change = _add(loaded(disk))
    tokens = luks2_guard.tied(change.after.header)
    assert tokens["0"] == luks2_guard.tied(change.before.header)["0"]
    assert (tokens["0"]["epoch"], tokens["1"]["epoch"]) == ("1", "2")


def test_two_keys_that_are_added_at_once_have_tokens_of_their_own(disk: Path) -> None:
    """The second comes in by the first, and either can go without the other."""
    change = _add_two(loaded(disk))
    assert [token["epoch"] for token in luks2_guard.tied(change.after.header).values()] == ["1", "2", "2"]
    with luks_enrol.opened(disk) as opened:
        opened.write(change)
    uuid = change.before.header.uuid
    assert opening(disk, uuid) == {OLD, NEW, THIRD}
    with luks_enrol.opened(disk) as opened:
        opened.write(luks2_change.remove_key(opened.load(), "1", _salts()))
    assert opening(disk, uuid) == {OLD, THIRD}


def test_what_an_owner_does_with_cryptsetup_to_other_keyslots_needs_no_seal(disk: Path) -> None:
    """A passphrase for recovery is added or removed, a keyslot preferred, the volume labelled: the VM still boots."""
    for words in (
        (
            "luksAddKey",
            "--pbkdf",
            "pbkdf2",
            "--pbkdf-force-iterations",
            "1000",
            "--key-file",
            "-",
            str(disk),
            "/proc/version",
        ),
        ("config", "--label", "root disk", str(disk)),
        ("luksKillSlot", str(disk), "1"),
        ("config", "--key-slot", "0", "--priority", "ignore", str(disk)),
    ):
        secret = b"" if words[0] == "luksKillSlot" else OLD
        done = subprocess.run(["cryptsetup", "-q", *words], input=secret, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        image = loaded(disk)
        luks2_change.prove(image, luks_enrol.cryptsetup, OLD, 1)


def test_a_wrong_passphrase_adds_nothing(disk: Path) -> None:
    """Cryptsetup's answer is passed on."""
    with pytest.raises(DiskError) as caught:
        luks2_change.add_key(
            loaded(disk), luks_enrol.cryptsetup, passphrase=b"x", key=NEW, epoch=1, salts=_salts()
        )
    assert caught.value.code == "volume.keyslot"
    assert luks2_change.slot_of(loaded(disk), luks_enrol.cryptsetup, NEW) is None
    with pytest.raises(DiskError) as caught:
        luks2_change.reseal(loaded(disk), luks_enrol.cryptsetup, key=NEW, epoch=1, salts=_salts())
    assert caught.value.code == "volume.prove"


def a_digest_too_short(document: Json) -> None:
    """Say what is no digest."""
    document["digests"]["0"]["digest"] = ""


def a_flag_that_stays(document: Json) -> None:
    """Say what is not allowed, and what cryptsetup takes."""
    document["config"]["flags"] = ["allow-discards"]


def test_cryptsetup_is_asked_about_the_copy_that_was_judged_and_not_about_the_hosts_newer_one(
    disk: Path,
) -> None:
    """It chooses by its own parser, which takes copies that are refused here."""
    Host(disk).forge(a_digest_too_short, copies=(0,), newer=1)
    image = loaded(disk)
    assert image.header.which == "secondary"
    assert not luks2_change.has_volume_key(image, luks_enrol.cryptsetup, bytes(64))


@pytest.mark.parametrize("edit", [a_digest_too_short, a_flag_that_stays])
def test_a_key_is_added_to_the_copy_that_was_judged_and_not_to_the_hosts_newer_one(
    disk: Path, edit: Callable[[Json], None]
) -> None:
    """The forged copy is written over, as after any crash that has left one copy whole."""
    Host(disk).forge(edit, copies=(0,), newer=1)
    change = _add(loaded(disk))
    assert change.after.header.json["config"] == change.before.header.json["config"]
    with luks_enrol.opened(disk) as opened:
        opened.write(change)
    assert opening(disk, change.after.header.uuid) == {OLD, NEW}
    assert Host(disk).copy(0).json == Host(disk).copy(16384).json
