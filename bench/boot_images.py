"""One Debian in which every rival is installed, and initramfs images of it that differ in who is left.

A rival's hooks go by removing its packages from a copy: kernel, libraries and programs stay what they are, so that the images
differ in nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from package.__main__ import build as build_package
from tests.boot import images, uki
from tests.boot.cache import Cache
from tests.boot.variants import GUEST, INITRAMFS_TOOLS, ROOT, UUID, Variant, install

RIVALS: Final = {
    "dropbear": ("dropbear-initramfs",),
    "mandos": ("mandos-client",),
    "clevis": ("clevis-initramfs", "clevis-tpm2"),
}
"""By name, the packages whose hooks make an initramfs another."""
OURS: Final = "kagimori"
_HOST_SIDE: Final = ("clevis-luks", "tang", "jose")
"""What seals, and what answers: no hook of theirs touches an initramfs."""
_AUTHORIZED: Final = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl bench\n"
)
"""The key of RFC 8032's first test: dropbear's hook wants one, and nobody logs in."""
_TABLES: Final = {
    "etc/crypttab": f"cryptroot UUID={UUID} none luks,initramfs,discard\n",
    "etc/fstab": "/dev/mapper/cryptroot / ext4 ro 0 1\n",
    "etc/dropbear/initramfs/authorized_keys": _AUTHORIZED,
    "etc/initramfs-tools/update-initramfs.conf": "update_initramfs=no\nbackup_initramfs=no\n",
}


def _with_rivals(variant: Variant, swtpm: str) -> Variant:
    rivals = [name for names in RIVALS.values() for name in names]
    packages = (*variant.packages, *rivals, *_HOST_SIDE, swtpm)
    return replace(variant, name=f"{variant.suite}-rivals", packages=packages)


BOOKWORM: Final = _with_rivals(INITRAMFS_TOOLS, "libtss2-tcti-swtpm0")
TRIXIE: Final = _with_rivals(uki.TRIXIE, "libtss2-tcti-swtpm0t64")


def debian(cache: Cache, variant: Variant = BOOKWORM) -> Path:
    """Give the Debian with every rival in it."""
    return images.build_debian(cache, variant) / "root"


def copied(
    rivals: Path, to: Path, kept: Sequence[str], agent_toml: str = "", suite: str = BOOKWORM.suite
) -> Path:
    """Copy it to ``to``, with the hooks of ``kept`` alone; OURS comes as the package that this checkout builds."""
    to.parent.mkdir(parents=True)
    images.copy_tree(rivals, to)
    for name, text in _TABLES.items():
        if (to / name).parent.is_dir():
            images.write(to / name, text, 0o644)
    gone = [package for name, packages in RIVALS.items() if name not in kept for package in packages]
    if gone:
        _in(to, "dpkg", "--remove", *gone)
    if OURS in kept:
        with tempfile.TemporaryDirectory(prefix="kagimori-bench-") as made:
            deb = build_package(suite, Path(made))
            shutil.copy(deb, to / "root")
        _in(to, "dpkg", "--install", f"/root/{deb.name}")
        (to / "etc/kagimori").mkdir(exist_ok=True)
        images.write(to / "etc/kagimori/agent.toml", agent_toml, 0o600)
    return to


def simulated(chroot: Path) -> None:
    """Let its initramfs find the simulated hardware."""
    install(GUEST / "hook", chroot / "etc/initramfs-tools/hooks/simulated-snp")
    install(GUEST / "device", chroot / "etc/initramfs-tools/scripts/init-top/simulated-snp")


def initramfs(chroot: Path) -> Path:
    """Make its initramfs; gives its path."""
    (kernel,) = (chroot / "boot").glob("vmlinuz-*")
    _in(chroot, "mkinitramfs", "-o", "/made.img", kernel.name.removeprefix("vmlinuz-"))
    return chroot / "made.img"


def _in(chroot: Path, *command: str) -> None:
    with (chroot.parent / "run.log").open("w+b") as log:
        images.in_chroot(chroot, command, log.fileno())


__all__ = ["BOOKWORM", "OURS", "RIVALS", "ROOT", "TRIXIE", "copied", "debian", "initramfs", "simulated"]
