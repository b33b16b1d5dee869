"""What a host does to the header of a volume whose key it does not have, each by its name, on a real volume.

Every attack is tried with the right key, through the agent's own door; what cryptsetup alone would make of it is told where
that is the point.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests import volumes
from tests.conformance.making.header import Json
from tests.unit.luks.attacker import Host
from tests.unit.luks.headers import SALT, SIZE

from kagimori_agent import luks_header
from kagimori_protocol import luks2_guard

if TYPE_CHECKING:
    from tests.unit.luks.conftest import Vault

NULL = "cipher_null-ecb"
AREA = 258048


def _segment(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["segments"]["0"].update(changes)


def _keyslot(part: str, **changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"][part].update(changes)


def _token(number: str, **changes: object) -> Callable[[Json], object]:
    return lambda one: one["tokens"].setdefault(number, dict(one["tokens"]["0"])).update(changes)


def _second_keyslot(offset: int) -> Callable[[Json], object]:
    def edit(one: Json) -> None:
        keyslot = json.loads(json.dumps(one["keyslots"]["0"]))
        keyslot["area"]["offset"] = str(offset)
        one["keyslots"]["1"] = keyslot
        one["digests"]["0"]["keyslots"] = ["0", "1"]

    return edit


ATTACKS: dict[str, tuple[str, Callable[[Json], object]]] = {
    "null cipher in the keyslot": ("luks.cipher", _keyslot("area", encryption=NULL)),
    "null cipher in the segment": ("luks.cipher", _segment(encryption=NULL)),
    "second segment": ("luks.segments", lambda one: one["segments"].update({"1": one["segments"]["0"]})),
    "linear segment": (
        "luks.segments",
        lambda one: one["segments"].update({"1": {"type": "linear", "offset": "0", "size": "dynamic"}}),
    ),
    "linear segment alone": ("luks.value", _segment(type="linear")),
    "KDF of less work": ("luks.mac", _keyslot("kdf", iterations=1)),
    "KDF of another hash": ("luks.mac", _keyslot("kdf", hash="sha512")),
    "KDF of a broken hash": ("luks.value", _keyslot("kdf", hash="md5")),
    "another salt": ("luks.mac", _keyslot("kdf", salt=SALT)),
    "fewer AF stripes": ("luks.value", _keyslot("af", stripes=1)),
    "another AF hash": ("luks.mac", _keyslot("af", hash="sha512")),
    "re-encryption under way": (
        "luks.requirements",
        lambda one: one["config"].update(requirements={"mandatory": ["online-reencrypt-v2"]}),
    ),
    "a flag that lets discards through": (
        "luks.flags",
        lambda one: one["config"].update(flags=["allow-discards"]),
    ),
    "an unknown requirement": (
        "luks.requirements",
        lambda one: one["config"].update(requirements={"mandatory": ["later"]}),
    ),
    "an unknown member of config": ("luks.members", lambda one: one["config"].update(later="x")),
    "foreign digest": ("luks.mac", lambda one: one["digests"]["0"].update(digest=SALT)),
    "digest of no bytes": ("luks.value", lambda one: one["digests"]["0"].update(digest="")),
    "second digest": ("luks.digests", lambda one: one["digests"].update({"1": one["digests"]["0"]})),
    "data moved by a sector": ("luks.mac", _segment(offset=str((16 << 20) + 4096))),
    "data before the keyslots' end": ("luks.area", _segment(offset=str(8 << 20))),
    "data beyond the device": ("luks.area", _segment(offset=str(1 << 40))),
    "other sectors": ("luks.mac", _segment(sector_size=512)),
    "keyslot over the header": ("luks.area", _second_keyslot(SIZE)),
    "keyslot over another": ("luks.area", _second_keyslot(2 * SIZE + 4096)),
    "keyslot in the data": ("luks.area", _second_keyslot(16 << 20)),
    "our keyslot's area moved": ("luks.mac", _keyslot("area", offset=str(1 << 20))),
    "the area for keyslots cut": (
        "luks.mac",
        lambda one: one["config"].update(keyslots_size=str((16 << 20) - 2 * SIZE - 4096)),
    ),
    "no token": ("luks.unguarded", lambda one: one["tokens"].clear()),
    "token with a MAC of nothing": ("luks.mac", _token("0", mac="0" * 64)),
    "token of a later epoch": ("luks.mac", _token("0", epoch="2")),
    "token with an unknown member": ("luks.members", _token("0", later="x")),
    "token for no keyslot": ("luks.unguarded", _token("0", keyslots=[])),
    "two tokens": ("luks.tokens", _token("1")),
    "a keyring's token beside ours": (
        "luks.tokens",
        lambda one: one["tokens"].update(
            {"1": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "planted"}}
        ),
    ),
    "a TPM's token beside ours": (
        "luks.tokens",
        lambda one: one["tokens"].update({"1": {"type": "systemd-tpm2", "keyslots": ["0"]}}),
    ),
}


@pytest.mark.parametrize(("code", "edit"), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_host_that_writes_both_copies_gets_no_key_used_by(
    code: str, edit: Callable[[Json], object], disk: Path, vault: Vault
) -> None:
    """Checksums are right, and cryptsetup would take most of them."""
    assert vault.prove(disk) == "proved"
    Host(disk).forge(edit)
    vault.refused(lambda: vault.prove(disk), code)


@pytest.mark.parametrize("copies", [(0,), (SIZE,)], ids=["primary", "secondary"])
@pytest.mark.parametrize("attack", ["null cipher in the segment", "foreign digest", "no token"])
def test_copies_that_disagree_newer_forged_and_older_good_open_by_the_good_one(
    attack: str, copies: tuple[int, ...], disk: Path, vault: Vault
) -> None:
    """A crash between two writes leaves the same; so the other copy does no harm, and the console tells of it."""
    Host(disk).forge(ATTACKS[attack][1], copies=copies, newer=1)
    assert vault.prove(disk) == "proved"
    (said,) = vault.said
    assert ATTACKS[attack][0] in said
    assert ("primary" if copies == (0,) else "secondary") in said


def test_copies_that_disagree_both_forged_are_refused_with_both_reasons(disk: Path, vault: Vault) -> None:
    """The one that came nearest to being used is named first."""
    host = Host(disk)
    host.forge(ATTACKS["foreign digest"][1], copies=(SIZE,), newer=1)
    host.forge(ATTACKS["null cipher in the segment"][1], copies=(0,), newer=2)
    error = vault.refused(lambda: vault.prove(disk), "luks.mac")
    assert "luks.cipher" in str(error.found)


def test_an_old_header_with_its_old_mac_is_refused(disk: Path, vault: Vault) -> None:
    """What the owner has sealed anew since (another volume key, another place) must not come back."""
    host = Host(disk)
    old = host.kept()
    vault.seal(disk, epoch=2)
    assert vault.prove(disk, epoch=2) == "proved"
    present = host.kept()
    host.write(0, old)
    assert vault.prove(disk, epoch=1) == "proved"
    vault.refused(lambda: vault.prove(disk, epoch=2), "luks.epoch")
    # One copy of each: the present one is used, though the old one counts itself newer.
    host.write(0, present)
    host.put(old[4096:SIZE].split(b"\0")[0], copies=(0,), newer=99)
    assert vault.prove(disk, epoch=2) == "proved"
    assert "luks.epoch" in vault.said[0]


def test_a_header_may_be_newer_than_what_is_expected(disk: Path, vault: Vault) -> None:
    """Whoever seals writes the header first and tells the verifier then."""
    vault.seal(disk, epoch=9)
    assert vault.prove(disk, epoch=2) == "proved"


def test_a_token_of_another_volume_authenticates_nothing(
    formatted: Path, disk: Path, tmp_path: Path, vault: Vault
) -> None:
    """Even of one that the same key opens: the UUID is authenticated."""
    other = tmp_path / "other"
    shutil.copyfile(formatted, other)
    subprocess.run(["cryptsetup", "luksUUID", "-q", "--uuid", vault.other_uuid, str(other)], check=True)
    vault.seal(other)
    token = Host(other).document()["tokens"]["0"]
    Host(disk).forge(lambda one: one["tokens"].update({"0": token}))
    vault.refused(lambda: vault.prove(disk), "luks.mac")


def test_a_whole_volume_of_the_hosts_with_a_copied_uuid_is_refused(disk: Path, vault: Vault) -> None:
    """Its own key in its own keyslot, its own root file system: it lacks the unlock key (THREATS T2, T18)."""
    options = ["--uuid", vault.uuid, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    planted = subprocess.run(
        ["cryptsetup", "luksFormat", "-q", *options, "--key-file", "-", str(disk)], input=b"x", check=False
    )
    assert planted.returncode == 0
    vault.refused(lambda: vault.prove(disk), "luks.unguarded")
    own = bytes(range(32))  # of the host's, and its header sealed by it
    command = ["cryptsetup", "luksFormat", "-q", *options, "--key-file", "-", str(disk)]
    subprocess.run(command, input=own, check=True)
    vault.seal(disk, key=own)
    assert vault.prove(disk, own) == "proved"
    vault.refused(lambda: vault.prove(disk), "luks.mac")


def test_luks1_with_the_same_uuid_is_refused(disk: Path, vault: Vault) -> None:
    """In the place of the primary; and then the secondary speaks, or nobody."""
    host = Host(disk)
    host.write(6, b"\0\1")
    assert vault.prove(disk) == "proved"
    assert "luks.version" in vault.said[0]
    host.write(SIZE + 6, b"\0\1")
    vault.refused(lambda: vault.prove(disk), "luks.other-volume")


def test_oversized_json_is_refused(disk: Path, vault: Vault) -> None:
    """It fills its area, and there is no zero after it."""
    host = Host(disk)
    text = json.dumps(host.document()).encode()
    host.put(text.ljust(SIZE - 4096))
    vault.refused(lambda: vault.prove(disk), "luks.json")


def test_a_header_swapped_between_check_and_open_is_never_seen(
    disk: Path, monkeypatch: pytest.MonkeyPatch, vault: Vault
) -> None:
    """The host writes a null cipher, or nothing at all, right after the look: cryptsetup gets what was looked at."""
    host, choose = Host(disk), luks2_guard.choose

    def swapped(*words: Any) -> luks2_guard.Guarded:  # noqa: ANN401 - choose's own
        guarded = choose(*words)
        host.write(0, bytes(2 * SIZE))
        return guarded

    monkeypatch.setattr(luks2_guard, "choose", swapped)
    assert vault.prove(disk) == "proved"
    assert disk.read_bytes()[: 2 * SIZE] == bytes(2 * SIZE)
    assert not volumes.opens(disk, vault.key)


@pytest.mark.skipif(shutil.which("strace") is None, reason="looks at system calls")
def test_cryptsetup_opens_the_header_in_memory_and_parses_nothing_of_the_device(
    disk: Path, tmp_path: Path, vault: Vault
) -> None:
    """It tries whether the device can be read at all, once, and writes nothing to it."""
    log = tmp_path / "calls"
    with luks_header.guarded(disk, vault.uuid, vault.key, 1) as (_, memory):
        words = ["open", "--test-passphrase", "--type", "luks2", "--disable-external-tokens"]
        words += ["--header", f"/proc/self/fd/{memory}", "--key-file", "-", str(disk)]
        strace = [
            "strace",
            "-f",
            "-y",
            "-o",
            str(log),
            "-e",
            "trace=read,pread64,write,pwrite64,openat,ioctl",
        ]
        done = subprocess.run(
            [*strace, "cryptsetup", *words], input=vault.key, check=False, pass_fds=(memory,)
        )
    assert done.returncode == 0
    calls = [line for line in log.read_text(errors="replace").splitlines() if f"<{disk}>" in line]
    reads = [line for line in calls if "read(" in line and not line.endswith(", 0) = 0")]
    assert len(reads) <= 1
    assert all(line.endswith("4096) = 4096") for line in reads)
    assert not [line for line in calls if "write" in line or "O_RDWR" in line or "O_WRONLY" in line]


def test_the_header_in_memory_has_one_keyslot_no_token_and_cannot_be_changed(
    disk: Path, vault: Vault
) -> None:
    """What is not needed for opening is not there: no other keyslot, no label, no path that the host gave."""
    host = Host(disk)
    host.forge(_second_keyslot(2 * SIZE + AREA))
    with luks_header.guarded(disk, vault.uuid, vault.key, 1) as (found, memory):
        text = os.pread(memory, SIZE - 4096, 4096).split(b"\0")[0]
        assert json.loads(text) == luks2_guard.reduced(found.header, "0")
        document = json.loads(text)
        assert (list(document["keyslots"]), document["tokens"]) == (["0"], {})
        with pytest.raises(PermissionError):
            os.pwrite(memory, b"x", 0)
        assert os.pread(memory, AREA, 2 * SIZE) == disk.read_bytes()[2 * SIZE : 2 * SIZE + AREA]
        assert os.pread(memory, AREA, 2 * SIZE + AREA) == bytes(AREA)
