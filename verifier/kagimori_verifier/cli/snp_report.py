"""An attestation report as data, and as lines for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import Malformed
from kagimori_protocol.snp import (
    FIELDS,
    PLATFORM_INFO_BITS,
    POLICY_BITS,
    VMPL_HOST_REQUESTED,
    Report,
    TcbVersion,
)
from kagimori_verifier.cli import snp_words
from kagimori_verifier.cli.verdict import aligned, heading

if TYPE_CHECKING:
    from collections.abc import Mapping

    Row = tuple[str, ...]

_WITH_CPUID: Final = 3
_WITH_MITIGATIONS: Final = 5
_BYTES: Final = (
    "report_data",
    "measurement",
    "host_data",
    "id_key_digest",
    "author_key_digest",
    "report_id",
    "report_id_ma",
    "chip_id",
    "family_id",
    "image_id",
)
_LINE: Final = 64
"""Hex digits on a line."""
_POLICY_BITS_START: Final = 16


def facts(report: Report) -> dict[str, Any]:
    """Give a report as JSON has it: bytes in hex, flags by name."""
    fields: dict[str, Any] = {
        name: value.hex() if isinstance(value := getattr(report, name), bytes) else value for name in FIELDS
    }
    line = report.product_line()
    return fields | {
        "signature_r": f"{report.signature_r:x}",
        "signature_s": f"{report.signature_s:x}",
        "product_line": line,
        "signing_key": report.signing_key,
        "author_key_en": report.author_key_en,
        "mask_chip_key": report.mask_chip_key,
        "policy_abi": ".".join(map(str, report.policy_abi)),
        "policy_flags": list(report.policy_flags),
        "platform_flags": list(report.platform_flags),
        "tcb": {
            name: tcb._asdict() if (tcb := _tcb(report, name)) is not None else None
            for name in snp_words.TCB_VERSIONS
        },
    }


def lines(report: Report) -> list[str]:
    """Write a report for a person."""
    return [
        f"SEV-SNP attestation report, version {report.version}. Nothing here is verified; `snp verify` does that.",
        *heading("Who and where"),
        *aligned(_who(report)),
        *heading(f"Guest policy 0x{report.policy:x}: firmware ABI {_dotted(report.policy_abi)} or later"),
        *aligned(_bits(report.policy, POLICY_BITS, snp_words.POLICY, first=_POLICY_BITS_START)),
        *heading(f"Platform 0x{report.platform_info:x}"),
        *aligned(_bits(report.platform_info, PLATFORM_INFO_BITS, snp_words.PLATFORM)),
        *heading("TCB versions"),
        *aligned(_tcb_rows(report)),
        *aligned([(_title(name), meaning) for name, meaning in snp_words.TCB_VERSIONS.items()]),
        *heading("Contents"),
        *aligned([row for name in _BYTES for row in _hex_rows(report, name)]),
        *heading("Signature"),
        *aligned(
            [
                (
                    "algorithm",
                    "1: ECDSA P-384 with SHA-384"
                    if report.signature_algo == 1
                    else str(report.signature_algo),
                ),
                ("r", f"{report.signature_r:x}"),
                ("s", f"{report.signature_s:x}"),
            ]
        ),
    ]


def vmpl(report: Report) -> str:
    """Name the privilege level that asked."""
    if report.vmpl == VMPL_HOST_REQUESTED:
        return "0xffffffff: the host asked, not the guest"
    return str(report.vmpl)


def _who(report: Report) -> list[Row]:
    line = report.product_line()
    if report.version < _WITH_CPUID:
        cpu = "not told by version 2"
    else:
        cpu = f"family 0x{report.cpuid_fam_id:02x}, model 0x{report.cpuid_mod_id:02x}, stepping {report.cpuid_step}"
    key = snp_words.SIGNING_KEY.get(report.signing_key, report.signing_key)
    rows: list[Row] = [
        ("product line", line or _unknown_product(report), ""),
        ("processor", cpu, ""),
        ("firmware now", _version(report, "current"), ""),
        ("firmware committed", _version(report, "committed"), "the lowest that the platform may go back to"),
        ("signed by", key, f"KEY_INFO 0x{report.key_info:x}"),
        ("VMPL", vmpl(report), snp_words.FIELDS["vmpl"]),
        ("guest SVN", str(report.guest_svn), snp_words.FIELDS["guest_svn"]),
    ]
    for name, is_set in (("AUTHOR_KEY_EN", report.author_key_en), ("MASK_CHIP_KEY", report.mask_chip_key)):
        rows.append((name, "yes" if is_set else "no", snp_words.KEY_INFO[name]))
    if report.version >= _WITH_MITIGATIONS:
        rows += [
            (name, f"0x{getattr(report, name):016x}", snp_words.FIELDS[name])
            for name in ("launch_mit_vector", "current_mit_vector")
        ]
    return rows


def _unknown_product(report: Report) -> str:
    if report.version < _WITH_CPUID:
        return "Milan or Genoa: version 2 does not tell, the certificate does"
    return "unknown to this release"


def _version(report: Report, which: str) -> str:
    return ".".join(str(getattr(report, f"{which}_{part}")) for part in ("major", "minor", "build"))


def _dotted(abi: tuple[int, int]) -> str:
    return ".".join(map(str, abi))


def _bits(value: int, names: Mapping[int, str], words: Mapping[str, str], first: int = 0) -> list[Row]:
    """List every known bit, and every unknown one that is set."""
    known = [
        (f"bit {bit}", name, "yes" if value >> bit & 1 else "no", words[name]) for bit, name in names.items()
    ]
    unknown = [
        (f"bit {bit}", "unknown", "yes", "")
        for bit in range(first, value.bit_length())
        if value >> bit & 1 and bit not in names
    ]
    return [*known, *unknown]


def _tcb(report: Report, name: str) -> TcbVersion | None:
    """Read a TCB version in the product's order; None where the product is not known, or its bytes do not fit."""
    line = report.product_line()
    if line is None and report.version >= _WITH_CPUID:
        return None
    try:
        return TcbVersion.parse(getattr(report, name), turin=line == "Turin")
    except Malformed:
        return None


def _title(tcb: str) -> str:
    return tcb.removesuffix("_tcb").upper()


def _tcb_rows(report: Report) -> list[Row]:
    found = {name: _tcb(report, name) for name in snp_words.TCB_VERSIONS}
    rows: list[Row] = [
        ("", *(_title(name) for name in found), ""),
        ("raw", *(getattr(report, name).hex() for name in found), ""),
    ]
    for part, meaning in snp_words.TCB.items():
        values = [None if tcb is None else getattr(tcb, part) for tcb in found.values()]
        if any(value is not None for value in values):
            rows.append((part, *("?" if value is None else str(value) for value in values), meaning))
    return rows


def _hex_rows(report: Report, name: str) -> list[Row]:
    """Write bytes in hex; many of them on several lines, none of them by a word."""
    value: bytes = getattr(report, name)
    text = value.hex() if any(value) else f"zero ({len(value)} bytes)"
    parts = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    first: Row = (name.upper(), parts[0], snp_words.FIELDS[name])
    return [first, *(("", part, "") for part in parts[1:])]
