"""A machine with SEV-SNP: firmware that makes and signs attestation reports, and a host that hands out certificates.

Source: AMD 56860, tables "ATTESTATION_REPORT Structure" and "MSG_REPORT_REQ"; 56421 (GHCB) section 4.1.8.1. Every field of
a report can be set: most as attributes of ``SnpMachine``, any by ``overrides`` (named lies are in ``faults``).
"""

from __future__ import annotations

import secrets
import ssl
import struct
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import HardwareError, UsageError
from kagimori_protocol.snp import (
    CHIP_ID_SIZE,
    FIELDS,
    MEASUREMENT_SIZE,
    REPORT_DATA_SIZE,
    REPORT_SIZE,
    SIGNATURE_ALGO_ECDSA_P384_SHA384,
    SIGNED_SIZE,
    SIGNING_KEYS,
    TURIN_HWID_SIZE,
    VERSIONS,
    TcbVersion,
)
from kagimori_simulator.amd import DEFAULT_CSP_ID, PRODUCTS, Vek

if TYPE_CHECKING:
    from kagimori_simulator.amd import AmdRoot

GUEST_VMPL_UNDER_SVSM: Final = 2
"""COCONUT runs the guest's firmware and kernel at VMPL 2, itself at 0."""

HIGHEST_VMPL: Final = 3
DEFAULT_POLICY: Final = 0x30000
"""SMT allowed, the must-be-one bit, ABI 0.0 and nothing else."""
DEFAULT_PLATFORM_INFO: Final = 0x25
"""SMT_EN, ECC_EN, ALIAS_CHECK_COMPLETE."""
DEFAULT_MEASUREMENT: Final = b"\x5a" * MEASUREMENT_SIZE

PADDED_TABLE_SIZE: Final = 0x4000
"""SEV_FW_BLOB_MAX_SIZE, the size that current COCONUT returns whatever the certificates take."""

_CPUID: Final = {"Milan": (0x19, 0x01, 0x01), "Genoa": (0x19, 0x11, 0x01), "Turin": (0x1A, 0x02, 0x01)}
_FIRMWARE: Final = (1, 55, 40)
_TCB: Final = {
    "Milan": TcbVersion(fmc=None, boot_loader=4, tee=0, snp=24, microcode=219),
    "Genoa": TcbVersion(fmc=None, boot_loader=10, tee=0, snp=23, microcode=84),
    "Turin": TcbVersion(fmc=1, boot_loader=1, tee=1, snp=4, microcode=71),
}
_FIRST_WITH_CPUID: Final = 3
_FIRST_WITH_MITIGATIONS: Final = 5
_SIGNING_KEY_NUMBERS: Final = {name: number for number, name in SIGNING_KEYS.items()}
_SIGNATURE_PART: Final = 72
_STATUS_INVALID_PARAM: Final = 0x16


@dataclass(kw_only=True)
class _Launch:
    """What is fixed by how the guest was launched (SNP_LAUNCH_START to SNP_LAUNCH_FINISH)."""

    measurement: bytes = DEFAULT_MEASUREMENT
    policy: int = DEFAULT_POLICY
    host_data: bytes = bytes(32)
    guest_svn: int = 0
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)


@dataclass(kw_only=True)
class _Platform:
    """What is true of the machine. TCBs are the raw 8 bytes, in the product's order; None takes a current one."""

    product: str = ""
    chip_id: bytes = b""
    reported_tcb: bytes = b""
    current_tcb: bytes = b""
    committed_tcb: bytes = b""
    launch_tcb: bytes = b""
    platform_info: int = DEFAULT_PLATFORM_INFO
    report_version: int = 5
    cpuid: tuple[int, int, int] | None = None
    firmware: tuple[int, int, int] = _FIRMWARE
    launch_mit_vector: int = 0
    current_mit_vector: int = 0


@dataclass
class SnpMachine(_Launch, _Platform):
    """One SNP machine that runs one guest.

    ``root``: whose keys sign; ``product`` defaults to the root's. ``signer``: ``vcek``, ``vlek`` or ``none`` (the firmware
    then leaves the signature empty). ``svsm``: the guest kernel runs at VMPL 2 below an SVSM instead of at VMPL 0.
    ``overrides``: fields (names of ``kagimori_protocol.snp.FIELDS``) to set to anything before signing. ``impostor``: signs instead of the machine's own key. ``certificates``:
    what the host hands out, GUID to payload; None means the chain that belongs to the signer. ``certificate_format``:
    ``der`` or ``pem``; ``pad_certificates``: zeros up to 16 KiB.
    """

    root: AmdRoot
    signer: str = field(default="vcek", kw_only=True)
    csp_id: str = field(default=DEFAULT_CSP_ID, kw_only=True)
    svsm: bool = field(default=False, kw_only=True)
    overrides: dict[str, int | bytes] = field(default_factory=dict, kw_only=True)
    impostor: Vek | None = field(default=None, kw_only=True, repr=False)
    certificates: dict[uuid.UUID, bytes] | None = field(default=None, kw_only=True)
    certificate_format: str = field(default="der", kw_only=True)
    pad_certificates: bool = field(default=False, kw_only=True)
    report_id: bytes = field(init=False)
    _veks: dict[tuple[str, bytes, bytes, str], Vek] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Fill in what was not given, and boot. Raises UsageError for a value that no machine could have."""
        self.product = self.product or self.root.product
        _require("product", self.product, PRODUCTS)
        _require("report_version", self.report_version, VERSIONS)
        _require("signer", self.signer, _SIGNING_KEY_NUMBERS)
        _require("certificate_format", self.certificate_format, ("der", "pem"))
        hwid_size = TURIN_HWID_SIZE if self.product == "Turin" else CHIP_ID_SIZE
        self.chip_id = self.chip_id or secrets.token_bytes(hwid_size).ljust(CHIP_ID_SIZE, b"\x00")
        self.cpuid = self.cpuid or _CPUID[self.product]
        self.reported_tcb = self.reported_tcb or _TCB[self.product].pack()
        self.current_tcb = self.current_tcb or self.reported_tcb
        self.committed_tcb = self.committed_tcb or self.reported_tcb
        self.launch_tcb = self.launch_tcb or self.current_tcb
        self.reboot()

    def reboot(self) -> None:
        """Launch the guest again: the firmware draws a new REPORT_ID."""
        self.report_id = secrets.token_bytes(FIELDS["report_id"].size)

    @property
    def guest_vmpl(self) -> int:
        """The level that the guest kernel runs at, and whose key (VMPCK) it therefore holds."""
        return GUEST_VMPL_UNDER_SVSM if self.svsm else 0

    def report(self, report_data: bytes, vmpl: int, *, vmpck: int = 0) -> bytes:
        """Make and sign a report (1184 bytes) for who holds ``vmpck``, the key of the level that it runs at.

        As in hardware, a level can ask for reports of its own level and of weaker ones only. Raises HardwareError with the
        firmware's status.
        """
        if len(report_data) != REPORT_DATA_SIZE or not vmpck <= vmpl <= HIGHEST_VMPL:
            raise HardwareError(
                "The firmware refused a report request.",
                code="simulator.firmware-status",
                expected=f"{REPORT_DATA_SIZE} bytes of REPORT_DATA and a VMPL from {vmpck} to {HIGHEST_VMPL}",
                found=f"{len(report_data)} bytes, VMPL {vmpl}: status 0x{_STATUS_INVALID_PARAM:02x} (INVALID_PARAM)",
            )
        values = self._fields(report_data, vmpl) | self.overrides
        body = _pack(values)[:SIGNED_SIZE]
        vek = self.impostor or self.vek()
        r, s = vek.sign(body) if vek else (0, 0)
        signature = r.to_bytes(_SIGNATURE_PART, "little") + s.to_bytes(_SIGNATURE_PART, "little")
        return (body + signature).ljust(REPORT_SIZE, b"\x00")

    def vek(self) -> Vek | None:
        """Give the key that signs reports now, or None where none does. Its certificate is fetched once, as hosts do."""
        wanted = (self.signer, self.chip_id, self.reported_tcb, self.csp_id)
        if self.signer != "none" and wanted not in self._veks:
            vlek = self.signer == "vlek"
            self._veks[wanted] = (
                self.root.vlek(self.reported_tcb, self.csp_id)
                if vlek
                else self.root.vcek(self.chip_id, self.reported_tcb)
            )
        return self._veks.get(wanted)

    def certificate_table(self) -> bytes:
        """Give the host's table of certificates; empty where there is none."""
        payloads = self.chain() if self.certificates is None else self.certificates
        table = pack_certificate_table(payloads) if payloads else b""
        return table.ljust(PADDED_TABLE_SIZE, b"\x00") if self.pad_certificates and table else table

    def chain(self) -> dict[uuid.UUID, bytes]:
        """Give the certificates that belong to the signer, in ``certificate_format``, by their GUIDs."""
        vek = self.vek()
        if vek is None:
            return {}
        vlek = self.signer == "vlek"
        chain = {
            certificate_table.VLEK if vlek else certificate_table.VCEK: vek.certificate_der,
            certificate_table.ASK: self.root.asvk_der if vlek else self.root.ask_der,
            certificate_table.ARK: self.root.ark_der,
        }
        if self.certificate_format == "pem":
            return {guid: ssl.DER_cert_to_PEM_cert(der).encode() for guid, der in chain.items()}
        return chain

    def _fields(self, report_data: bytes, vmpl: int) -> dict[str, int | bytes]:
        """Collect what this machine's firmware writes into a report of this version."""
        build, minor, major = reversed(self.firmware)
        values: dict[str, int | bytes] = {
            "version": self.report_version,
            "guest_svn": self.guest_svn,
            "policy": self.policy,
            "family_id": self.family_id,
            "image_id": self.image_id,
            "vmpl": vmpl,
            "signature_algo": SIGNATURE_ALGO_ECDSA_P384_SHA384,
            "current_tcb": self.current_tcb,
            "platform_info": self.platform_info,
            "key_info": _SIGNING_KEY_NUMBERS[self.signer] << 2 | any(self.author_key_digest),
            "report_data": report_data,
            "measurement": self.measurement,
            "host_data": self.host_data,
            "id_key_digest": self.id_key_digest,
            "author_key_digest": self.author_key_digest,
            "report_id": self.report_id,
            "report_id_ma": b"\xff" * FIELDS["report_id_ma"].size,
            "reported_tcb": self.reported_tcb,
            "chip_id": bytes(CHIP_ID_SIZE) if self.signer == "vlek" else self.chip_id,
            "committed_tcb": self.committed_tcb,
            "current_build": build,
            "current_minor": minor,
            "current_major": major,
            "committed_build": build,
            "committed_minor": minor,
            "committed_major": major,
            "launch_tcb": self.launch_tcb,
        }
        if self.report_version >= _FIRST_WITH_CPUID:
            values |= zip(("cpuid_fam_id", "cpuid_mod_id", "cpuid_step"), self.cpuid or (), strict=True)
        if self.report_version >= _FIRST_WITH_MITIGATIONS:
            values |= {
                "launch_mit_vector": self.launch_mit_vector,
                "current_mit_vector": self.current_mit_vector,
            }
        return values


def pack_certificate_table(payloads: Mapping[uuid.UUID, bytes]) -> bytes:
    """Build a GHCB certificate table: GUIDs in RFC 4122 byte order, offsets from the table's start."""
    at = (len(payloads) + 1) * certificate_table.ENTRY_SIZE
    rows = []
    for guid, payload in payloads.items():
        rows.append(guid.bytes + struct.pack("<II", at, len(payload)))
        at += len(payload)
    return b"".join([*rows, bytes(certificate_table.ENTRY_SIZE), *payloads.values()])


def certificate_extent(table: bytes) -> int:
    """Tell how many bytes of a table its entries reach; Linux cuts a plain report's table there."""
    reach = 0
    for at in range(0, len(table) - certificate_table.ENTRY_SIZE + 1, certificate_table.ENTRY_SIZE):
        row = table[at : at + certificate_table.ENTRY_SIZE]
        if not any(row):
            break
        reach = max(reach, sum(struct.unpack_from("<II", row, 16)))
    return reach


def _pack(values: Mapping[str, int | bytes]) -> bytes:
    """Write fields to where they lie. Raises UsageError for an unknown field or a value of the wrong size."""
    raw = bytearray(REPORT_SIZE)
    for name, value in values.items():
        place = FIELDS.get(name)
        if place is None:
            raise UsageError("A report has no such field.", expected=", ".join(FIELDS), found=name)
        try:
            content = value.to_bytes(place.size, "little") if isinstance(value, int) else value
        except OverflowError:
            content = b""
        if len(content) != place.size:
            raise UsageError(
                f"A value does not fit the report's field {name}.",
                expected=f"{place.size} bytes",
                found=repr(value),
            )
        raw[place.offset : place.offset + place.size] = content
    return bytes(raw)


def _require(name: str, value: object, known: Iterable[object]) -> None:
    choices = list(known)
    if value not in choices:
        raise UsageError(f"A machine has no such {name}.", expected=f"one of {choices}", found=repr(value))
