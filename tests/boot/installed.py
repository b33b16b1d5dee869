"""A Debian as its installer leaves it, on disks that keep what it writes: an encrypted root, /boot beside it, no agent.

What its owner does there comes as a script on a disk of its own, which the booted system runs; so does the agent's package.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.boot import images, machine, uki
from tests.boot.cache import Cache
from tests.boot.estate import Site
from tests.boot.images import PASSPHRASE, Images
from tests.boot.machine import Disk, Machine
from tests.boot.scene import as_disk
from tests.boot.variants import GUEST, INITRAMFS_TOOLS, UUID, Variant, install

BOOKWORM: Final = INITRAMFS_TOOLS
TRIXIE: Final = replace(uki.TRIXIE, name="trixie-installed", packages=(*uki.TRIXIE.packages, "systemd-sysv"))
ASKS: Final = "Please unlock disk cryptroot"
"""What an initramfs without an agent says."""

_CRYPTTAB: Final = f"cryptroot UUID={UUID} none luks,initramfs,discard\n"
_FSTAB: Final = "/dev/mapper/cryptroot / ext4 defaults 0 1\n"
_SCENE: Final = """\
[Unit]
Description=What the owner of a test does
After=systemd-user-sessions.service

[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh /usr/local/lib/owner
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""
_OWNER: Final = """\
#!/bin/sh
# Runs what lies on the disk "booted", as root of the booted system, and switches the machine off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive
echo "owner: the root is $(cut -d' ' -f1 /proc/mounts | grep -c mapper) mapped file system"
[ ! -r /run/kagimori/log ] || sed 's/^/owner: log /' /run/kagimori/log
mount /dev/disk/by-id/virtio-boot /boot
# systemd mounts what there is of configfs over the door that the initramfs had.
while mountpoint --quiet /sys/kernel/config; do umount --lazy /sys/kernel/config; done
sh /usr/local/lib/simulated-snp
busybox ip link set "$(cd /sys/class/net && echo e*)" up
busybox ip address add 10.0.2.15/24 dev "$(cd /sys/class/net && echo e*)"
sh -e /dev/disk/by-id/virtio-booted 2>&1
echo "owner: done, $?"
umount /boot
poweroff
"""
_SETTLE: Final = """\
systemctl --quiet enable owner.service
systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
passwd --quiet --lock root
update-initramfs -u
"""
_BOOT_SIZE: Final = "192M"
_ROOM_MB: Final = 384


@dataclass
class Installed:
    """The disks of one machine, ``root`` and ``boot``, and where its next boot's parts are put."""

    images: Images
    directory: Path

    @property
    def root(self) -> Path:
        """The encrypted disk."""
        return self.directory / "root.img"

    @property
    def boot(self) -> Path:
        """The disk with kernel and initramfs, which a host reads as it likes."""
        return self.directory / "boot.img"

    def initramfs(self) -> Path:
        """Give the initramfs that lies on the boot disk now."""
        release = self.images.kernel.name.removeprefix("vmlinuz-")
        to = self.directory / "initrd.img"
        to.unlink(missing_ok=True)
        images.run(["debugfs", "-R", f"dump /initrd.img-{release} {to}", str(self.boot)])
        assert to.stat().st_size, "no initramfs on the boot disk"
        return to

    @contextmanager
    def booted(
        self, site: Site, verifier: str | None, booted: str, files: Mapping[str, str]
    ) -> Iterator[Machine]:
        """Switch it on; the booted system runs the script ``booted``, and finds each of ``files`` as a disk."""
        vm = site.directory / "vm"
        if vm.exists():
            shutil.rmtree(vm)
        disks = [
            Disk(self.root, "root", kept=True),
            Disk(self.boot, "boot", kept=True),
            Disk(self.images.hardware, "snp"),
            *(
                Disk(as_disk(site.directory / name, text), name)
                for name, text in {"booted": booted, **files}.items()
            ),
        ]
        with machine.start(
            vm,
            kernel=self.images.kernel,
            initramfs=self.initramfs(),
            cmdline=self.images.variant.cmdline,
            disks=disks,
            verifier=verifier,
            processors=2,
        ) as running:
            yield running


def install_debian(cache: Cache, variant: Variant, deb: Path, to: Path) -> Installed:
    """Make the disks of a machine: the Debian of a variant, with a package in /srv that nobody has installed yet."""
    built = images.build(cache, variant)
    debian, _ = images.build_base(cache, variant)
    tree = to / "tree"
    to.mkdir(parents=True, exist_ok=True)
    images.copy_tree(debian / "root", tree)
    shutil.copy(deb, tree / "srv")
    install(GUEST / "hook", tree / "etc/initramfs-tools/hooks/simulated-snp")
    install(GUEST / "device", tree / "etc/initramfs-tools/scripts/init-top/simulated-snp")
    install(GUEST / "device", tree / "usr/local/lib/simulated-snp")
    for name, text in {
        "etc/crypttab": _CRYPTTAB,
        "etc/fstab": _FSTAB,
        "etc/hostname": "web1\n",
        # An emulated machine takes four minutes for an initramfs of most modules.
        "etc/initramfs-tools/conf.d/few": "MODULES=list\n",
        "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\ndm_crypt\n",
        "etc/systemd/system/owner.service": _SCENE,
        "usr/local/lib/owner": _OWNER,
    }.items():
        images.write(tree / name, text, 0o644)
    with (to / "settle.log").open("w+b") as log:
        images.in_chroot(tree, ["sh", "-ec", _SETTLE], log.fileno())
    images.make_ext4(tree / "boot", to / "boot.img", _BOOT_SIZE)
    shutil.rmtree(tree / "boot")
    (tree / "boot").mkdir()
    kilobytes = int(images.run(["du", "-sk", "--apparent-size", str(tree)]).split()[0])
    images.encrypted(tree, to, f"{kilobytes * 5 // 4096 + _ROOM_MB}M")
    (to / "disk.img").rename(to / "root.img")
    (to / "passphrase").unlink()
    shutil.rmtree(tree)
    return Installed(built, to)


def unlock_by_hand(running: Machine, timeout_s: float) -> None:
    """Type the installer's passphrase once it is asked for."""
    running.wait_for(ASKS, timeout_s, prompt=True)
    running.type(PASSPHRASE.decode())
