"""``certs show``: the certificate table that a host hands to its guest."""

from __future__ import annotations

import argparse
import uuid
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError
from kagimori_verifier.cli.verdict import DOES_NOT_HOLD, HOLDS, aligned, read_artefact, readable
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.verify.certificate import Certificate, RevocationList

if TYPE_CHECKING:
    from kagimori_protocol.certificate_table import Entry
    from kagimori_verifier.cli.output import Output

WHAT: Final = "a certificate table"
_DATE: Final = "%Y-%m-%d"
_VEKS: Final = ("SEV-VCEK", "SEV-VLEK")
_PLATFORM_INFO: Final = uuid.UUID("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6")
"""Added by some clients, not by hosts: 4 bytes of size, 4 bytes of CPUID."""


def show(options: argparse.Namespace, output: Output) -> int:
    """Show a table, unverified."""
    raw = read_artefact(options.table, certificate_table.MAX_TABLE_SIZE, WHAT)
    with readable(options.table, WHAT):
        entries = certificate_table.parse(raw)
    rows = [_entry(entry) for entry in entries]
    broken = [row for row in rows if "error" in row]
    lines = [
        f"{len(rows)} entries in {len(raw)} bytes. Nothing here is verified: a host can put in what it likes."
        if rows
        else "No certificates: the host supplied none."
    ]
    for row in rows:
        about = [(name, str(value)) for name, value in row.items() if name not in ("entry", "guid")]
        lines += ["", f"{row['entry']}  {row['guid']}", *aligned(about)]
    reasons = [f"certificates.entry: {row['entry']}: {row['error']}" for row in broken]
    output.result({"reasons": reasons, "entries": rows}, *lines)
    return DOES_NOT_HOLD if broken else HOLDS


def _entry(entry: Entry) -> dict[str, Any]:
    name = "platform info" if entry.guid == _PLATFORM_INFO else entry.name
    row: dict[str, Any] = {"entry": name, "guid": str(entry.guid), "bytes": len(entry.payload)}
    if entry.guid not in certificate_table.NAMES:
        return row | {"payload": entry.payload.hex()}
    row["encoding"] = "PEM" if b"-----BEGIN " in entry.payload else "DER"
    try:
        der = entry.der()
        return row | (_revocation_list(der) if entry.guid == certificate_table.CRL else _certificate(der))
    except KagimoriError as error:
        return row | {"error": error.reason}


def _certificate(der: bytes) -> dict[str, Any]:
    certificate = Certificate.parse(der)
    row: dict[str, Any] = {
        "subject": certificate.common_name,
        "issuer": certificate.fields.issuer.rfc4514_string(),
        "valid": f"{certificate.valid_from:{_DATE}} to {certificate.valid_until:{_DATE}}",
        "key_sha256": certificate.spki_sha256.hex(),
    }
    root = TrustedRoots().get(certificate.spki_sha256)
    if root is not None:
        row["pinned"] = str(root)
    elif certificate.fields.issuer == certificate.fields.subject:
        row["pinned"] = "no: not a root of AMD's"
    if certificate.common_name in _VEKS:
        hwid = certificate.hwid()
        row["product"] = certificate.product_line()
        row["tcb"] = str(certificate.tcb())
        row["chip"] = "none" if hwid is None else hwid.hex()
        if (provider := certificate.csp_id()) is not None:
            row["provider"] = provider
    return row


def _revocation_list(der: bytes) -> dict[str, Any]:
    parsed = RevocationList.parse(der)
    return {
        "issuer": parsed.issuer.rfc4514_string(),
        "issued": f"{parsed.last_update:{_DATE}}",
        "next": "not told" if parsed.next_update is None else f"{parsed.next_update:{_DATE}}",
        "revoked": [f"{one.serial_number:x}" for one in parsed.fields],
    }
