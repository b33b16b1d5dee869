"""A real Debian as the encrypted root: the installation that its own initramfs was made in, down to a login prompt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.boot import images
from tests.boot.cache import Cache
from tests.boot.images import PASSPHRASE, Images

HOST: Final = "web1"
PASSWORD: Final = "kagimori"
"""Of root, at a console that the host reads: this machine has nothing to hide."""

_FSTAB: Final = "/dev/mapper/cryptroot / ext4 defaults 0 1\n"
_SETTLE: Final = f"""\
echo {HOST} >/etc/hostname
echo 'root:{PASSWORD}' | chpasswd
systemctl --quiet enable kagimori-confirm.service
systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
"""
"""What an installer does last; and without timers, which an emulated machine would start with."""
_ROOM_MB: Final = 128


def with_login(cache: Cache, built: Images) -> Images:
    """Give images whose volume is the whole Debian that ``built`` was made from."""

    def make(to: Path) -> None:
        tree = to / "tree"
        images.copy_tree(built.chroot, tree)
        images.write(tree / "etc/fstab", _FSTAB, 0o644)
        with (to / "settle.log").open("w+b") as log:
            images.in_chroot(tree, ["sh", "-ec", _SETTLE], log.fileno())
        kilobytes = int(images.run(["du", "-sk", "--apparent-size", str(tree)]).split()[0])
        images.encrypted(tree, to, f"{kilobytes * 5 // 4096 + _ROOM_MB}M")
        shutil.rmtree(tree)

    made_from = [built.chroot.parent.name, _FSTAB, _SETTLE, PASSPHRASE, Path(__file__)]
    return replace(built, volume=cache.get("login", made_from, make) / "disk.img")
