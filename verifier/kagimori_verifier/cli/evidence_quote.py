"""``quote verify``: whether an AK signed a quote, for which challenge, and over which PCR values."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import Malformed, NotAuthentic, UsageError
from kagimori_verifier.cli.verdict import aligned, read_artefact, readable, tell
from kagimori_verifier.examine import pcr_values
from kagimori_verifier.trail import Trail

os.environ.setdefault(
    "TSS2_LOG", "all+none"
)  # before the TSS is loaded: what it would log stands in our errors
from kagimori_verifier.examine import quote as examine

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Output
    from kagimori_verifier.examine.pcr_values import Banks
    from kagimori_verifier.examine.quote import Ak, Quoted

MAX_FILE: Final = 1 << 16
"""Bytes; TPM structures have at most some hundred, PEM some thousand."""

_QUOTE: Final = "a TPMS_ATTEST of type quote"
_SIGNATURE: Final = "a signature by a TPM"
_AK: Final = "an AK: PEM, TPMT_PUBLIC or TPM2B_PUBLIC"


def verify(options: argparse.Namespace, output: Output) -> int:
    """Verify a quote."""
    attest = read_artefact(options.attest, MAX_FILE, _QUOTE)
    signature = read_artefact(options.signature, MAX_FILE, _SIGNATURE)
    raw_ak = read_artefact(options.ak, MAX_FILE, _AK)
    pcrs = None
    if options.pcrs is not None:
        raw = read_artefact(options.pcrs, pcr_values.MAX_SIZE, "PCR values in JSON")
        with readable(options.pcrs, "PCR values"):
            pcrs = pcr_values.parse(raw)
    with readable(options.ak, _AK):
        ak = examine.parse_ak(raw_ak)
    trail = Trail()
    try:
        quoted = examine.verify(
            trail,
            attest=attest,
            signature=signature,
            ak=ak,
            qualifying_data=options.qualifying,
            pcrs=pcrs,
        )
    except NotAuthentic:
        return tell(output, trail, _ak_facts(ak), [], [])
    except Malformed as error:
        raise _unreadable(options, error) from error
    facts = {**_ak_facts(ak), **_quote_facts(quoted)}
    return tell(output, trail, facts, _lines(quoted, ak), _notes(quoted, ak, options, pcrs))


def _unreadable(options: argparse.Namespace, error: Malformed) -> UsageError:
    """Name the file that an error is about."""
    about_signature = error.code == "quote.signature-layout"
    path, what = (options.signature, _SIGNATURE) if about_signature else (options.attest, _QUOTE)
    return UsageError(
        f"{path} cannot be read as {what}: {error.what}",
        code=error.code,
        expected=error.expected,
        found=error.found,
        todo=f"See whether {path} is the file that was meant.",
    )


def _ak_facts(ak: Ak) -> dict[str, Any]:
    return {
        "ak": {
            "form": ak.form,
            "key": str(ak),
            "name": None if ak.name is None else ak.name.hex(),
            "attributes": None if ak.attributes is None else list(ak.attributes),
        }
    }


def _quote_facts(quoted: Quoted) -> dict[str, Any]:
    attest = quoted.attest
    return {
        "signature": {
            "form": quoted.signature_form,
            "scheme": examine.SCHEME_NAMES.get(quoted.signature.scheme),
            "hash": examine.BANK_NAMES.get(quoted.signature.hash),
        },
        "quote": {
            "extra_data": attest.extra_data.hex(),
            "clock_ms": attest.clock_ms,
            "reset_count": attest.reset_count,
            "restart_count": attest.restart_count,
            "firmware_version": f"{attest.firmware_version:016x}",
            "pcr_selection": [
                {"bank": examine.BANK_NAMES.get(bank, f"0x{bank:04x}"), "pcrs": list(chosen)}
                for bank, chosen in quoted.banks
            ],
            "pcr_digest": attest.pcr_digest.hex(),
        },
    }


def _lines(quoted: Quoted, ak: Ak) -> list[str]:
    attest = quoted.attest
    scheme = examine.SCHEME_NAMES.get(quoted.signature.scheme, "unknown scheme")
    attributes = "not known: this form has none" if ak.attributes is None else ", ".join(ak.attributes)
    return aligned(
        [
            ("AK", f"{ak} as {ak.form}"),
            ("AK's name", "not known" if ak.name is None else ak.name.hex()),
            ("AK's attributes", attributes),
            (
                "signature",
                f"{scheme} with {examine.BANK_NAMES.get(quoted.signature.hash)}, {quoted.signature_form}",
            ),
            ("extraData", attest.extra_data.hex() or "nothing"),
            ("covers", examine.told(quoted.banks)),
            ("pcrDigest", attest.pcr_digest.hex()),
            (
                "clock",
                f"{attest.clock_ms} ms, reset {attest.reset_count} times, restarted {attest.restart_count} times",
            ),
            ("TPM's firmware", f"{attest.firmware_version:016x}"),
        ],
        indent=0,
    )


def _notes(quoted: Quoted, ak: Ak, options: argparse.Namespace, pcrs: Banks | None) -> list[str]:
    notes = []
    if ak.attributes is None:
        notes.append(
            f"an AK as {ak.form} has no attributes: whether it is restricted, so that only a TPM could make what it "
            "signs, must be known from elsewhere"
        )
    if "certificate" in ak.form:
        notes.append("only the certificate's key was used; who signed the certificate was not checked")
    if pcrs is not None and (beside := examine.not_covered(quoted, pcrs)):
        notes.append(f"not covered by the quote, so not checked: {beside}")
    if options.pcrs is None:
        notes.append("pcrDigest was not checked: without --pcrs, the PCR values behind it are not known")
    if not options.qualifying:
        notes.append("without qualifying data nothing shows that the quote is fresh")
    if examine.BANK_NAMES.get(quoted.signature.hash) == "sha1":
        notes.append("the signature is over SHA-1, of which collisions can be made")
    notes += [
        f"a verifier refuses a boot with such a quote: {reason}" for reason in examine.refusals(quoted, ak)
    ]
    return notes
