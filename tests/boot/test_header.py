"""A host that owns the disk writes what it likes into the LUKS2 header: the VM opens by the owner's or is off (THREATS T1, T21)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.boot.estate import BOOT_S, VM, Site
from tests.boot.images import SECRET
from tests.boot.machine import Disk, Machine
from tests.boot.scene import Scene, played
from tests.boot.test_dracut import on
from tests.boot.variants import DRACUT, INITRAMFS_TOOLS, UUID
from tests.conformance.making.header import Json
from tests.unit.luks.attacker import Host
from tests.unit.luks.headers import SIZE

pytestmark = [pytest.mark.boot, pytest.mark.slow]

BESIDE = 4096
"""Bytes before the forged header on the disk that brings it: at its beginning it would make a second candidate."""

SWAPPED_AS_CRYPTSETUP_STARTS = rf"""
program=$(command -v cryptsetup)
mv "$program" "$program.real"
cat >"$program" <<'END'
#!/bin/sh
# What a host does to its own disk at this moment.
python=$(sed -n '1s/^#!\(.*\) -IS$/\1/p' /usr/bin/kagimori-agent)
"$python" -IS -c '
forged = open("/dev/disk/by-id/virtio-forged", "rb").read()[{BESIDE}:]
open("/dev/disk/by-id/virtio-root", "r+b").write(forged)
' && echo "host: header swapped" >/dev/console
exec "$0.real" "$@"
END
chmod +x "$program"
"""
"""Stands for the host's timing: from here on both copies of the header on the disk have a null cipher."""


@pytest.fixture
def disk(site: Site, tmp_path: Path) -> Path:
    """Give a disk of its own to a test's host."""
    return Path(shutil.copyfile(site.estate.volume, tmp_path / "disk.img"))


def with_disk(site: Site, disk: Path) -> Site:
    """Give the site with this disk in place of the owner's."""
    return Site(replace(site.estate, volume=disk), site.directory)


def put_aside(site: Site) -> None:
    """Let the site's VM be switched on once more, and keep what the boot before has left."""
    vm = site.directory / "vm"
    vm.rename(vm.with_name("vm-before"))


def null_cipher(one: Json) -> None:
    """Lay the data open: what the VM writes from now on, the host reads."""
    one["segments"]["0"]["encryption"] = "cipher_null-ecb"


def opened_in(machine: Machine) -> None:
    """Hold that this boot reached its root."""
    machine.wait_for("guest: done", BOOT_S)
    machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said("guest: log kagimori-agent: cryptroot: mapped")


def refused_in(machine: Machine) -> str:
    """Hold that this boot ended before anything was opened, and give what the console said."""
    machine.wait_off(BOOT_S)
    assert machine.said("The volume's LUKS header is refused; no key was used")
    assert not machine.said("cryptroot: mapped|root reached|built-in commands|emergency mode")
    assert machine.said("tpm0: PCR 15 was capped")
    assert machine.said("reboot: Power down")
    return "\n".join(machine.said(""))


@on(initramfs_tools=INITRAMFS_TOOLS, systemd=DRACUT)
def test_an_old_header_is_refused_and_the_present_one_opens_beside_a_forged_copy(
    site: Site, disk: Path
) -> None:
    """The owner seals anew; the host spoils one copy, which harms nobody, and then brings the old header back."""
    host = Host(disk)
    old = host.kept()
    words = ("volume", "reseal", "--vm", VM, "--uuid", UUID, "--device", str(disk))
    assert site.verifier(*words, "--json").json()["header_epoch"] == 2
    host.forge(null_cipher, copies=(0,), newer=1)
    here = with_disk(site, disk)
    with here.serving() as served, here.booted(served.url) as machine:
        opened_in(machine)
    assert machine.said("cryptroot: the primary copy of the header is not used .luks.cipher")
    host.write(0, old)
    put_aside(here)
    with here.serving() as served, here.booted(served.url) as machine:
        said = refused_in(machine)
    assert "expected: a header of epoch 2 or later" in said
    assert "found: epoch 1" in said
    assert site.events()[0] == "confirmed-failed"


@on(initramfs_tools=INITRAMFS_TOOLS, systemd=DRACUT)
def test_a_null_cipher_in_the_segment_ends_the_boot(site: Site, disk: Path) -> None:
    """In both copies, with right checksums; the key that came would open it, and all would be written in the clear."""
    Host(disk).forge(null_cipher)
    here = with_disk(site, disk)
    with here.serving() as served, here.booted(served.url) as machine:
        said = refused_in(machine)
    assert "found: 'cipher_null-ecb'" in said


def test_a_header_that_nobody_has_sealed_ends_the_boot(site: Site, disk: Path) -> None:
    """Without a token, and with one in which the host has written a later epoch, all else as the owner made it."""
    honest = disk.read_bytes()[: 2 * SIZE]
    Host(disk).forge(lambda one: one["tokens"].clear())
    here = with_disk(site, disk)
    with here.serving() as served, here.booted(served.url) as machine:
        said = refused_in(machine)
    assert "expected: a token of type kagimori-header" in said
    assert "kagimori-verifier volume reseal" in said
    Host(disk).write(0, honest)
    put_aside(here)
    Host(disk).forge(lambda one: one["tokens"]["0"].update(epoch="9"))
    with here.serving() as served, here.booted(served.url) as machine:
        said = refused_in(machine)
    assert "expected: a header authenticated by this volume's unlock key" in said


@on(initramfs_tools=INITRAMFS_TOOLS, systemd=DRACUT)
def test_a_header_swapped_as_cryptsetup_starts_changes_nothing(
    site: Site, disk: Path, tmp_path: Path
) -> None:
    """The agent has looked, cryptsetup has not: it opens what was looked at, and the disk says a null cipher by then."""
    forged = Path(shutil.copyfile(disk, tmp_path / "forged.img"))
    Host(forged).forge(null_cipher)
    forged.write_bytes(bytes(BESIDE) + forged.read_bytes()[: 2 * SIZE])
    here = with_disk(site, disk)
    scene = Scene(
        meanwhile=SWAPPED_AS_CRYPTSETUP_STARTS,
        booted="/bin/busybox dd if=/dev/disk/by-id/virtio-root bs=4096 count=4 2>/dev/null |"
        " /bin/busybox strings | /bin/busybox grep -o cipher_null-ecb | /bin/busybox sed 's/^/seen: on the disk /'",
        disks=[Disk(forged, "forged")],
    )
    with here.serving() as served, played(here, served.url, scene) as machine:
        opened_in(machine)
    assert machine.said("host: header swapped")
    assert machine.said("seen: on the disk cipher_null-ecb")
