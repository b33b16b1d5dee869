"""The Debians that are booted: which release, what makes its initramfs, and where our files lie for that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
GUEST: Final = Path(__file__).with_name("guest")
HOOK: Final = ROOT / "initramfs-tools-hook"
MODULE: Final = ROOT / "dracut-module/50kagimori"

UUID: Final = "5c9e7a10-3d0f-4b7a-9a51-0c6b7d1e2f30"
"""Of the encrypted root."""
WITHOUT_DOORS: Final = (
    "systemd.import_credentials=no noresume systemd.gpt_auto=0 rd.shell=0 rd.emergency=poweroff panic=-1"
)
_CMDLINE: Final = f"console=ttyS0 root=/dev/mapper/cryptroot ro no_timer_check {WITHOUT_DOORS}"
"""An emulator that gets too little time fails the kernel's check of its timers, which then is a panic."""

_BOOKWORM: Final = (
    *("linux-image-cloud-amd64", "cryptsetup-bin", "udev", "kmod", "busybox", "zstd", "python3"),
    *("libtss2-esys-3.0.2-0", "libtss2-tcti-device0", "libtss2-tctildr0", "libtss2-mu0", "libtss2-rc0"),
    *("libtss2-fapi1", "libtss2-sys1", "fuse3", "libfuse3-3"),
)
_TRIXIE: Final = (
    *("linux-image-cloud-amd64", "cryptsetup-bin", "udev", "kmod", "busybox", "zstd", "python3"),
    *("libtss2-esys-3.0.2-0t64", "libtss2-tcti-device0t64", "libtss2-tctildr0t64", "libtss2-mu-4.0.1-0t64"),
    *("libtss2-rc0t64", "libtss2-fapi1t64", "libtss2-sys1t64", "systemd-ukify", "systemd-boot-efi"),
)


@dataclass(frozen=True)
class Variant:
    """A Debian ``suite`` with ``packages``; ``place`` puts our ``rooms`` and the simulated hardware's into it.

    ``make`` is the command that writes /made.img for a kernel, whose release is put in place of KERNEL. ``name`` is that of
    the Debian: variants that differ only in what follows share it.
    """

    name: str
    suite: str
    packages: tuple[str, ...]
    rooms: tuple[Path, ...]
    place: Callable[[Path], None]
    make: tuple[str, ...]
    cmdline: str


def install(source: Path, target: Path) -> None:
    """Copy a program, as a package would."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    target.chmod(0o755)


def _place_common(chroot: Path) -> None:
    for script in (HOOK / "common").iterdir():
        install(script, chroot / "usr/lib/kagimori/boot" / script.name)
    install(HOOK / "booted/booted", chroot / "usr/lib/kagimori/booted")
    shutil.copy(HOOK / "booted/kagimori-confirm.service", chroot / "usr/lib/systemd/system")


def _place_initramfs_tools(chroot: Path) -> None:
    _place_common(chroot)
    scripts = chroot / "usr/share/initramfs-tools/scripts"
    install(HOOK / "hook", chroot / "usr/share/initramfs-tools/hooks/kagimori")
    for stage in ("init-premount", "init-bottom", "panic"):
        install(HOOK / "scripts" / stage, scripts / stage / "kagimori")
    install(GUEST / "hook", chroot / "etc/initramfs-tools/hooks/simulated-snp")
    install(GUEST / "device", chroot / "etc/initramfs-tools/scripts/init-top/simulated-snp")


def _place_dracut(chroot: Path) -> None:
    _place_common(chroot)
    modules = chroot / "usr/lib/dracut/modules.d"
    shutil.copytree(MODULE, modules / MODULE.name)
    configuration = chroot / "usr/lib/dracut/dracut.conf.d"
    configuration.mkdir(exist_ok=True)
    shutil.copy(MODULE.parent / "kagimori.conf", configuration / "50-kagimori.conf")
    shutil.copytree(GUEST / "dracut", modules / "49simulated-snp")
    install(GUEST / "device", modules / "49simulated-snp/device")


INITRAMFS_TOOLS: Final = Variant(
    "bookworm-initramfs-tools",
    "bookworm",
    (*_BOOKWORM, "initramfs-tools", "cryptsetup-initramfs", "systemd-sysv"),
    (HOOK, GUEST),
    _place_initramfs_tools,
    ("mkinitramfs", "-o", "/made.img", "KERNEL"),
    _CMDLINE,
)
_DRACUT: Final = ("dracut", "--force", "--no-hostonly", "--compress", "zstd", "--kver", "KERNEL", "/made.img")
DRACUT: Final = Variant(
    "bookworm-dracut",
    "bookworm",
    (*_BOOKWORM, "dracut", "systemd-sysv"),
    (HOOK, MODULE.parent, GUEST),
    _place_dracut,
    _DRACUT,
    # The installer of a Debian with dracut names the volume here; systemd-cryptsetup then wants to open it.
    f"{_CMDLINE} rd.luks.name={UUID}=cryptroot",
)
DRACUT_WITHOUT_SYSTEMD: Final = replace(
    DRACUT,
    make=(*_DRACUT[:-1], "--omit", "systemd systemd-initrd dracut-systemd", _DRACUT[-1]),
    cmdline=f"{_CMDLINE} rd.luks.uuid={UUID}",
)
DRACUT_TRIXIE: Final = replace(
    DRACUT,
    name="trixie-dracut",
    suite="trixie",
    packages=(*_TRIXIE, "dracut", "systemd-sysv", "systemd-cryptsetup"),
)
