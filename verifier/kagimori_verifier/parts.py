"""What evidence consists of, by its kind and purpose: nothing may be missing, and nothing be there that proves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_protocol.messages import Evidence, Hello, PcrValue, Quote
    from kagimori_verifier.trail import Trail


class VtpmParts(NamedTuple):
    """What evidence of kind ``svsm-vtpm`` has beside the report, all of it there."""

    manifest: bytes
    quote: Quote
    pcrs: Sequence[PcrValue]
    event_log: bytes
    ek_public: bytes
    ak_public: bytes


def vtpm_parts(trail: Trail, evidence: Evidence, hello: Hello) -> VtpmParts:
    """Return the parts that a TPM contributes. Raises NotAuthentic if one is missing."""
    parts = _tpm_parts(evidence, hello)
    missing = [name for name, part in parts.items() if part is UNSET]
    proof = _about_proof(evidence, hello)
    trail.require(
        "evidence.parts",
        not missing and proof is None,
        expected=", ".join(parts) + (", enrol_proof" if hello.purpose == "enrol" else ""),
        found=proof or ("without " + ", ".join(missing) if missing else "all of them"),
    )
    return VtpmParts(**parts)  # type: ignore[arg-type]  # none is UNSET, as required just above


def require_no_tpm(trail: Trail, evidence: Evidence, hello: Hello) -> None:
    """A TPM that no SVSM vouches for contributes no claim, so ``snp-direct`` may show none (ADR 4)."""
    shown = [name for name, part in _tpm_parts(evidence, hello).items() if part is not UNSET]
    proof = _about_proof(evidence, hello)
    trail.require(
        "evidence.parts",
        not shown and proof is None,
        expected="no part of a TPM: this measurement is of kind snp-direct"
        + ("; and enrol_proof" if hello.purpose == "enrol" else ""),
        found=proof or ", ".join(shown) or "none",
    )


def _tpm_parts(evidence: Evidence, hello: Hello) -> dict[str, object]:
    """Name everything in evidence that a TPM or its SVSM contributes; UNSET where it is absent."""
    return {
        "manifest": evidence.manifest,
        "quote": evidence.quote,
        "pcrs": evidence.pcrs,
        "event_log": evidence.event_log,
        "ek_public": hello.ek_public,
        "ak_public": hello.ak_public,
    }


def _about_proof(evidence: Evidence, hello: Hello) -> str | None:
    """Say what is wrong with the proof of a code being there or not: it belongs to the purpose ``enrol`` alone."""
    there, wanted = evidence.enrol_proof is not UNSET, hello.purpose == "enrol"
    if there == wanted:
        return None
    return f"enrol_proof, though the purpose is {hello.purpose}" if there else "without enrol_proof"
