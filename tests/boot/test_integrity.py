"""A root with integrity: the boot reads what its owner wrote, or an error, never what the host made of it (THREATS T21)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.boot import integrity
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, VM, Site
from tests.boot.images import PASSPHRASE, SECRET
from tests.boot.integrity import Laid, data_offset, first_block, header_of
from tests.boot.machine import Machine
from tests.boot.scene import Scene, played
from tests.boot.variants import ROOT, UUID
from tests.unit.luks.attacker import Host

from kagimori_protocol.luks2_allowed import INTEGRITY

pytestmark = [pytest.mark.boot, pytest.mark.slow]

READ = f"""
b=/bin/busybox
for each in /secret /etc/os-release; do
    $b cat $each >/run/read 2>/run/why && echo "seen: read $each" || echo "seen: not read $each: $($b cat /run/why)"
    $b grep -q '{SECRET}' /run/read && echo "seen: as it was written"
done
"""
"""What the booted root makes of two files, one of which holds the secret."""


@pytest.fixture(scope="module")
def made(accepted: Site) -> Path:
    """Give the directory of both volumes, and of what is in them."""
    return integrity.build(Cache(ROOT / ".dev" / "boot"), accepted.estate)


@pytest.fixture
def enrolled(site: Site, made: Path, tmp_path: Path) -> Callable[[str], Site]:
    """Give the site once its owner has one of these volumes in place of the VM's, under the same UUID."""

    def enrol(image: str) -> Site:
        disk = Path(shutil.copyfile(made / image, tmp_path / "disk.img"))
        site.verifier("volume", "remove", "--vm", VM, UUID)
        site.commands.verifier(
            *("volume", "add", "--vm", VM, "--device", str(disk), "--passphrase-fd", "0"),
            stdin=PASSPHRASE.decode(),
        )
        return Site(replace(site.estate, volume=disk), site.directory)

    return enrol


def read_in(site: Site) -> Machine:
    """Boot to the root, whatever has become of its files, and let it read them."""
    with site.serving() as served, played(site, served.url, Scene(booted=READ)) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said("guest: log kagimori-agent: cryptroot: mapped")
    return machine


def test_a_root_with_integrity_opens_and_its_crypttabs_discard_is_told_to_mean_nothing(
    enrolled: Callable[[str], Site],
) -> None:
    """Two mappings where there was one; the upper is the root's, and bears the volume's name and UUID."""
    site = enrolled("disk.img")
    assert header_of(site.estate.volume).json["segments"]["0"]["integrity"] == INTEGRITY
    machine = read_in(site)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said(f"guest: mapping cryptroot CRYPT-LUKS2-{UUID.replace('-', '')}-cryptroot")
    assert machine.said("guest: mapping cryptroot_dif CRYPT-INTEGRITY-")
    assert machine.said("guest: log kagimori-agent: cryptroot: crypttab's discard is passed over")
    assert machine.said("guest: log kagimori: root check: .*: on cryptroot$")
    assert machine.said("guest: discards 0")
    assert machine.said("seen: as it was written")
    assert site.events()[:2] == ["confirmed-opened", "released"]


def test_a_sector_that_the_host_changed_and_one_that_it_moved_are_errors_to_whoever_reads_them(
    enrolled: Callable[[str], Site], made: Path
) -> None:
    """One bit of a file, and a sector with its own right tag in another's place."""
    site = enrolled("disk.img")
    host, laid = Host(site.estate.volume), Laid.of(site.estate.volume)
    secret, release, other = (
        first_block(made / "plain.img", name) for name in ("/secret", "/etc/os-release", "/bin/busybox")
    )
    disk = host.device.read_bytes()
    host.write(laid.data(secret), bytes([disk[laid.data(secret)] ^ 1]))
    host.write(laid.data(release), disk[laid.data(other) :][: laid.block])
    host.write(laid.tag(release), disk[laid.tag(other) :][: integrity.TAG])
    machine = read_in(site)
    assert not machine.said(SECRET)
    assert machine.said("seen: not read /secret: .*Input/output error")
    assert machine.said("seen: not read /etc/os-release: .*Input/output error")
    assert not machine.said("seen: (read|as it was written)")
    assert machine.said("INTEGRITY AEAD ERROR")


def test_without_integrity_the_same_change_is_read_and_nobody_is_told(
    enrolled: Callable[[str], Site], made: Path
) -> None:
    """What XTS alone makes of it, in the same file system: other plaintext. So the test above tells something."""
    site = enrolled("xts.img")
    host = Host(site.estate.volume)
    at = data_offset(header_of(host.device)) + first_block(made / "plain.img", "/secret")
    host.write(at, bytes([host.device.read_bytes()[at] ^ 1]))
    machine = read_in(site)
    assert machine.said("seen: read /secret")
    assert not machine.said(f"seen: as it was written|{SECRET}")
    assert not machine.said("INTEGRITY AEAD ERROR|Input/output error")
