"""Measured boots of the three ways that Kagimori knows, built from parts: firmware, loader, kernel, initramfs, command line.

What is hashed for each event, with which encoding and which NULs, follows real logs (FORMATS section 8). Changing one part
changes exactly the PCRs that it changes on a real machine; a PCR that no part measures into stays zero.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, field
from typing import Final

from kagimori_simulator import pe
from kagimori_simulator.event_log import Event, EventType, MeasuredBoot, same

__all__ = [
    "CMDLINE",
    "Disk",
    "Firmware",
    "GrubLoader",
    "MeasuredBoot",
    "SecureBoot",
    "Shim",
    "Uki",
    "direct",
    "grub",
    "uki",
]

EFI_GLOBAL_VARIABLE: Final = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
EFI_IMAGE_SECURITY_DATABASE: Final = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SHIM_LOCK: Final = uuid.UUID("605dab50-e046-4300-abb6-3dd810dd8b23")
EFI_CERT_X509: Final = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
LINUX_PARTITION: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

LOAD_OPTIONS_TAG: Final = 0x8F3B22ED
INITRD_TAG: Final = 0x8F3B22EC

UKI_MEASURED_SECTIONS: Final = (".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat", ".pcrpkey")
"""Sections that systemd-stub measures into PCR 11, in its order, whatever the file's order is."""

_FIRMWARE_SEPARATOR_PCRS: Final = (0, 1, 2, 3, 4, 5, 6)
_SEPARATOR: Final = bytes(4)
_KERNEL: Final = pe.image({".text": b"a kernel"})
_INITRAMFS: Final = b"an initramfs"
CMDLINE: Final = (
    "root=/dev/mapper/cryptroot ro rd.shell=0 rd.emergency=poweroff panic=-1 noresume "
    "systemd.import_credentials=no systemd.gpt_auto=0 console=ttyS0"
)
"""One that leaves no door open."""

_DISK_GUID: Final = uuid.UUID("6b616769-6d6f-7269-8000-000000000001")
_PARTITION_GUIDS: Final = (
    uuid.UUID("6b616769-6d6f-7269-8000-000000000002"),
    uuid.UUID("6b616769-6d6f-7269-8000-000000000003"),
)


@dataclass(frozen=True)
class Firmware:
    """Firmware as OVMF measures itself: version, volumes, ACPI tables, boot entries."""

    version: str = "simulated 2026.11"
    volumes: tuple[tuple[int, bytes], ...] = ((0x820000, b"PEI volume"), (0x900000, b"DXE volume"))
    acpi_tables: tuple[bytes, ...] = (b"DSDT", b"FACP")
    boot_entries: tuple[bytes, ...] = (b"\x01\x00\x00\x00Linux",)
    startup_locality: int | None = None


@dataclass(frozen=True)
class SecureBoot:
    """Secure Boot variables. ``authority`` is the certificate in ``db`` that vouched for the first image."""

    enabled: bool = True
    pk: bytes = b"PK certificate"
    kek: bytes = b"KEK certificate"
    db: bytes = b"db certificate"
    dbx: bytes = b"dbx hashes"
    authority: bytes = b"db certificate"


@dataclass(frozen=True)
class Disk:
    """The boot disk's partition table, as far as firmware measures it."""

    guid: uuid.UUID = _DISK_GUID
    partitions: tuple[uuid.UUID, ...] = _PARTITION_GUIDS


@dataclass(frozen=True)
class Shim:
    """Shim, with the owner's keys that it keeps: MokList, MokListX, MokListTrusted and the vendor's certificate."""

    image: bytes = field(default=pe.image({".text": b"shim"}), repr=False)
    mok_list: bytes = b"MokList entries"
    mok_list_x: bytes = b"MokListX entries"
    mok_list_trusted: bytes = b"\x01"
    sbat_level: bytes = b"sbat,1,2021030218\n"
    vendor_certificate: bytes = b"vendor certificate"


@dataclass(frozen=True)
class GrubLoader:
    """GRUB: its image, its configuration, and the commands that the configuration runs before ``linux``."""

    image: bytes = field(default=pe.image({".text": b"grub"}), repr=False)
    config: bytes = b"menuentry 'Linux' { linux /vmlinuz ; initrd /initrd.img }\n"
    config_path: str = "(hd0,gpt2)/grub/grub.cfg"
    commands: tuple[str, ...] = ("set default=0", "insmod part_gpt", "setparams Linux")
    kernel_path: str = "/vmlinuz"
    initramfs_path: str = "/initrd.img"


@dataclass(frozen=True)
class Uki:
    """A unified kernel image with systemd-stub; ``image`` is the file."""

    linux: bytes = field(default=_KERNEL, repr=False)
    initrd: bytes = field(default=_INITRAMFS, repr=False)
    cmdline: str = CMDLINE
    osrel: bytes = b"ID=simulated\n"
    uname: str = "6.12.0-simulated"
    sbat: bytes = b"sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n"
    pcrpkey: bytes | None = None

    @property
    def sections(self) -> dict[str, bytes]:
        """Give the sections of the file by name, in systemd-stub's order."""
        contents = {
            ".linux": self.linux,
            ".osrel": self.osrel,
            ".cmdline": self.cmdline.encode(),
            ".initrd": self.initrd,
            ".uname": self.uname.encode(),
            ".sbat": self.sbat,
            ".pcrpkey": self.pcrpkey,
        }
        return {name: content for name in UKI_MEASURED_SECTIONS if (content := contents[name]) is not None}

    @property
    def image(self) -> bytes:
        """Give the whole file."""
        return pe.image({".text": b"systemd-stub"} | self.sections)


def grub(  # noqa: PLR0913 - one argument per part of a boot, by name only
    *,
    firmware: Firmware = Firmware(),
    secure_boot: SecureBoot = SecureBoot(),
    disk: Disk = Disk(),
    shim: Shim | None = Shim(),
    loader: GrubLoader = GrubLoader(),
    kernel: bytes = _KERNEL,
    initramfs: bytes = _INITRAMFS,
    cmdline: str = CMDLINE,
) -> MeasuredBoot:
    """Boot through GRUB, with shim in front of it unless None.

    PCR 4: shim, GRUB, and with Secure Boot the kernel, which shim verifies; 8: every command and the kernel's command line;
    9: every file that GRUB reads, then what the kernel's EFI stub measures; 14: shim's MokLists.
    """
    events = [*_firmware_events(firmware, secure_boot), _gpt(disk), *_authority(secure_boot)]
    if shim is None:
        events.append(_application(loader.image, "\\EFI\\BOOT\\BOOTX64.EFI"))
    else:
        events.append(_application(shim.image, "\\EFI\\debian\\shimx64.efi"))
        events += _shim_events(shim, secure_boot)
        events.append(_application(loader.image, "\\EFI\\debian\\grubx64.efi"))
    events.append(_grub_file(loader.config_path, loader.config))
    events += [_grub_text("grub_cmd", command) for command in loader.commands]
    kernel_line = f"{loader.kernel_path} {cmdline}"
    events.append(_grub_text("grub_cmd", f"linux {kernel_line}"))
    events.append(_grub_file(loader.kernel_path, kernel))
    if shim is not None and secure_boot.enabled:
        events.append(_application(kernel, ""))
    events.append(_grub_text("kernel_cmdline", kernel_line))
    events.append(_grub_text("grub_cmd", f"initrd {loader.initramfs_path}"))
    events.append(_grub_file(loader.initramfs_path, initramfs))
    # GRUB hands over the command line without its NUL (seen in a real Ubuntu 24.04 log).
    events += _efi_stub_events(f"BOOT_IMAGE={kernel_line}".encode("utf-16-le"), initramfs)
    return MeasuredBoot("grub", (*events, *_exit_boot_services()), firmware.startup_locality)


def uki(
    *,
    firmware: Firmware = Firmware(),
    secure_boot: SecureBoot = SecureBoot(),
    disk: Disk = Disk(),
    image: Uki = Uki(),
    load_options: str | None = None,
) -> MeasuredBoot:
    """Boot a unified kernel image straight from the firmware.

    PCR 4: the UKI, then the kernel inside it; 9: what the kernel's EFI stub measures; 11: each section's name and content; 12
    only where the image is given ``load_options``, 13 never (no system extensions), so both are zero by default.
    """
    events = [*_firmware_events(firmware, secure_boot), _gpt(disk), *_authority(secure_boot)]
    events.append(_application(image.image, "\\EFI\\Linux\\linux.efi"))
    for name, content in image.sections.items():
        described = _utf16(name)
        events.append(Event(11, EventType.IPL, described, name.encode() + b"\x00"))
        events.append(Event(11, EventType.IPL, described, content))
    cmdline = image.cmdline
    if load_options is not None:
        # With Secure Boot the stub measures what it is given, and goes on with its own command line.
        events.append(same(12, EventType.IPL, _utf16(load_options)))
        cmdline = image.cmdline if secure_boot.enabled else load_options
    events.append(_application(image.linux, ""))
    events += _efi_stub_events(_utf16(cmdline), image.initrd)
    return MeasuredBoot("uki", (*events, *_exit_boot_services()), firmware.startup_locality)


def direct(
    *,
    firmware: Firmware = Firmware(),
    secure_boot: SecureBoot = SecureBoot(enabled=False),
    kernel: bytes = _KERNEL,
    initramfs: bytes = _INITRAMFS,
    cmdline: str = CMDLINE,
) -> MeasuredBoot:
    """Let QEMU hand kernel, initramfs and command line to OVMF (``-kernel``).

    PCR 4: the kernel; 9: load options with QEMU's own `` initrd=initrd`` at the end, and the initramfs.
    """
    events = [*_firmware_events(firmware, secure_boot), *_authority(secure_boot), _application(kernel, "")]
    events += _efi_stub_events(_utf16(f"{cmdline} initrd=initrd"), initramfs)
    return MeasuredBoot("direct", (*events, *_exit_boot_services()), firmware.startup_locality)


def _firmware_events(firmware: Firmware, secure_boot: SecureBoot) -> list[Event]:
    """Everything that OVMF measures before it starts a boot option."""
    events = [same(0, EventType.S_CRTM_VERSION, _utf16(firmware.version))]
    for base, content in firmware.volumes:
        place = struct.pack("<QQ", base, len(content))
        events.append(Event(0, EventType.EFI_PLATFORM_FIRMWARE_BLOB, place, content))
    for name, vendor, value in (
        ("SecureBoot", EFI_GLOBAL_VARIABLE, bytes([secure_boot.enabled])),
        ("PK", EFI_GLOBAL_VARIABLE, _signature_list(secure_boot.pk)),
        ("KEK", EFI_GLOBAL_VARIABLE, _signature_list(secure_boot.kek)),
        ("db", EFI_IMAGE_SECURITY_DATABASE, _signature_list(secure_boot.db)),
        ("dbx", EFI_IMAGE_SECURITY_DATABASE, _signature_list(secure_boot.dbx)),
    ):
        events.append(same(7, EventType.EFI_VARIABLE_DRIVER_CONFIG, _variable(name, vendor, value)))
    events.append(same(7, EventType.SEPARATOR, _SEPARATOR))
    events += [
        Event(1, EventType.PLATFORM_CONFIG_FLAGS, b"ACPI DATA", table) for table in firmware.acpi_tables
    ]
    order = b"".join(struct.pack("<H", number) for number in range(len(firmware.boot_entries)))
    variables = [
        ("BootOrder", order),
        *((f"Boot{n:04X}", entry) for n, entry in enumerate(firmware.boot_entries)),
    ]
    for name, value in variables:
        # The log holds the whole variable, the digest only its value (95 of 133 real events).
        events.append(
            Event(1, EventType.EFI_VARIABLE_BOOT, _variable(name, EFI_GLOBAL_VARIABLE, value), value)
        )
    events.append(same(4, EventType.EFI_ACTION, b"Calling EFI Application from Boot Option"))
    events += [same(pcr, EventType.SEPARATOR, _SEPARATOR) for pcr in _FIRMWARE_SEPARATOR_PCRS]
    return events


def _authority(secure_boot: SecureBoot) -> list[Event]:
    """Give what firmware measures once, when an entry of ``db`` has vouched for an image."""
    if not secure_boot.enabled:
        return []
    vouched = uuid.UUID(int=0).bytes_le + secure_boot.authority
    return [same(7, EventType.EFI_VARIABLE_AUTHORITY, _variable("db", EFI_IMAGE_SECURITY_DATABASE, vouched))]


def _shim_events(shim: Shim, secure_boot: SecureBoot) -> list[Event]:
    """MokLists into PCR 14 (digest over the content, the log shows only a name), the rest into PCR 7."""
    events = [
        Event(14, EventType.IPL, b"MokList\x00", shim.mok_list),
        Event(14, EventType.IPL, b"MokListX\x00", shim.mok_list_x),
        same(7, EventType.EFI_VARIABLE_AUTHORITY, _variable("SbatLevel", SHIM_LOCK, shim.sbat_level)),
        Event(14, EventType.IPL, b"MokListTrusted\x00", shim.mok_list_trusted),
    ]
    if secure_boot.enabled:
        vendor = _variable("Shim", SHIM_LOCK, shim.vendor_certificate)
        events.append(same(7, EventType.EFI_VARIABLE_AUTHORITY, vendor))
    return events


def _efi_stub_events(load_options: bytes, initramfs: bytes) -> list[Event]:
    """Give what the kernel's EFI stub measures; a tag only names it, the digest is over the bytes themselves."""
    return [
        Event(
            9, EventType.EVENT_TAG, _tagged(LOAD_OPTIONS_TAG, b"LOADED_IMAGE::LoadOptions\x00"), load_options
        ),
        Event(9, EventType.EVENT_TAG, _tagged(INITRD_TAG, b"Linux initrd\x00"), initramfs),
    ]


def _exit_boot_services() -> tuple[Event, ...]:
    return (
        same(5, EventType.EFI_ACTION, b"Exit Boot Services Invocation"),
        same(5, EventType.EFI_ACTION, b"Exit Boot Services Returned with Success"),
    )


def _grub_text(prefix: str, text: str) -> Event:
    """Measure a command or command line into PCR 8: the digest covers neither prefix nor NUL."""
    return Event(8, EventType.IPL, f"{prefix}: {text}".encode() + b"\x00", text.encode())


def _grub_file(path: str, content: bytes) -> Event:
    return Event(9, EventType.IPL, path.encode() + b"\x00", content)


def _application(image: bytes, path: str) -> Event:
    """UEFI_IMAGE_LOAD_EVENT; the digest is the image's Authenticode hash."""
    device_path = b"".join(
        [
            struct.pack("<BBH", 4, 4, 4 + len(_utf16(path))) + _utf16(path) if path else b"",
            b"\x7f\xff\x04\x00",
        ]
    )
    data = struct.pack("<QQQQ", 0x7E000000, len(image), 0, len(device_path)) + device_path
    return Event(4, EventType.EFI_BOOT_SERVICES_APPLICATION, data, pe.authenticode_input(image))


def _gpt(disk: Disk) -> Event:
    """UEFI_GPT_DATA: the GPT header and the partitions that are in use."""
    last = 0x13FFFFF
    header = struct.pack("<8sIIII", b"EFI PART", 0x10000, 92, 0, 0)
    header += (
        struct.pack("<QQQQ", 1, last, 34, last - 33)
        + disk.guid.bytes_le
        + struct.pack("<QIII", 2, 128, 128, 0)
    )
    entries = b""
    for number, partition in enumerate(disk.partitions):
        first = 2048 + number * 0x100000
        place = struct.pack("<QQQ", first, first + 0xFFFFF, 0)
        entries += LINUX_PARTITION.bytes_le + partition.bytes_le + place + bytes(72)
    return same(5, EventType.EFI_GPT_EVENT, header + struct.pack("<Q", len(disk.partitions)) + entries)


def _variable(name: str, vendor: uuid.UUID, value: bytes) -> bytes:
    """UEFI_VARIABLE_DATA: the name in UTF-16 without a NUL, as OVMF writes it."""
    encoded = name.encode("utf-16-le")
    return vendor.bytes_le + struct.pack("<QQ", len(name), len(value)) + encoded + value


def _signature_list(certificate: bytes) -> bytes:
    """EFI_SIGNATURE_LIST with one entry; nothing at all for an absent variable."""
    if not certificate:
        return b""
    entry = uuid.UUID(int=0).bytes_le + certificate
    return EFI_CERT_X509.bytes_le + struct.pack("<III", 28 + len(entry), 0, len(entry)) + entry


def _tagged(tag: int, text: bytes) -> bytes:
    """TCG_PCClientTaggedEvent."""
    return struct.pack("<II", tag, len(text)) + text


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le") + b"\x00\x00"
