"""Debian 13 as one unified kernel image: systemd's stub with kernel, initramfs and command line inside."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.boot import esp
from tests.boot.archive import run
from tests.boot.images import Images
from tests.boot.variants import INITRAMFS_TOOLS, Variant

TRIXIE: Final[Variant] = replace(
    INITRAMFS_TOOLS,
    name="trixie-initramfs-tools",
    suite="trixie",
    packages=(
        *(
            "linux-image-cloud-amd64",
            "initramfs-tools",
            "cryptsetup-initramfs",
            "cryptsetup-bin",
            "udev",
            "kmod",
        ),
        *("busybox", "zstd", "python3", "systemd-ukify", "systemd-boot-efi"),
        *(
            "libtss2-esys-3.0.2-0t64",
            "libtss2-tcti-device0t64",
            "libtss2-tctildr0t64",
            "libtss2-mu-4.0.1-0t64",
        ),
        *("libtss2-rc0t64", "libtss2-fapi1t64", "libtss2-sys1t64"),
    ),
)

_SYSTEM: Final = uuid.UUID("6b616769-6d6f-7269-8000-0000000000e1")
_IN_CHROOT: Final = 'mount --bind "$1" "$0/mnt" && shift && exec chroot "$0" "$@"'


def disk(to: Path, images: Images, initramfs: Path, cmdline: str, credential: Path | None = None) -> Path:
    """Make the disk of a machine whose firmware starts such an image, with the ukify and the stub of its own Debian.

    A ``credential`` lies where the stub takes such from.
    """
    to.mkdir(parents=True)
    shutil.copy(images.kernel, to / "vmlinuz")
    shutil.copy(initramfs, to / "initrd.img")
    release = images.kernel.name.removeprefix("vmlinuz-")
    parts = ["--linux=/mnt/vmlinuz", "--initrd=/mnt/initrd.img", f"--cmdline={cmdline}"]
    parts += ["--os-release=@/etc/os-release", f"--uname={release}", "--output=/mnt/uki.efi"]
    place = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _IN_CHROOT]
    run(*place, str(images.chroot), str(to), "ukify", "build", *parts, cwd=to)
    files = {"/EFI/BOOT/BOOTX64.EFI": to / "uki.efi"}
    if credential is not None:
        files[f"/EFI/BOOT/BOOTX64.EFI.extra.d/{credential.name}"] = credential
    esp.fat(to / "esp.img", files)
    esp.disk(to / "disk.img", [esp.Partition(esp.SYSTEM_PARTITION, _SYSTEM, to / "esp.img")])
    return to / "disk.img"
