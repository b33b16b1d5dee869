"""Is an attestation report authentic?

PROTOCOL.md section 6, step 3. ``verify_report`` is read from top to bottom: layout, who signed, chain to a
trusted root, what the certificate says against what the report says, signature. Certificates come from
whoever had some: they are only candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from kagimori_protocol.errors import KagimoriError, Malformed, PeerError
from kagimori_protocol.snp import (
    SIGNATURE_ALGO_ECDSA_P384_SHA384,
    TURIN_HWID_SIZE,
    Report,
    TcbVersion,
)
from kagimori_verifier.claims import Revocation, Root, SnpClaims
from kagimori_verifier.verify.certificate import Certificate, RevocationList
from kagimori_verifier.verify.memory import NOTHING, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kagimori_verifier.roots import TrustedRoots
    from kagimori_verifier.trail import Trail

T = TypeVar("T")

_VEK_NAMES: Final = {"vcek": "SEV-VCEK", "vlek": "SEV-VLEK"}
_CA_NAMES: Final = {"vcek": "SEV-", "vlek": "SEV-VLEK-"}
_READ: Final = 64
"""Bytes that a byte of a certificate takes once it is read, at most: names of two bytes become objects."""


@dataclass(frozen=True, slots=True)
class Endorsements:
    """Candidates, as DER, from the evidence and from caches: certificates of any role, and revocation lists."""

    certificates: Sequence[bytes]
    revocation_lists: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class _Chain:
    vek: Certificate
    intermediate: Certificate
    ark: Certificate
    root: Root


def verify_report(
    trail: Trail, raw: bytes, endorsements: Endorsements, roots: TrustedRoots, memory: Memory = NOTHING
) -> SnpClaims:
    """Return what the report says, if it is authentic. Raises NotAuthentic, naming the check.

    1. the bytes are a report of a known version, and signed by a VCEK or a VLEK
    2. a certificate of that kind chains, over ASK or ASVK, to a trusted ARK that is not revoked
    3. product line, TCB version and chip in the certificate are those of the report
    4. the signature holds

    The caller MUST still judge everything that the report says, and that the certificates are valid now. ``memory`` spares
    reading and checking the same certificates again; it decides nothing.
    """
    # 1
    with trail.step("report.layout", "1184 bytes of a known version, reserved parts zero"):
        report = Report.parse(raw)
    signer = report.signing_key
    trail.require(
        "report.signing-key",
        signer in _VEK_NAMES and not report.mask_chip_key,
        expected="signed by vcek or vlek",
        found="masked: not signed" if report.mask_chip_key else signer,
    )
    trail.require(
        "report.signature-algo",
        report.signature_algo == SIGNATURE_ALGO_ECDSA_P384_SHA384,
        expected="1 (ECDSA P-384 with SHA-384)",
        found=str(report.signature_algo),
    )
    # 2
    certificates = _readable(endorsements.certificates, memory)
    vek = _find_vek(trail, report, signer, certificates)
    chain = _build_chain(trail, signer, vek, certificates, roots, memory)
    revocation = _revocation(trail, chain, endorsements.revocation_lists, memory)
    # 3
    product = _agree_on_product(trail, report, chain)
    turin = product == "Turin"
    with trail.step("report.tcb-layout", "TCB versions in the product's order"):
        reported, committed, current, launch = (
            TcbVersion.parse(part, turin=turin)
            for part in (report.reported_tcb, report.committed_tcb, report.current_tcb, report.launch_tcb)
        )
    certified = _or_none(chain.vek.tcb)
    trail.require(
        "endorsement.tcb",
        certified == reported,
        expected=f"the report's REPORTED_TCB: {reported}",
        found=str(certified or "none"),
    )
    _require_chip(trail, report, chain.vek, signer, turin=turin)
    # 4
    _require_signature(trail, report, chain.vek)
    chain_certificates = (chain.vek, chain.intermediate, chain.ark)
    return SnpClaims(
        report=report,
        product=product,
        root=chain.root,
        signer=signer,
        csp_id=_or_none(chain.vek.csp_id),
        reported_tcb=reported,
        committed_tcb=committed,
        current_tcb=current,
        launch_tcb=launch,
        valid_from=max(certificate.valid_from for certificate in chain_certificates),
        valid_until=min(certificate.valid_until for certificate in chain_certificates),
        revocation=revocation,
    )


def _readable(certificates: Iterable[bytes], memory: Memory) -> list[Certificate]:
    """Parse the candidates; one that cannot be read is no candidate, since hosts supply what they like. Each counts once."""
    readable = []
    for raw in dict.fromkeys(certificates):
        try:
            readable.append(
                memory.recall(
                    "certificate", raw, weight=_READ * len(raw), make=partial(Certificate.parse, raw)
                )
            )
        except Malformed:
            continue
    return readable


def _find_vek(trail: Trail, report: Report, signer: str, certificates: Sequence[Certificate]) -> Certificate:
    """Choose the certificate of the signing key: best the one for this chip and TCB, so that the next checks fit it."""
    name = _VEK_NAMES[signer]
    candidates = [certificate for certificate in certificates if certificate.common_name == name]
    trail.require(
        "endorsement.found",
        bool(candidates),
        expected=f"a {name} certificate, from the host or from the cache",
        found=", ".join(sorted({certificate.common_name for certificate in certificates}))
        or "no certificates",
    )
    return min(candidates, key=lambda candidate: not _fits(report, candidate))


def _fits(report: Report, candidate: Certificate) -> bool:
    """Tell whether a candidate is meant for this report; only a hint, the checks decide."""
    try:
        tcb, hwid = candidate.tcb(), candidate.hwid()
    except Malformed:
        return False
    return tcb.pack() == report.reported_tcb and (hwid is None or report.chip_id.startswith(hwid))


def _build_chain(  # noqa: PLR0913 - what a chain is made of
    trail: Trail,
    signer: str,
    vek: Certificate,
    certificates: Sequence[Certificate],
    roots: TrustedRoots,
    memory: Memory,
) -> _Chain:
    """Find and verify VEK -> ASK or ASVK -> trusted ARK; several certificates of one name are tried in turn.

    Only what a root's key has signed is tried with what, so the work grows with the candidates, not with their pairs.
    """
    arks = [
        (certificate, root)
        for certificate in certificates
        if (root := roots.get(certificate.spki_sha256)) is not None
    ]
    issuers = [certificate for certificate in certificates if certificate.fields.subject == vek.fields.issuer]
    offered = [c for c in certificates if c.fields.issuer == c.fields.subject]
    trail.require(
        "endorsement.root",
        bool(arks),
        expected=f"an ARK of: {roots}",
        found=", ".join(f"{ark.common_name} with key {ark.spki_sha256.hex()}" for ark in offered)
        or "no ARK at all",
    )
    reasons: list[str] = []
    for ark, root in arks:
        if not _signed(ark, ark, memory, reasons):
            continue
        for intermediate in issuers:
            if intermediate.fields.issuer != ark.fields.subject or not _signed(
                intermediate, ark, memory, reasons
            ):
                continue
            try:
                _require_signed(vek, intermediate, memory)
                vek.vek_key()
                _require_name(intermediate, _CA_NAMES[signer] + root.product)
            except KagimoriError as error:
                reasons.append(_reason(error))
                continue
            names = _names(vek, intermediate, ark)
            trail.note("endorsement.chain", True, expected=f"a chain to {root}", found=names)  # noqa: FBT003 - it held
            return _Chain(vek, intermediate, ark, root)
    trail.require(
        "endorsement.chain",
        False,  # noqa: FBT003 - every way to a root has been tried
        expected=f"{vek.common_name} -> {_CA_NAMES[signer]}<product> -> a trusted ARK",
        found="; ".join(reasons) or f"no chain over its issuer {vek.fields.issuer.rfc4514_string()}",
    )
    raise AssertionError  # unreachable: the check above always raises


def _require_signed(certificate: Certificate, issuer: Certificate, memory: Memory) -> None:
    """Raise NotAuthentic unless an issuer signed a certificate: a matter of their bytes alone."""

    def check() -> bool:
        certificate.require_signed_by(issuer)
        return True  # and not the certificate: it would be kept, and nobody would count it

    memory.recall("signed", issuer.raw, certificate.raw, weight=0, make=check)


def _signed(certificate: Certificate, issuer: Certificate, memory: Memory, reasons: list[str]) -> bool:
    """Tell whether an issuer signed a certificate, or add the reason why not."""
    try:
        _require_signed(certificate, issuer, memory)
    except KagimoriError as error:
        reasons.append(_reason(error))
        return False
    return True


def _reason(error: KagimoriError) -> str:
    return f"{error.what} Expected {error.expected}, found {error.found}."


def _require_name(certificate: Certificate, name: str) -> None:
    """Keep the two kinds of intermediates apart: an ASK signs VCEKs only, an ASVK signs VLEKs only."""
    if certificate.common_name != name:
        raise Malformed("A CA has another name.", expected=name, found=certificate.common_name)


def _names(*certificates: Certificate) -> str:
    return " -> ".join(certificate.common_name for certificate in certificates)


def _revocation(trail: Trail, chain: _Chain, lists: Sequence[bytes], memory: Memory) -> Revocation:
    """Ask the newest list that this ARK signed; without one, say so and leave it to policy.

    A VCEK or VLEK cannot be named there (its serial number is 0), so the list is about ASK and ASVK.
    """
    genuine = [found for raw in lists if (found := _genuine_list(raw, chain.ark, memory)) is not None]
    if not genuine:
        return Revocation(next_update=None, missing=f"no revocation list signed by {chain.ark.common_name}")
    newest = max(genuine, key=lambda found: found.last_update)
    serial = chain.intermediate.fields.serial_number
    trail.require(
        "endorsement.revoked",
        not newest.revokes(serial),
        expected=f"{chain.intermediate.common_name} not on the revocation list",
        found=f"list of {newest.last_update:%Y-%m-%d}, serial number {serial:x}",
    )
    return Revocation(next_update=newest.next_update, missing=None)


def _genuine_list(raw: bytes, ark: Certificate, memory: Memory) -> RevocationList | None:
    """Read a revocation list, if it is one and this ARK signed it."""
    try:
        return memory.recall(
            "revocation list",
            ark.raw,
            raw,
            weight=2 * len(raw),
            make=lambda: RevocationList.parse(raw).require_signed_by(ark),
        )
    except PeerError:
        return None


def _or_none(tell: Callable[[], T]) -> T | None:
    """Give what a certificate says of itself, or None where it says it in no form of AMD's: whoever asks refuses None."""
    try:
        return tell()
    except Malformed:
        return None


def _agree_on_product(trail: Trail, report: Report, chain: _Chain) -> str:
    """Root, certificate and report must speak of one product line; version 2 reports cannot all tell theirs."""
    product = chain.root.product
    certified, reported = _or_none(chain.vek.product_line), report.product_line()
    trail.require(
        "endorsement.product",
        certified == product and (reported == product or (reported is None and report.version == 2)),  # noqa: PLR2004 - docstring
        expected=f"{product}, as the root says",
        found=f"certificate: {certified or 'does not tell'}, report: {reported or 'does not tell'}",
    )
    return product


def _require_chip(trail: Trail, report: Report, vek: Certificate, signer: str, *, turin: bool) -> None:
    """A VCEK names its chip, which must be the report's; a VLEK must name none but a provider.

    Turin's CHIP_ID has 8 bytes, then zeros. A masked CHIP_ID (all zero) cannot be compared, so it is refused.
    """
    hwid = vek.hwid()
    if signer == "vlek":
        provider = _or_none(vek.csp_id)
        trail.require(
            "endorsement.chip",
            hwid is None and bool(provider),
            expected="a VLEK without chip and with the id of its cloud provider",
            found=f"chip {'none' if hwid is None else hwid.hex()}, provider {provider or 'none'}",
        )
        return
    size = TURIN_HWID_SIZE if turin else len(report.chip_id)
    trail.require(
        "endorsement.chip",
        hwid is not None
        and len(hwid) == size
        and any(hwid)
        and report.chip_id == hwid + bytes(len(report.chip_id) - size),
        expected=f"CHIP_ID {report.chip_id[:size].hex()}, as in the report",
        found="none" if hwid is None else hwid.hex(),
    )


def _require_signature(trail: Trail, report: Report, vek: Certificate) -> None:
    """ECDSA over the first 0x2A0 bytes; R and S lie in the report in little-endian order."""
    signature = encode_dss_signature(report.signature_r, report.signature_s)
    try:
        vek.vek_key().verify(signature, report.signed_bytes, ec.ECDSA(hashes.SHA384()))
        holds = True
    except (InvalidSignature, ValueError):
        holds = False
    trail.require(
        "report.signature",
        holds,
        expected=f"the report's bytes signed by the key in {vek.common_name}",
        found="a signature that verifies" if holds else "a signature that does not verify",
    )
