"""``snp``, ``eventlog``, ``quote``, ``certs``: look at one artefact, or check it, without a verifier.

Only declared here. What a verb needs is imported when it runs: these must start fast, and none needs the database.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import UsageError
from kagimori_verifier.cli.output import Output, add_verb, group

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verb, Verbs

_CODES: Final = """\
exit codes:
  0  it holds, or was shown
  1  it does not hold
  2  usage, or a file that cannot be read as what it should be
"""
_JSON: Final = """\
With --json one object is printed. Its `verified` is true or false, and its `reasons` list what failed; `checks` are all
checks that were made, `notes` what a reader should know beside them.
"""
_PCRS: Final = (
    'PCR values of the TPM: {"sha256": {"0": "<hex>", ...}, ...}, or {"0": "<hex>", ...} of one bank'
)


def _run(module: str, function: str) -> Verb:
    """Give a verb's function, whose module is imported only when it runs."""

    def run(options: argparse.Namespace, output: Output) -> int:
        called: Verb = getattr(import_module(f"kagimori_verifier.cli.{module}"), function)
        return called(options, output)

    return run


def _qualifying(text: str) -> bytes:
    """Take qualifying data: any number of bytes; none is a challenge too, though no good one."""
    if re.fullmatch(r"(?:[0-9a-fA-F]{2})*", text) is None:
        raise UsageError(
            "Qualifying data has another form.",
            code="quote.qualifying-data",
            expected="hex digits, two for each byte",
            found=ascii(text[:80]),
            todo="Give the challenge that was sent to the TPM, in hexadecimal.",
        )
    return bytes.fromhex(text)


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    _register_snp(verbs)
    _register_eventlog(verbs)
    _register_quote(verbs)
    _register_certs(verbs)


def _register_snp(verbs: Verbs) -> None:
    snp = group(
        add_verb(
            verbs,
            "snp",
            None,
            "Show or check an SEV-SNP attestation report.",
            "snp show report.bin",
            epilog=_CODES,
        )
    )
    show = add_verb(
        snp,
        "show",
        _run("evidence_snp", "show"),
        "Show every field of a report, and what it means. Nothing is verified.\n\n"
        "REPORT is the 1184 bytes of an ATTESTATION_REPORT (AMD 56860), as /sys/kernel/config/tsm/report/*/outblob gives\n"
        "it, of version 2 to 5.",
        "snp show report.bin",
        epilog=_CODES,
        configured=False,
    )
    show.add_argument("report", type=Path, metavar="REPORT", help="the report; - is stdin")
    verify = add_verb(
        snp,
        "verify",
        _run("evidence_snp", "verify"),
        "Check that AMD's hardware signed a report.\n\n"
        "The certificate of the signing key (VCEK or VLEK) must chain, over ASK or ASVK, to an ARK that is AMD's: its key is\n"
        "pinned in this program. Product, TCB version and chip in the certificate must be the report's, and the signature\n"
        "must hold. A revocation list in DIR that the ARK signed counts. What is asked is whether the report is authentic,\n"
        "not whether anybody should like it: dates are shown, and an expired certificate is only noted.\n\n"
        + _JSON,
        "snp verify report.bin --vek vcek.der --ca amd-ca/milan",
        epilog=_CODES,
        configured=False,
    )
    verify.add_argument("report", type=Path, metavar="REPORT", help="the report; - is stdin")
    verify.add_argument(
        "--vek", required=True, type=Path, metavar="CERT", help="certificate of the VCEK or VLEK, PEM or DER"
    )
    verify.add_argument(
        "--ca",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory with ARK, ASK, ASVK and revocation lists, PEM or DER, under any names, also below it; other\n"
        "files are passed over",
    )


def _register_eventlog(verbs: Verbs) -> None:
    eventlog = group(
        add_verb(
            verbs, "eventlog", None, "Show or replay a TCG event log.", "eventlog show log.bin", epilog=_CODES
        )
    )
    show = add_verb(
        eventlog,
        "show",
        _run("evidence_eventlog", "show"),
        "List the events of a log: PCR, type, digests, and what they are about. Nothing is verified.\n\n"
        "LOG is what /sys/kernel/security/tpm0/binary_bios_measurements gives: crypto-agile, or of SHA-1 events. The log of\n"
        "a TDX guest (CCEL) is read too; there the PCR is the index of a measurement register. For each event it says how\n"
        "much of the data the digest covers. The rest is text that anybody could have written there.",
        "eventlog show /sys/kernel/security/tpm0/binary_bios_measurements",
        epilog=_CODES,
        configured=False,
    )
    show.add_argument("log", type=Path, metavar="LOG", help="the log; - is stdin")
    replay = add_verb(
        eventlog,
        "replay",
        _run("evidence_eventlog", "replay"),
        "Compute the PCR values that a log leads to, in each bank, and compare them with a TPM's.\n\n"
        "Every PCR in FILE is compared, whether the log has events of it or not. Only of PCRs 10 to 13 and 15 to 23, which\n"
        "an operating system extends without the firmware's log, values are passed over where the log has no event of\n"
        "them, and named. Without --pcrs nothing is compared: then it holds if it is a whole log that extends something.\n\n"
        + _JSON,
        "eventlog replay log.bin --pcrs pcrs.json",
        epilog=_CODES,
        configured=False,
    )
    replay.add_argument("log", type=Path, metavar="LOG", help="the log; - is stdin")
    replay.add_argument("--pcrs", type=Path, metavar="FILE", help=_PCRS)


def _register_quote(verbs: Verbs) -> None:
    quote = group(
        add_verb(
            verbs,
            "quote",
            None,
            "Check a quote of a TPM 2.0.",
            "quote verify --attest quote.msg --signature quote.sig --ak ak.pem --qualifying 9009",
            epilog=_CODES,
        )
    )
    verify = add_verb(
        quote,
        "verify",
        _run("evidence_quote", "verify"),
        "Check that an AK signed a quote for a challenge, and over which PCR values.\n\n"
        "Checked are magic and type of the TPMS_ATTEST, its extraData, the signature, and, with --pcrs, that the values of\n"
        "the selected PCRs hash to its pcrDigest (with the hash of the signature, whatever the bank). An AK as TPMT_PUBLIC\n"
        "must be restricted, sign, fixedTPM, fixedParent and sensitiveDataOrigin, and not decrypt: any other key could sign\n"
        "a quote that no TPM made. PEM has no attributes, so there this stays open. Whose TPM it is, is not asked.\n\n"
        + _JSON,
        "quote verify --attest quote.msg --signature quote.sig --ak ak.pem --qualifying 9009 --pcrs pcrs.json",
        epilog=_CODES,
        configured=False,
    )
    verify.add_argument("--attest", required=True, type=Path, metavar="F", help="the TPMS_ATTEST")
    verify.add_argument(
        "--signature", required=True, type=Path, metavar="F", help="a TPMT_SIGNATURE, or the bare signature"
    )
    verify.add_argument(
        "--ak", required=True, type=Path, metavar="F", help="the AK: PEM, TPMT_PUBLIC or TPM2B_PUBLIC"
    )
    verify.add_argument(
        "--qualifying",
        required=True,
        type=_qualifying,
        metavar="HEX",
        help="the challenge that the quote must carry as extraData",
    )
    verify.add_argument("--pcrs", type=Path, metavar="FILE", help=_PCRS)


def _register_certs(verbs: Verbs) -> None:
    certs = group(
        add_verb(
            verbs,
            "certs",
            None,
            "Show the certificates that a host hands to its guest.",
            "certs show auxblob.bin",
            epilog=_CODES,
        )
    )
    show = add_verb(
        certs,
        "show",
        _run("evidence_certs", "show"),
        "Show a certificate table. Nothing is verified.\n\n"
        "TABLE is what /sys/kernel/config/tsm/report/*/auxblob gives (AMD 56421, section 4.1.8.1). All of it is the host's\n"
        "word. Exit code 1 if an entry that should be a certificate or a revocation list is none.",
        "certs show auxblob.bin",
        epilog=_CODES,
        configured=False,
    )
    show.add_argument("table", type=Path, metavar="TABLE", help="the table; - is stdin")
