"""The 1184 bytes of an SEV-SNP attestation report, and AMD's names for what is in them.

Source: AMD 56860 (SEV-SNP Firmware ABI), table "ATTESTATION_REPORT Structure"; all integers little-endian.
This module says what the bytes *mean*; whether they are authentic or acceptable is the verifier's business.
Unknown POLICY or PLATFORM_INFO bits are therefore kept and named ("bit 6"), never refused here: whether they
are welcome is policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from kagimori_protocol import snp_layout
from kagimori_protocol.errors import Malformed

REPORT_SIZE: Final = snp_layout.REPORT_SIZE
SIGNED_SIZE: Final = snp_layout.SIGNED_SIZE
REPORT_DATA_SIZE: Final = snp_layout.REPORT_DATA_SIZE
MEASUREMENT_SIZE: Final = snp_layout.MEASUREMENT_SIZE
CHIP_ID_SIZE: Final = snp_layout.CHIP_ID_SIZE
TURIN_HWID_SIZE: Final = snp_layout.TURIN_HWID_SIZE
FIELDS: Final = snp_layout.FIELDS

VERSIONS: Final = frozenset({2, 3, 4, 5})
SIGNATURE_ALGO_ECDSA_P384_SHA384: Final = 1
VMPL_HOST_REQUESTED: Final = 0xFFFFFFFF
"""VMPL of a report that the host asked for, not the guest."""


_CPUID_FIELDS: Final = ("cpuid_fam_id", "cpuid_mod_id", "cpuid_step")
_MITIGATION_FIELDS: Final = ("launch_mit_vector", "current_mit_vector")

POLICY_BITS: Final[dict[int, str]] = {
    16: "SMT",
    17: "RESERVED_MUST_BE_ONE",
    18: "MIGRATE_MA",
    19: "DEBUG",
    20: "SINGLE_SOCKET",
    21: "CXL_ALLOW",
    22: "MEM_AES_256_XTS",
    23: "RAPL_DIS",
    24: "CIPHERTEXT_HIDING_DRAM",
    25: "PAGE_SWAP_DISABLE",
}
"""AMD 56860, table "Guest Policy Structure"; bits 7:0 are ABI_MINOR, 15:8 ABI_MAJOR."""

PLATFORM_INFO_BITS: Final[dict[int, str]] = {
    0: "SMT_EN",
    1: "TSME_EN",
    2: "ECC_EN",
    3: "RAPL_DIS",
    4: "CIPHERTEXT_HIDING_DRAM_EN",
    5: "ALIAS_CHECK_COMPLETE",
    6: "IOMMU_WRITE_SAFE",
    7: "TIO_EN",
}
"""AMD 56860, table "PLATFORM_INFO"; bit 6 is set on every real Turin report seen, and reserved in older texts."""

_POLICY_FLAGS_START: Final = 16

SIGNING_KEYS: Final[dict[int, str]] = {0: "vcek", 1: "vlek", 7: "none"}
"""KEY_INFO.SIGNING_KEY; 7 means that the report is not signed at all."""


class TcbVersion(NamedTuple):
    """Security version numbers of the firmware parts, in AMD's names; ``fmc`` exists on Turin and later only.

    Compare part by part, never as an integer: a newer microcode does not make up for an older boot loader.
    """

    fmc: int | None
    boot_loader: int
    tee: int
    snp: int
    microcode: int

    @classmethod
    def parse(cls, raw: bytes, *, turin: bool) -> TcbVersion:
        """Read the 8 bytes of a TCB_VERSION; the order of its parts changed with Turin.

        Raises Malformed where a reserved byte is not zero.
        """
        reserved = raw[4:7] if turin else raw[2:6]
        if len(raw) != FIELDS["reported_tcb"].size or any(reserved):
            raise Malformed(
                "A TCB_VERSION has bytes where its reserved part should be.",
                code="report.tcb-layout",
                expected=f"8 bytes, reserved part zero ({'Turin' if turin else 'Milan and Genoa'} order)",
                found=raw.hex(),
            )
        if turin:
            return cls(fmc=raw[0], boot_loader=raw[1], tee=raw[2], snp=raw[3], microcode=raw[7])
        return cls(fmc=None, boot_loader=raw[0], tee=raw[1], snp=raw[6], microcode=raw[7])

    def pack(self) -> bytes:
        """Give the 8 bytes of a TCB_VERSION, the inverse of ``parse``."""
        if self.fmc is None:
            return bytes([self.boot_loader, self.tee, 0, 0, 0, 0, self.snp, self.microcode])
        return bytes([self.fmc, self.boot_loader, self.tee, self.snp, 0, 0, 0, self.microcode])

    def __str__(self) -> str:
        """Give the parts by name, in one line."""
        fmc = "" if self.fmc is None else f"FMC {self.fmc}, "
        parts = f"boot loader {self.boot_loader}, TEE {self.tee}, SNP {self.snp}, microcode {self.microcode}"
        return fmc + parts


def flag_names(value: int, names: dict[int, str]) -> tuple[str, ...]:
    """Name every set bit of ``value``, lowest first; a bit without a name is ``bit N``."""
    return tuple(names.get(bit, f"bit {bit}") for bit in range(value.bit_length()) if value >> bit & 1)


@dataclass(frozen=True, slots=True)
class Report:
    """A parsed ATTESTATION_REPORT, in AMD's field names. Nothing in it has been verified.

    Byte fields have the sizes in ``FIELDS``; TCB fields stay raw until the product line is known, since their
    order depends on it (``Report.tcb``). ``raw`` holds the whole report.
    """

    raw: bytes
    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_fam_id: int
    cpuid_mod_id: int
    cpuid_step: int
    chip_id: bytes
    committed_tcb: bytes
    current_build: int
    current_minor: int
    current_major: int
    committed_build: int
    committed_minor: int
    committed_major: int
    launch_tcb: bytes
    launch_mit_vector: int
    current_mit_vector: int
    signature_r: int
    signature_s: int

    @classmethod
    def parse(cls, raw: bytes) -> Report:
        """Read a report strictly: exact size, known version, every reserved byte zero.

        Raises Malformed, naming the field. Reports of version 2 have no CPUID fields and reports before
        version 5 no mitigation vectors; there those bytes must be zero too.
        """
        if len(raw) != REPORT_SIZE:
            raise Malformed(
                "An attestation report has the wrong size.",
                code="report.size",
                expected=f"{REPORT_SIZE} bytes",
                found=f"{len(raw)} bytes",
            )
        version = int.from_bytes(raw[0:4], "little")
        if version not in VERSIONS:
            raise Malformed(
                "An attestation report is of a version that this release does not know.",
                code="report.version",
                expected=" or ".join(str(known) for known in sorted(VERSIONS)),
                found=str(version),
                todo="See whether a newer release of Kagimori knows it.",
            )
        _require_reserved_zero(raw, version)
        return cls(raw=bytes(raw), **{name: _value(name, raw) for name in FIELDS})  # type: ignore[arg-type]  # the table's names are the fields' names, a test holds that

    @property
    def signed_bytes(self) -> bytes:
        """The part that the signature covers."""
        return self.raw[:SIGNED_SIZE]

    @property
    def signing_key(self) -> str:
        """Which kind of key signed: ``vcek``, ``vlek``, ``none``, or ``reserved N``."""
        number = self.key_info >> 2 & 0b111
        return SIGNING_KEYS.get(number, f"reserved {number}")

    @property
    def author_key_en(self) -> bool:
        """KEY_INFO.AUTHOR_KEY_EN: the ID key was signed by an author key."""
        return bool(self.key_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """KEY_INFO.MASK_CHIP_KEY: the platform signs with no chip key."""
        return bool(self.key_info >> 1 & 1)

    @property
    def policy_flags(self) -> tuple[str, ...]:
        """Names of the guest policy's set bits, without the ABI version."""
        return flag_names(self.policy >> _POLICY_FLAGS_START << _POLICY_FLAGS_START, POLICY_BITS)

    @property
    def policy_abi(self) -> tuple[int, int]:
        """Lowest firmware ABI (major, minor) that the guest's owner accepts."""
        return self.policy >> 8 & 0xFF, self.policy & 0xFF

    @property
    def platform_flags(self) -> tuple[str, ...]:
        """Names of the platform's set bits."""
        return flag_names(self.platform_info, PLATFORM_INFO_BITS)

    def product_line(self) -> str | None:
        """Tell the product line from family and model: ``Milan``, ``Genoa``, ``Turin``, or None where they cannot.

        Version 2 carries no CPUID fields; only Turin's short CHIP_ID shows there. Genoa includes Bergamo and
        Siena.
        """
        if self.version == 2:  # noqa: PLR2004 - the report version, as in the docstring
            turin = any(self.chip_id[:TURIN_HWID_SIZE]) and not any(self.chip_id[TURIN_HWID_SIZE:])
            return "Turin" if turin else None
        for family, first, last, line in _MODELS:
            if self.cpuid_fam_id == family and first <= self.cpuid_mod_id <= last:
                return line
        return None


_MODELS: Final = (
    (0x19, 0x00, 0x0F, "Milan"),
    (0x19, 0x10, 0x1F, "Genoa"),
    (0x19, 0xA0, 0xAF, "Genoa"),
    (0x1A, 0x00, 0x11, "Turin"),
)
"""CPUID family, first and last model, product line. Later parts have no published root yet, so they are unknown."""

_WITH_CPUID: Final = 3
_WITH_MITIGATIONS: Final = 5
_KEY_INFO_KNOWN: Final = 0b11111
"""AUTHOR_KEY_EN, MASK_CHIP_KEY and SIGNING_KEY; the other bits of KEY_INFO must be zero."""


def _value(name: str, raw: bytes) -> int | bytes:
    """Read one field: the integers of the table as integers, everything else as bytes."""
    offset, size = FIELDS[name]
    part = raw[offset : offset + size]
    is_bytes = size > 8 or name.endswith("_tcb")  # noqa: PLR2004 - no integer of the report is longer than 8 bytes
    if is_bytes and not name.startswith("signature_"):
        return bytes(part)
    return int.from_bytes(part, "little")


def _reserved_mask(version: int) -> int:
    """Give, as one big integer, ones over every bit that must be zero in this version."""
    mask = bytearray(b"\xff" * REPORT_SIZE)
    for name, (offset, size) in FIELDS.items():
        absent = (name in _CPUID_FIELDS and version < _WITH_CPUID) or (
            name in _MITIGATION_FIELDS and version < _WITH_MITIGATIONS
        )
        if not absent:
            mask[offset : offset + size] = bytes(size)
    offset, size = FIELDS["key_info"]
    mask[offset : offset + size] = (~_KEY_INFO_KNOWN & 0xFFFFFFFF).to_bytes(size, "little")
    return int.from_bytes(mask, "big")


_RESERVED: Final[dict[int, int]] = {version: _reserved_mask(version) for version in VERSIONS}


def _require_reserved_zero(raw: bytes, version: int) -> None:
    """Refuse a report with a set bit where the specification says "must be zero"."""
    wrong = int.from_bytes(raw, "big") & _RESERVED[version]
    if not wrong:
        return
    offset = REPORT_SIZE - (wrong.bit_length() + 7) // 8
    raise Malformed(
        "An attestation report has bytes set in a part that must be zero.",
        code="report.reserved",
        expected="zero",
        found=f"0x{raw[offset]:02x} at offset 0x{offset:03x}",
    )
