"""``snp show`` and ``snp verify``: an attestation report for a person, and whether AMD's hardware signed it."""

from __future__ import annotations

import argparse
import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import KagimoriError, NotAuthentic, UsageError
from kagimori_protocol.snp import REPORT_SIZE, VMPL_HOST_REQUESTED, Report
from kagimori_verifier.cli import ca_directory, snp_report
from kagimori_verifier.cli.verdict import aligned, read_artefact, readable, tell
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.snp import Endorsements, verify_report

if TYPE_CHECKING:
    from pathlib import Path

    from kagimori_verifier.claims import SnpClaims
    from kagimori_verifier.cli.output import Output

WHAT: Final = f"an attestation report of {REPORT_SIZE} bytes"
MAX_FILE: Final = 1 << 20
_DATE: Final = "%Y-%m-%d"
_AZURE: Final = b"HCLA"
_CHECKS: Final = {
    "report.layout": "the bytes are a report, reserved parts zero",
    "report.signing-key": "a VCEK or a VLEK signed",
}


def show(options: argparse.Namespace, output: Output) -> int:
    """Show a report, unverified."""
    raw = _read(options.report)
    with readable(options.report, WHAT):
        report = Report.parse(raw)
    output.result(snp_report.facts(report), *snp_report.lines(report))
    return 0


def verify(options: argparse.Namespace, output: Output) -> int:
    """Verify a report's signature and chain."""
    raw = _read(options.report)
    vek = ca_directory.read_vek(options.vek)
    ca = ca_directory.read(options.ca)
    trail = Trail()
    claims = None
    with contextlib.suppress(NotAuthentic):  # the trail has it
        endorsements = Endorsements([*vek.certificates, *ca.certificates], ca.revocation_lists)
        claims = verify_report(trail, raw, endorsements, TrustedRoots())
    notes = [*vek.notes, *ca.notes]
    facts: dict[str, Any] = {}
    lines: list[str] = []
    if claims is not None:
        now = datetime.now(UTC)
        notes += _notes(claims, bool(ca.revocation_lists), now)
        facts, lines = _facts(claims), _lines(claims)
    else:
        notes += _unverified(raw)
    return tell(output, trail, facts, lines, notes)


def _read(path: Path) -> bytes:
    """Read what must have a report's size. Raises UsageError."""
    raw = read_artefact(path, MAX_FILE, WHAT)
    if len(raw) != REPORT_SIZE:
        azure = raw[:4] == _AZURE and len(raw) > REPORT_SIZE + 0x20
        raise UsageError(
            f"{path} is no attestation report.",
            code="report.size",
            expected=f"{REPORT_SIZE} bytes",
            found=f"{len(raw)} bytes" + (", an HCL report of Azure" if azure else ""),
            todo=f"Cut the report out: {REPORT_SIZE} bytes from offset 32 on."
            if azure
            else "Give the report alone, as configfs-tsm's outblob has it: without a header, a certificate table or padding.",
        )
    return raw


def _facts(claims: SnpClaims) -> dict[str, Any]:
    return {
        "product": claims.product,
        "signer": claims.signer,
        "root": str(claims.root),
        "csp_id": claims.csp_id,
        "valid_from": claims.valid_from.isoformat(),
        "valid_until": claims.valid_until.isoformat(),
        "revocation_list_until": claims.revocation.next_update.isoformat()
        if claims.revocation.next_update
        else None,
        "report": snp_report.facts(claims.report),
    }


def _lines(claims: SnpClaims) -> list[str]:
    report = claims.report
    provider = f", lent to {claims.csp_id}" if claims.csp_id else ""
    return aligned(
        [
            ("product", claims.product),
            ("signed by", f"{claims.signer.upper()}{provider}, under {claims.root}"),
            ("valid", f"{claims.valid_from:{_DATE}} to {claims.valid_until:{_DATE}} (whole chain)"),
            ("chip", report.chip_id.hex()),
            ("reported TCB", str(claims.reported_tcb)),
            ("VMPL", snp_report.vmpl(report)),
            ("policy", f"0x{report.policy:x}: {', '.join(report.policy_flags)}"),
            ("measurement", report.measurement.hex()),
            ("REPORT_DATA", report.report_data.hex()),
        ],
        indent=0,
    )


def _notes(claims: SnpClaims, lists: bool, now: datetime) -> list[str]:  # noqa: FBT001 - whether DIR had any
    """Say what a person should know beside: an authentic report may still be one that nobody should accept."""
    notes = []
    if now > claims.valid_until:
        notes.append(
            f"a certificate of the chain expired on {claims.valid_until:{_DATE}}; a verifier refuses it"
        )
    if now < claims.valid_from:
        notes.append(f"the chain is valid only from {claims.valid_from:{_DATE}} on; a verifier refuses it")
    if claims.revocation.missing is not None:
        unsigned = ": the one that is there does not count" if lists else ""
        notes.append(f"{claims.revocation.missing}{unsigned}, so revocation was not checked")
    elif claims.revocation.next_update is not None and now > claims.revocation.next_update:
        notes.append(
            f"the revocation list is of before {claims.revocation.next_update:{_DATE}}, when the next was due"
        )
    if "DEBUG" in claims.report.policy_flags:
        notes.append("the guest's policy allows DEBUG: its host can read and change its memory")
    if claims.report.vmpl == VMPL_HOST_REQUESTED:
        notes.append(
            "the host asked for this report, not the guest: nobody inside the guest chose REPORT_DATA"
        )
    return notes


def _unverified(raw: bytes) -> list[str]:
    try:
        report = Report.parse(raw)
    except KagimoriError:
        return []
    if not any(report.chip_id) and report.signing_key == "vcek":
        return ["CHIP_ID is zero: the host masks its chip, so that no VCEK can be held against it"]
    return []
