"""What no recording on other machines shows: what only hardware loads, and what the programs beside Python open.

One entry for each door of ``devices.DEVICES``, checked by a test, and the disk's and the network's beside them.
Import budget: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Need = Literal["required", "wanted", "hardware"]


@dataclass(frozen=True, slots=True)
class Driver:
    """One job in the kernel and the modules that do it, each under the name that some release has for it.

    ``required``: without it the initramfs is not built. ``wanted``: without it the agent may fail at boot, which the
    hook says. ``hardware``: only some machines have what it drives, so some kernels leave it out.
    """

    names: tuple[str, ...]
    need: Need
    purpose: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What one part of the boot needs: ``libraries`` that are opened by name, each with its purpose, and drivers."""

    libraries: tuple[tuple[str, str], ...] = ()
    drivers: tuple[Driver, ...] = ()


_GUEST_DRIVER: Final = Driver(("sev_guest",), "wanted", "the SNP guest driver (Linux 5.19, CONFIG_SEV_GUEST)")

DEVICES: Final[dict[str, Needs]] = {
    "configfs-tsm": Needs(
        drivers=(
            Driver(("configfs",), "required", "the file system that the report door lies in"),
            # Linux 6.7 to 6.15 call it tsm, later ones tsm_report (drivers/virt/coco).
            Driver(("tsm", "tsm_report"), "wanted", "the report door (Linux 6.7, CONFIG_TSM_REPORTS)"),
            _GUEST_DRIVER,
        )
    ),
    "sev-guest": Needs(drivers=(_GUEST_DRIVER,)),
    "vtpm": Needs(
        libraries=(("libtss2-tcti-device.so.0", "the TPM library opens a kernel's TPM through it"),),
        drivers=(
            Driver(("tpm_svsm",), "wanted", "the SVSM's vTPM (Linux 6.16, CONFIG_TCG_SVSM)"),
            Driver(("tpm_crb",), "hardware", "a TPM with a command response buffer, to be capped, too"),
            Driver(("tpm_tis",), "hardware", "a TPM with a FIFO, to be capped, too"),
        ),
    ),
}
"""By the names of ``devices.DEVICES``."""

BOOT: Final = Needs(
    drivers=(
        Driver(("efivarfs",), "wanted", "the firmware's variables, one of which is a second command line"),
    )
)

DISK: Final = Needs(
    # glibc opens it where a thread ends or is cancelled (pthread_exit), as in cryptsetup's Argon2 and in Python.
    libraries=(("libgcc_s.so.1", "threads end through it"),),
    drivers=(
        Driver(("dm_mod",), "required", "device-mapper"),
        Driver(("dm_crypt",), "required", "the mapping of an encrypted volume"),
        # For a volume that its owner formatted with integrity alone, so that a kernel may be without them.
        Driver(("dm_integrity",), "hardware", "volumes with integrity protection"),
        Driver(("authenc",), "hardware", "cipher and MAC of the same volumes, in one"),
        Driver(("hmac",), "hardware", "their MAC"),
        # Linux has SHA-256 as sha256_generic until it moved into the crypto library.
        Driver(("sha256_generic", "sha256"), "hardware", "their MAC's hash"),
        Driver(("sha256_ssse3",), "hardware", "SHA-256 by the processor's own instructions"),
        Driver(("xts",), "required", "the mode of LUKS2 volumes, aes-xts"),
        Driver(("ecb",), "hardware", "what xts is made of, where no driver has it in one piece"),
        # Linux has AES as aes_generic until it moved into the crypto library.
        Driver(("aes_generic", "libaes", "aes"), "required", "AES"),
        Driver(("aesni_intel",), "hardware", "AES by the processor's own instructions"),
        Driver(("virtio_blk",), "hardware", "disks of virtio"),
        Driver(("virtio_scsi",), "hardware", "disks of virtio, by SCSI"),
        Driver(("sd_mod",), "hardware", "disks by SCSI"),
        Driver(("nvme",), "hardware", "disks of NVMe"),
        Driver(("hv_storvsc",), "hardware", "disks of Hyper-V"),
    ),
)

NETWORK: Final = Needs(
    drivers=(
        Driver(("af_packet",), "required", "DHCP, before there is an address"),
        Driver(("virtio_pci",), "hardware", "the bus of virtio"),
        Driver(("virtio_net",), "hardware", "network of virtio"),
        Driver(("gve",), "hardware", "network of Google's cloud"),
        Driver(("ena",), "hardware", "network of Amazon's cloud"),
        Driver(("hv_netvsc",), "hardware", "network of Hyper-V"),
        Driver(("mana",), "hardware", "network of Azure"),
    )
)

CODECS: Final = ("encodings.ascii", "encodings.latin_1", "encodings.unicode_escape")
"""Codecs that our sources name, beside those that any start of Python loads: Python looks a codec up at its first use,
which may be on a path that no recording takes, such as the mapping of a real volume. A test reads them off the sources."""

PARTS: Final = (*DEVICES.values(), BOOT, DISK, NETWORK)
