"""Tokens in a LUKS2 header, against the real cryptsetup: what opens without our key proves nothing about it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kagimori_protocol.errors import DiskError
from kagimori_simulator import disk
from kagimori_verifier import enrolment, luks_enrol
from kagimori_verifier.store import Store, profiles, vms

PASSPHRASE = b"the passphrase of an installer"
KEK = bytes(range(32))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give a LUKS2 volume with a token that names a passphrase in the kernel's keyring."""
    path = tmp_path / "disk.img"
    disk.make_volume(path, PASSPHRASE)
    subprocess.run(
        ["cryptsetup", "token", "add", "--key-description", "kagimori:test", str(path)],
        check=True,
        capture_output=True,
    )
    return path


def test_a_volume_with_a_token_is_not_enrolled_and_nothing_is_kept_of_the_try(
    tmp_path: Path, image: Path
) -> None:
    """A keyring token's success would pass for the proof of a key that opens nothing, and no agent would open it."""
    store = Store.create(f"sqlite:///{tmp_path / 'verifier.db'}")
    try:
        with store.write() as txn:
            profiles.add(txn, profiles.ProfileRow("debian", "{}", 0))
            vms.add(txn, vms.VmRow("web1", "debian", True, ["unlock"], [], 0))
        before = image.read_bytes()
        with pytest.raises(DiskError) as caught:
            enrolment.add_volume(
                store,
                KEK,
                vm_id="web1",
                device=image,
                label="cryptroot",
                passphrase=PASSPHRASE,
                backup=tmp_path / "backup",
                at_s=0,
            )
        assert caught.value.code == "luks.tokens"
        assert image.read_bytes() == before
        with store.read() as txn:
            assert vms.volumes(txn, "web1", state=None) == ()
    finally:
        store.close()


def test_without_its_token_the_same_volume_can_be_enrolled(image: Path) -> None:
    """What the error says to do is enough."""
    subprocess.run(["cryptsetup", "token", "remove", "--token-id", "0", str(image)], check=True)
    with luks_enrol.opened(image) as opened:
        assert set(opened.load().header.json["keyslots"]) == {"0"}
