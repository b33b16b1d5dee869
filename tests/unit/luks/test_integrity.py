"""A volume that its owner formatted with integrity: what its header may say, and what a host makes of it in vain (THREATS T1, T21)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests import volumes
from tests.conformance.making.header import Json
from tests.unit.luks import with_integrity
from tests.unit.luks.attacker import Host
from tests.unit.luks.headers import SIZE, config, edited, header, judged, segment
from tests.unit.luks.with_integrity import AREA, INTEGRITY, document

from kagimori_agent.reencrypt import reencrypt
from kagimori_protocol import luks2_change
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_allowed import has_integrity, volume_key_size
from kagimori_verifier import luks_enrol

if TYPE_CHECKING:
    from tests.unit.luks.conftest import Vault

PASSPHRASE = b"the passphrase of an installer"
NEW_KEY = bytes(range(32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give an honest volume's bytes, opened by a passphrase."""
    image = tmp_path_factory.mktemp("integrity") / "made"
    with_integrity.make(image, PASSPHRASE, "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11")
    return image.read_bytes()


@pytest.fixture
def plain(made: bytes, tmp_path: Path) -> Path:
    """Give one that nobody has enrolled."""
    image = tmp_path / "plain"
    image.write_bytes(made)
    return image


@pytest.fixture
def disk(plain: Path, vault: Vault) -> Path:
    """Give one whose owner has given it a keyslot of the vault's key, and nothing else of the header to change."""
    with luks_enrol.opened(plain) as opened:
        change = luks2_change.add_key(
            opened.load(),
            luks_enrol.cryptsetup,
            passphrase=PASSPHRASE,
            key=vault.key,
            epoch=1,
            salts=luks_enrol.salts(),
        )
        opened.write(change)
    return plain


def checked(one: Json) -> object:
    """Read a header with this JSON, and ask whether it may be used."""
    return judged(header(json.dumps(one).encode())[:SIZE]).json


def test_integrity_by_hmac_sha256_is_allowed_with_a_volume_key_of_both_keys() -> None:
    """What `cryptsetup luksFormat --integrity hmac-sha256` writes, with either size of sectors."""
    for size in (512, 4096):
        honest = document(segment(sector_size=size))
        assert checked(honest) == honest
    read = judged(header(json.dumps(document()).encode())[:SIZE])
    assert has_integrity(read)
    assert volume_key_size(read) == 64 + 32
    without = judged(header(json.dumps(edited(lambda _: None)).encode())[:SIZE])
    assert not has_integrity(without)
    assert volume_key_size(without) == 64


def _integrity(**changes: object) -> Callable[[Json], object]:
    return segment(integrity=INTEGRITY | changes)


def _keyslot(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"].update(changes)


def _area(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"]["area"].update(changes)


def _without_member(name: str) -> Callable[[Json], object]:
    return lambda one: one["segments"]["0"]["integrity"].pop(name)


def _stripped(one: Json) -> None:
    del one["segments"]["0"]["integrity"]


NAME = "luks.segment-integrity"

FORGERIES: dict[str, tuple[str, Callable[[Json], object]]] = {
    "integrity taken away, and the key's size left": ("luks.value", _stripped),
    "integrity of nothing": (NAME, _integrity(type="none")),
    "another MAC": (NAME, _integrity(type="hmac(sha512)")),
    "a MAC of a broken hash": (NAME, _integrity(type="hmac(sha1)")),
    "a checksum in place of a MAC": (NAME, _integrity(type="crc32c")),
    "a MAC that is a list": (NAME, _integrity(type=["hmac(sha256)"])),
    "an AEAD's tag": (NAME, _integrity(type="aead")),
    "an AEAD's tag by the other construction": (NAME, _integrity(type="poly1305")),
    "an AEAD, all of it": (
        NAME,
        lambda one: one["segments"]["0"].update(
            encryption="aes-gcm-random", integrity=INTEGRITY | {"type": "aead"}
        ),
    ),
    "an AEAD's cipher below an HMAC": ("luks.cipher", segment(encryption="aes-gcm-random")),
    "a null cipher below an HMAC": ("luks.cipher", segment(encryption="cipher_null-ecb")),
    "random tweaks, which take of the tag": ("luks.cipher", segment(encryption="aes-xts-random")),
    "a journal that is encrypted": (NAME, _integrity(journal_encryption="ctr(aes)")),
    "a journal with a MAC": (NAME, _integrity(journal_integrity="hmac(sha256)")),
    "a journal of which nothing is said": (NAME, _without_member("journal_integrity")),
    "a MAC of no type": (NAME, _without_member("type")),
    "a size of the MAC's key, as cryptsetup 2.8 may write": (NAME, _integrity(key_size=32)),
    "a MAC's key of no size": (NAME, _integrity(key_size=0)),
    "an unknown member": (NAME, _integrity(recalculate=True)),
    "integrity that is a text": (NAME, segment(integrity="hmac(sha256)")),
    "integrity that is null": (NAME, segment(integrity=None)),
    "tags in the sectors of the disk itself": (
        "luks.requirements",
        config(requirements={"mandatory": ["inline-hw-tags"]}),
    ),
    "a volume key without the MAC's": ("luks.value", _keyslot(key_size=64)),
    "a volume key of a larger MAC": ("luks.value", _keyslot(key_size=128)),
    "a keyslot key of the volume key's size": ("luks.value", _area(key_size=96)),
    "an area that holds the cipher's key and not the MAC's": ("luks.area", _area(size="258048")),
    "sectors that cryptsetup would take, and nobody has": ("luks.value", segment(sector_size=2048)),
}


@pytest.mark.parametrize(("code", "edit"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_header_with_integrity_is_refused_for(code: str, edit: Callable[[Json], object]) -> None:
    """Whatever is not exactly the one integrity that is known: unknown means no."""
    with pytest.raises(DiskError) as caught:
        checked(document(edit))
    assert caught.value.code == code
    assert caught.value.expected
    assert caught.value.todo


def test_a_volume_key_for_integrity_without_it_is_refused() -> None:
    """As without integrity, 64 bytes and no more: nobody knows what the rest would be for."""
    with pytest.raises(DiskError) as caught:
        checked(edited(_keyslot(key_size=96)))
    assert caught.value.code == "luks.value"


def test_it_is_enrolled_and_opens_as_an_agent_would(disk: Path, vault: Vault) -> None:
    """The new keyslot holds 96 bytes under the same cipher as any other, and the passphrase's is as it was."""
    assert volumes.keyslots(disk) == {0, 1}
    assert volumes.opens(disk, PASSPHRASE)
    assert volumes.opens(disk, vault.key)
    assert vault.prove(disk) == "proved"
    new = Host(disk).document()["keyslots"]["1"]
    assert (new["key_size"], new["area"]["key_size"], new["area"]["size"]) == (96, 64, str(AREA[1]))
    assert "integrity: hmac(sha256)" in volumes.dump(disk)


def test_its_unlock_key_is_changed_and_taken_away_like_any_other(disk: Path, vault: Vault) -> None:
    """The engine asks nothing about what the segment says; this holds it to that."""
    with luks_enrol.opened(disk) as opened:
        image = opened.load()
        slot = luks2_change.slot_of(image, luks_enrol.cryptsetup, vault.key)
        added = luks2_change.add_key(
            image,
            luks_enrol.cryptsetup,
            passphrase=vault.key,
            key=NEW_KEY,
            epoch=2,
            salts=luks_enrol.salts(),
        )
        opened.write(added)
    assert slot == "1"
    with luks_enrol.opened(disk) as opened:
        opened.write(luks2_change.remove_key(opened.load(), slot, luks_enrol.salts()))
    assert vault.prove(disk, NEW_KEY, epoch=2) == "proved"
    vault.refused(lambda: vault.prove(disk), "luks.mac")
    assert volumes.opens(disk, PASSPHRASE)


def _downgraded(one: Json) -> None:
    """Take integrity away so that all that is left is allowed."""
    _stripped(one)
    for keyslot in one["keyslots"].values():
        keyslot["key_size"] = 64


ATTACKS: dict[str, tuple[str, Callable[[Json], object]]] = {
    "taking integrity away": ("luks.value", _stripped),
    "taking integrity away with all that tells of it": ("luks.mac", _downgraded),
    "other sectors": ("luks.mac", segment(sector_size=4096)),
    "data moved by a sector": ("luks.mac", segment(offset=str((16 << 20) + 4096))),
    "the MAC's hash": (NAME, segment(integrity=INTEGRITY | {"type": "hmac(sha1)"})),
    "no MAC": (NAME, segment(integrity=INTEGRITY | {"type": "none"})),
}


@pytest.mark.parametrize(("code", "edit"), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_host_that_writes_both_copies_opens_nothing_by(
    code: str, edit: Callable[[Json], object], disk: Path, vault: Vault
) -> None:
    """Without its tags the data would be as malleable as XTS alone; the unlock key's MAC says that it has them."""
    assert vault.prove(disk) == "proved"
    Host(disk).forge(edit)
    vault.refused(lambda: vault.prove(disk), code)


def test_a_host_that_claims_integrity_for_a_volume_without_opens_nothing(
    formatted: Path, tmp_path: Path, vault: Vault
) -> None:
    """Then the kernel would look for a superblock and a journal of the host's below the data."""
    image = tmp_path / "claims"
    image.write_bytes(formatted.read_bytes())
    host = Host(image)
    host.forge(lambda one: one["segments"]["0"].update(integrity=dict(INTEGRITY)))
    vault.refused(lambda: vault.prove(image), "luks.value")
    host.forge(with_integrity.with_integrity)
    vault.refused(lambda: vault.prove(image), "luks.mac")


def test_crypttabs_discard_is_passed_over_and_told(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """Cryptsetup refuses to map such a volume with discards, and the boot would end for an option that was never of use."""
    dm = root / "sys/class/block/dm-0/dm"
    said = disk.parent / "arguments"
    instead(
        f'echo "$@" > {said}; mkdir -p {dm}; echo cryptroot > {dm}/name; echo {vault.mapping_uuid} > {dm}/uuid; cat >/dev/null'
    )
    flags = ["--allow-discards", "--perf-no_read_workqueue"]
    assert vault.open(disk, root, flags=flags) == "mapped"
    assert said.read_text().split()[-3:] == ["--perf-no_read_workqueue", str(disk), "cryptroot"]
    assert "--allow-discards" not in said.read_text()
    (told,) = vault.said
    assert "crypttab's discard is passed over" in told


@pytest.mark.parametrize("code", [1, 4])
def test_a_disk_whose_integrity_cannot_be_set_up_is_told_as_such(
    code: int, root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """Cryptsetup says nothing where the superblock is gone; "wrong parameters" would send the operator to the wrong place."""
    instead(f"cat >/dev/null; exit {code}")
    error = vault.refused(lambda: vault.open(disk, root), "luks.integrity")
    assert "dm-integrity" in str(error.todo)
    assert f"exit code {code}" in str(error.found)


def test_the_mapping_below_is_not_taken_for_the_volumes(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """It shows ciphertext: cryptsetup was killed between the two, or its second half has failed."""
    for uuid in (
        "CRYPT-INTEGRITY-cryptroot_dif",
        f"CRYPT-INTEGRITY-{vault.uuid.replace('-', '')}-cryptroot_dif",
    ):
        dm = root / "sys/class/block/dm-0/dm"
        instead(f"mkdir -p {dm}; echo cryptroot_dif > {dm}/name; echo {uuid} > {dm}/uuid; cat >/dev/null")
        vault.refused(lambda: vault.open(disk, root), "luks.not-mapped")


def test_both_mappings_are_the_volume_opened(
    root: Path, disk: Path, instead: Callable[[str], Path], vault: Vault
) -> None:
    """The lower comes first, and its name and UUID are its own."""
    block = root / "sys/class/block"
    lower = f"CRYPT-INTEGRITY-{vault.uuid.replace('-', '')}-cryptroot_dif"
    instead(
        f"mkdir -p {block}/dm-0/dm {block}/dm-1/dm; echo cryptroot_dif > {block}/dm-0/dm/name;"
        f" echo {lower} > {block}/dm-0/dm/uuid; echo cryptroot > {block}/dm-1/dm/name;"
        f" echo {vault.mapping_uuid} > {block}/dm-1/dm/uuid; cat >/dev/null"
    )
    assert vault.open(disk, root) == "mapped"


def test_a_reencryption_is_refused_by_name_before_anything_is_done(plain: Path) -> None:
    """Cryptsetup cannot do it; the header stays as it was, and no passphrase was tried."""
    before = plain.read_bytes()
    with pytest.raises(DiskError) as caught:
        reencrypt(plain, b"not even right", lambda _: None)
    assert caught.value.code == "enrol.reencrypt"
    assert "integrity" in str(caught.value)
    assert "without --reencrypt" in str(caught.value.todo)
    assert plain.read_bytes() == before
