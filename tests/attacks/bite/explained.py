"""Names without a story of their own: why they exist although no attack gets through without them.

Every entry is a debt to the reader. What can be attacked belongs among the stories.
"""

from __future__ import annotations

from typing import Final

EXPLAINED: Final[dict[str, str]] = {
    "volume.provenance": "tells who may know the volume keys and always holds (ADR 9): it warns an owner, and stops nobody",
    "reference.pcrs": "the form of PCR values that an owner types or reads from a file of their own: no attacker is on that "
    "path, and what it lets in is compared byte by byte with what a TPM has quoted",
    "recovery.gone": "an answer without the recovery key that was promised has the same unlock keys: it gives nobody anything, "
    "but its owner would believe in paper that opens nothing (tests/attacks/test_recovery_codes.py)",
}

WITHIN: Final[dict[str, str]] = {
    "certificate.chain": "endorsement.chain",
    "certificate.der": "endorsement.found",
    "certificate.layout": "endorsement.found",
    "ek.modulus": "manifest.ek",
    "ek.size": "manifest.ek",
    "ek.template": "manifest.ek",
    "eventlog.bank": "eventlog.replay",
    "eventlog.userspace": "eventlog.replay",
    "evidence.challenges": "message.decode",
    "message.form": "message.decode",
    "message.size": "message.decode",
    "pcr-selection.form": "quote.pcr-selection",
    "pcr-selection.layout": "quote.pcr-selection",
    "public.layout": "ak.layout",
    "public.name-alg": "ak.layout",
    "quote.magic": "quote.layout",
    "quote.type": "quote.layout",
    "report.reserved": "report.layout",
    "report.size": "report.layout",
    "report.version": "report.layout",
    "signature.layout": "quote.signature-layout",
    "svsm.nonce": "report.tie",
}
"""Codes that parsers raise, and the named check within which a refusal tells of them."""

AGENT: Final[dict[str, str]] = {
    "answer.purpose": "a payload is keys or a verdict, and nothing else decodes: this tells a verifier's mistake by name. "
    "No key is used in a dry-run, and none can be taken out of a verdict",
    "answer.volume": "where an answer has no key for a volume there is nothing to open it with",
    "answer.unexpected": "a signed reply of another type holds no key: this says so instead of a traceback",
    "answer.stale": "tells the agent to ask anew; what is stale, the verifier has refused (session.fresh, session.unused)",
    "unsupported-version": "a signed word about versions holds no key; nothing is negotiated, the agent gives up",
    "unlock.no-volumes": "an agent.toml without a volume: nothing to open, nothing to ask for",
    "hello.hpke-key": "bytes that are no public key cannot be sealed to: the library refuses, this gives it a name",
}
