"""A host plants disks and words that a boot looks for: none becomes the system, and none is listened to (THREATS T2, T5)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tests.boot import estate as estates
from tests.boot import images, planted
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, Site, session_in
from tests.boot.images import SECRET
from tests.boot.login import with_login
from tests.boot.machine import Disk, Machine
from tests.boot.planted import CREDENTIAL, CREDENTIALS, LABEL
from tests.boot.scene import Scene, played
from tests.boot.test_dracut import on
from tests.boot.variants import DRACUT, DRACUT_WITHOUT_SYSTEMD, INITRAMFS_TOOLS, ROOT

pytestmark = [pytest.mark.boot, pytest.mark.slow]

LOOK = r"""
export PATH=/bin
sed 's/^/seen: mount /' /proc/mounts
sed 's/^/seen: swap /' /proc/swaps
for each in /run/credentials/*/*; do echo "seen: credential $each"; done
echo "seen: resume $(cat /sys/power/resume)"
"""
"""What the booted root tells of what it runs on."""

FROM_THE_LABEL = {
    # Read after each of its scripts.
    INITRAMFS_TOOLS: f"echo ROOT=LABEL={LABEL} >/conf/param.conf",
    DRACUT: f"""
mkdir -p /run/systemd/system/sysroot.mount.d
printf '[Mount]\\nWhat=/dev/disk/by-label/{LABEL}\\n' >/run/systemd/system/sysroot.mount.d/planted.conf
systemctl daemon-reload
""",
    # Sourced before the hook that mounts.
    DRACUT_WITHOUT_SYSTEMD: f"echo root=block:/dev/disk/by-label/{LABEL} >/lib/dracut/hooks/mount/00-planted.sh",
}
"""By initramfs: what makes it take its root as it would with root=LABEL=, in the boot that the owner has accepted."""

HALF_AND_SWAP = r"""
cat >/mix <<'END'
size=$(cat /sys/class/block/dm-0/size)
printf '0 %s linear /dev/mapper/cryptroot 0\n%s 2048 linear %s 0\n' "$size" "$size" \
    "$(readlink -f /dev/disk/by-id/virtio-planted)" | dmsetup create vg-root
swapon /dev/disk/by-id/virtio-swap
END
echo 'sh /mix' >>/scripts/local-top/ORDER
echo ROOT=/dev/mapper/vg-root >/conf/param.conf
"""
"""A volume group that has grown over to a disk of the host's, and a swap there."""

LOOK_EARLY = r"""
mkdir -p /run/systemd/system/sysinit.target.wants
cat >/run/systemd/system/look.service <<'END'
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
ExecStart=/bin/sh -c 'for each in /run/credentials/@system/*; do echo "seen: credential $${each##*/}"; done; \
    kagimori-agent doctor --host-doors >/run/doors; echo "seen: doors $?"; sed "s/^/seen: /" /run/doors; poweroff -ff'
END
ln -s ../look.service /run/systemd/system/sysinit.target.wants/
"""
"""A unit for the booted systemd, of the first that it starts: tells of credentials and doors, and powers off."""

WITHOUT_THE_WORD = """
sed 's/systemd.import_credentials=no//' /proc/cmdline >/cmdline
mount --bind /cmdline /proc/cmdline
"""


def refused_in(machine: Machine) -> str:
    """Hold that this boot ended at the root check, and give what was found there."""
    machine.wait_off(BOOT_S)
    assert machine.said("What would become the system does not rest on volumes that the agent opened")
    assert machine.said("this root is not taken, and the boot ends here .exit code 8 of the agent")
    assert machine.said("tpm0: PCR 15 was capped")
    assert machine.said("to do: Look at the VM's disks")
    assert machine.said("reboot: Power down")
    assert not machine.said("guest: root reached|planted: this root|built-in commands|emergency mode")
    return "\n".join(machine.said("found:"))


@on(initramfs_tools=INITRAMFS_TOOLS, systemd=DRACUT)
def test_an_honest_boot_takes_nothing_that_is_planted_beside_it(site: Site, tmp_path: Path) -> None:
    """A sleeping system in a swap, partitions typed as root, /srv and swap, a root by label, two credentials: all unheard."""
    plain = planted.root(tmp_path, site.estate.images)
    swap = planted.swap(tmp_path, hibernated=False)
    disks = [plain, swap, planted.swap(tmp_path, hibernated=True), planted.partitions(tmp_path, plain, swap)]
    scene = Scene(booted=LOOK, disks=disks, words=CREDENTIALS)
    with site.serving() as served, played(site, served.url, scene) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said(r"guest: log kagimori: root check: /\w+ \(ext4 of /dev/\S+\): on cryptroot")
    assert [line for line in machine.said("seen: mount /dev/") if " / ext4" in line]
    assert not machine.said("seen: mount /dev/vd")
    assert machine.said("seen: swap") == [line for line in machine.said("seen: swap") if "Filename" in line]
    assert not machine.said(f"seen: credential .*{CREDENTIAL}")
    assert machine.said("seen: resume (0:0)?$")
    assert not machine.said("(?i)planted: this root|resuming from|image found")


@on(initramfs_tools=INITRAMFS_TOOLS, systemd=DRACUT, plain=DRACUT_WITHOUT_SYSTEMD)
def test_a_root_by_label_on_a_plain_disk_ends_the_boot(site: Site, tmp_path: Path) -> None:
    """The volumes are open, and the distribution's own code mounts what the host has planted; it never runs."""
    scene = Scene(
        meanwhile=FROM_THE_LABEL[site.estate.images.variant],
        disks=[planted.root(tmp_path, site.estate.images)],
    )
    with site.serving() as served, played(site, served.url, scene) as machine:
        found = refused_in(machine)
    assert "a disk that the agent has not opened" in found
    assert "(ext4 of /dev/vd" in found
    assert site.events()[:2] == ["confirmed-opened", "released"], "the key came; what it opened did not run"


def test_a_root_half_of_which_is_the_hosts_and_a_swap_of_its_own_end_the_boot(
    site: Site, tmp_path: Path
) -> None:
    """A mapping over the opened volume and a planted disk, as LVM makes them, and a swap: each is named."""
    scene = Scene(
        meanwhile=HALF_AND_SWAP,
        disks=[planted.root(tmp_path, site.estate.images), planted.swap(tmp_path, hibernated=False)],
    )
    with site.serving() as served, played(site, served.url, scene) as machine:
        found = refused_in(machine)
    assert "dm-1 (vg-root) on vd" in found
    assert re.search(r"swap /\S*dev/vd\w: vd\w: a disk that the agent has not opened", found)


def test_a_second_disk_with_the_volumes_uuid_ends_the_boot(site: Site) -> None:
    """Choosing would be guessing: neither of them is opened."""
    scene = Scene(disks=[Disk(site.estate.volume, "copy")])
    with site.serving() as served, played(site, served.url, scene) as machine:
        machine.wait_off(BOOT_S)
    assert machine.said("More than one device claims to be volume cryptroot")
    assert machine.said("reboot: Power down")
    assert not machine.said("guest: root reached|cryptroot: mapped")
    assert site.events()[:2] == ["confirmed-failed", "released"]


@pytest.fixture(scope="module")
def installed(_can_boot: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Give the owner's site of a whole Debian with systemd, once its first boot is accepted."""
    cache = Cache(ROOT / ".dev" / "boot")
    estate = estates.of(cache, with_login(cache, images.build(cache, INITRAMFS_TOOLS)))
    directory = tmp_path_factory.mktemp("installed")
    shutil.copytree(estate.verifier, directory / "verifier")
    site = Site(estate, directory)
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_off(BOOT_S)
    site.verifier("reference", "accept", session_in(machine.said("")), "--yes", "--label", "first boot")
    return site


@pytest.mark.parametrize("heard", [False, True], ids=["with the word", "without it"])
def test_credentials_of_the_host_are_heard_only_without_the_word(
    installed: Site, tmp_path: Path, heard: bool
) -> None:
    """A real Debian's systemd, with the word that switches them off, and with that word taken away in the initramfs.

    ``doctor --host-doors`` in that Debian names this door, or does not.
    """
    shutil.copytree(installed.directory / "verifier", tmp_path / "verifier")
    site = Site(installed.estate, tmp_path)
    scene = Scene(meanwhile=LOOK_EARLY + (WITHOUT_THE_WORD if heard else ""), words=CREDENTIALS)
    with site.serving() as served, played(site, served.url, scene) as machine:
        machine.wait_for(r"seen: doors \d", BOOT_S)
        machine.wait_off(BOOT_S)
    assert bool(machine.said(f"seen: credential {CREDENTIAL}")) == heard
    assert bool(machine.said("seen: OPEN      credentials:")) == heard
    assert machine.said("seen: OPEN      console-login:"), "this one has a prompt, and nobody has accepted it"
    assert machine.said("seen: doors 1")
    assert not machine.said("seen: OPEN      (gpt-auto|resume)")
