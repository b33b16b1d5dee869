"""A Debian that an operator sits at: a plain root, systemd, a network card that this machine reaches a port behind.

What is written on its root is thrown away when it is switched off, so one image serves every boot.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.boot import images, machine, uki
from tests.boot.cache import Cache
from tests.boot.machine import Disk, Machine
from tests.boot.variants import GUEST, INITRAMFS_TOOLS, Variant, install

BOOKWORM: Final = replace(
    INITRAMFS_TOOLS, name="bookworm-operated", packages=(*INITRAMFS_TOOLS.packages, "dbus")
)
TRIXIE: Final = replace(
    uki.TRIXIE, name="trixie-operated", packages=(*uki.TRIXIE.packages, "systemd-sysv", "dbus")
)
CMDLINE: Final = (
    "console=ttyS0 root=/dev/disk/by-id/virtio-root rw no_timer_check quiet systemd.show_status=0"
)
_MAC: Final = "52:54:00:00:81:17"
_ADDRESS: Final = "10.0.3.15"
_TYPED: Final = """\
[Unit]
Description=What a test types
Wants=network-online.target
After=network-online.target systemd-user-sessions.service

[Service]
ExecStart=/usr/local/lib/typed
StandardInput=tty
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""
_NETWORK: Final = f"""\
[Match]
MACAddress={_MAC}

[Network]
Address={_ADDRESS}/24
"""
_SETTLE: Final = """\
rm /etc/dpkg/dpkg.cfg.d/99mmdebstrap
systemctl --quiet enable typed.service systemd-networkd.service systemd-networkd-wait-online.service
systemctl --quiet mask getty@.service serial-getty@.service
systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
passwd --quiet --lock root
update-initramfs -u
"""
"""What an installer does last. The image was made without documents, of which a package on a real machine brings its own."""
_ROOM_MB: Final = 512
_SRV_SIZE: Final = "64M"


@dataclass
class Operated:
    """A running machine, at whose console somebody types; ``port`` of 127.0.0.1 is the one that was asked for in it."""

    machine: Machine
    port: int
    typed: int = 0

    def run(self, command: str, timeout_s: float, *, code: int = 0) -> list[str]:
        """Type a command, wait until it has ended with this exit code, and give what it printed."""
        self.typed += 1
        start = f"typed {self.typed}: "
        self.machine.type(f"{self.typed} {command}")
        self.machine.wait_for(rf"^{start}code \d+$", timeout_s)
        *printed, last = [line.removeprefix(start) for line in self.machine.said(f"^{start}")]
        assert last == f"code {code}", "\n".join([command, *printed[-40:], last])
        return printed


def build(cache: Cache, variant: Variant) -> Path:
    """Build its disk; gives the directory with ``disk.img``, ``vmlinuz`` and ``initrd.img``."""
    debian = images.build_debian(cache, variant)
    return cache.get(
        f"{variant.name}.disk",
        [debian.name, GUEST / "typed", Path(__file__)],
        lambda to: _build(to, debian / "root"),
    )


def _build(to: Path, debian: Path) -> None:
    tree = to / "tree"
    images.copy_tree(debian, tree)
    install(GUEST / "typed", tree / "usr/local/lib/typed")
    for name, text in {
        "etc/fstab": "/dev/disk/by-id/virtio-root / ext4 defaults 0 1\n/dev/disk/by-id/virtio-srv /srv ext4 ro 0 0\n",
        "etc/hostname": "keys\n",
        "etc/initramfs-tools/conf.d/few": "MODULES=list\n",
        "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
        "etc/systemd/system/typed.service": _TYPED,
        "etc/systemd/network/keys.network": _NETWORK,
    }.items():
        images.write(tree / name, text, 0o644)
    with (to / "settle.log").open("w+b") as log:
        images.in_chroot(tree, ["sh", "-ec", _SETTLE], log.fileno())
    for name in ("vmlinuz", "initrd.img"):
        (found,) = (tree / "boot").glob(f"{name}-*")
        shutil.copy(found, to / name)
    kilobytes = int(images.run(["du", "-sk", "--apparent-size", str(tree)]).split()[0])
    images.make_ext4(tree, to / "disk.img", f"{kilobytes * 5 // 4096 + _ROOM_MB}M")
    shutil.rmtree(tree)


@contextmanager
def switched_on(image: Path, srv: Path, directory: Path, port: int) -> Iterator[Operated]:
    """Switch it on, with the files of ``srv`` in its /srv and a port of this machine's that leads to its ``port``."""
    images.make_ext4(srv, directory / "srv.img", _SRV_SIZE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        here = free.getsockname()[1]
    boots = [
        *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd.img"), "-append", CMDLINE),
        "-netdev",
        f"user,id=n1,restrict=on,net={_ADDRESS}/24,hostfwd=tcp:127.0.0.1:{here}-{_ADDRESS}:{port}",
        *("-device", f"virtio-net-pci,netdev=n1,romfile=,mac={_MAC}"),
    ]
    disks = [Disk(image / "disk.img", "root"), Disk(directory / "srv.img", "srv")]
    with machine.switch_on(
        directory / "vm", boots=boots, disks=disks, verifier=None, processors=2
    ) as running:
        yield Operated(running, here)


def blocks(text: str) -> list[list[str]]:
    """Give the commands that a document shows: each indented block's, with continued lines made one."""
    joined = re.sub(r"\\\n\s+", "", text)
    found: list[list[str]] = [[]]
    for line in joined.splitlines():
        if line.startswith("    "):
            found[-1].append(line.strip())
        elif found[-1]:
            found.append([])
    return [block for block in found if block]
