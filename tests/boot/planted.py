"""What a host can plant: disks that carry the names a boot looks for, and words that no PCR covers.

Sources: Linux, kernel/power/swap.c (struct swsusp_header) and mm/swapfile.c; the discoverable partitions' types of systemd's
UAPI group; systemd-system-credentials(7).
"""

from __future__ import annotations

import shutil
import struct
import uuid
from pathlib import Path
from typing import Final

from tests.boot import esp, images
from tests.boot.images import Images
from tests.boot.machine import Disk

LABEL: Final = "kagimori-root"
SWAP: Final = uuid.UUID("6b616769-6d6f-7269-8000-0000000000c0")
"""The UUID of every swap here."""

CREDENTIAL: Final = "kagimori.planted"
CREDENTIALS: Final = (
    *("-smbios", f"type=11,value=io.systemd.credential:{CREDENTIAL}.smbios=mallory"),
    *("-fw_cfg", f"name=opt/io.systemd.credentials/{CREDENTIAL}.fw_cfg,string=mallory"),
)
"""QEMU's words for one in SMBIOS, and one in fw_cfg."""

_ROOT_TYPE: Final = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
_SWAP_TYPE: Final = uuid.UUID("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f")
_SERVED_TYPE: Final = uuid.UUID("3b8f8425-20e0-4f3b-907f-1a25a76f98e8")
_PAGE: Final = 4096
_SIGNATURE: Final = b"SWAPSPACE2"
_SWAP_SIZE: Final = 16 << 20
_INIT: Final = "#!/bin/sh\necho 'planted: this root is the host'\\''s'\nexec /bin/poweroff -f\n"


def root(directory: Path, built: Images) -> Disk:
    """Make a plain disk with a system of the host's, under the label that the boot may look for."""
    image = directory / "planted-root.img"
    init = directory / "planted-init"
    init.write_text(_INIT, encoding="utf-8")
    tree = directory / "planted-tree"
    images.small_system(tree, built.chroot, init)
    images.make_ext4(tree, image, "24M", LABEL)
    shutil.rmtree(tree)
    return Disk(image, "planted")


def swap(directory: Path, *, hibernated: bool) -> Disk:
    """Make a plain swap; ``hibernated`` has the mark of a system that sleeps in it, which whoever resumes takes over."""
    image = directory / ("hibernated.img" if hibernated else "swap.img")
    head = bytearray(_PAGE)
    head[1024:1052] = struct.pack("<III16s", 1, _SWAP_SIZE // _PAGE - 1, 0, SWAP.bytes)
    head[-len(_SIGNATURE) :] = _SIGNATURE
    if hibernated:
        head[-2 * len(_SIGNATURE) : -len(_SIGNATURE)] = _SIGNATURE
        head[-len(_SIGNATURE) :] = b"S1SUSPEND\0"
    with image.open("wb") as file:
        file.write(head)
        file.truncate(_SWAP_SIZE)
    return Disk(image, "hibernated" if hibernated else "swap")


def partitions(directory: Path, plain_root: Disk, plain_swap: Disk) -> Disk:
    """Make a disk whose partitions say by their types that they are root, /srv and swap."""
    image = directory / "typed.img"
    esp.disk(
        image,
        [
            esp.Partition(kind, uuid.uuid5(SWAP, str(kind)), content.path)
            for kind, content in (
                (_ROOT_TYPE, plain_root),
                (_SERVED_TYPE, plain_root),
                (_SWAP_TYPE, plain_swap),
            )
        ],
    )
    return Disk(image, "typed")
