"""Vectors of the tie: docs/protocol.md section 4, from its words, with hashlib alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from tests.conformance.making.vector import Vector, given

Challenges = Sequence[tuple[bytes, bytes]]
"""Pairs of a verifier's public key and the Challenge that it signed."""


def sha256(data: bytes) -> bytes:
    """Hash with SHA-256."""
    return hashlib.sha256(data).digest()


def sha512(data: bytes) -> bytes:
    """Hash with SHA-512."""
    return hashlib.sha512(data).digest()


def t0(hello: bytes, challenges: Challenges) -> bytes:
    """T0, over Hello and all challenges."""
    listed = b"".join(sha256(key) + sha256(challenge) for key, challenge in challenges)
    return sha512(b"kagimori/1/t0\0" + sha256(hello) + bytes([len(challenges)]) + listed)


def svsm_nonce(t0_value: bytes) -> bytes:
    """Give what is written to inblob for the SVSM."""
    return sha512(b"kagimori/1/svsm-nonce\0" + t0_value)


def direct_report_data(t0_value: bytes) -> bytes:
    """REPORT_DATA of kind snp-direct."""
    return sha512(b"kagimori/1/report-data\0" + t0_value)


def t1(t0_value: bytes, report: bytes, manifest: bytes) -> bytes:
    """Give the quote's qualifyingData."""
    return sha256(b"kagimori/1/quote\0" + t0_value + sha256(report) + sha256(manifest))


def th(t0_value: bytes, challenge: bytes, evidence: bytes) -> bytes:
    """TH, which binds an answer."""
    return sha256(b"kagimori/1/answer\0" + t0_value + sha256(challenge) + sha256(evidence))


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    for count in range(1, 9):
        challenges = [(bytes([number]) * 32, f'{{"number":{number}}}'.encode()) for number in range(count)]
        yield _tie(f"{count}-challenges", challenges, own=count - 1)
    first, second = (b"\xaa" * 32, b"{}"), (b"\xbb" * 32, b'{"other":true}')
    yield _tie(
        "two-challenges-first-own", [first, second], own=0, about="TH names the first of two challenges."
    )
    yield _tie(
        "two-challenges-turned", [second, first], own=1, about="The order of challenges counts for T0."
    )
    same = [(first[0], second[1]), (second[0], first[1])]
    yield _tie("two-challenges-exchanged-keys", same, own=0, about="Each challenge counts with its own key.")
    yield _tie(
        "no-manifest", [first], own=0, manifest=b"", about="Without a manifest T1 covers the hash of nothing."
    )
    yield _tie(
        "long-inputs",
        [(b"\xff" * 32, bytes(range(256)))],
        own=0,
        hello=b"\xff" * 200,
        about="Bodies are hashed as they are, whatever their bytes.",
    )
    for count in (0, 9):
        challenges = [(bytes([number]) * 32, b"{}") for number in range(count)]
        yield Vector(
            f"transcript/{count}-challenges",
            "Evidence answers 1 to 8 challenges.",
            given(hello=b"{}", challenges=_listed(challenges)),
            fails="evidence.challenges",
        )
    for size in (32, 63, 65):
        yield Vector(
            f"transcript/svsm-nonce-of-{size}",
            "The SVSM's nonce has 64 bytes; with another size, nonce and manifest could be cut differently.",
            given(nonce=bytes(size), manifest=b"manifest"),
            fails="svsm.nonce",
        )


def _tie(
    name: str,
    challenges: Challenges,
    *,
    own: int,
    hello: bytes = b'{"type":"hello"}',
    manifest: bytes = b"manifest",
    about: str = "T0 covers Hello and every challenge in order; everything else follows from it.",
) -> Vector:
    report, evidence = bytes(range(64)), b'{"type":"evidence"}'
    tie = t0(hello, challenges)
    nonce = svsm_nonce(tie)
    gives = {
        "t0": tie.hex(),
        "svsm_nonce": nonce.hex(),
        "svsm_report_data": sha512(nonce + manifest).hex(),
        "direct_report_data": direct_report_data(tie).hex(),
        "t1": t1(tie, report, manifest).hex(),
        "th": th(tie, challenges[own][1], evidence).hex(),
    }
    inputs = given(
        hello=hello,
        challenges=_listed(challenges),
        own=own,
        report=report,
        manifest=manifest,
        evidence=evidence,
    )
    return Vector(f"transcript/{name}", about, inputs, gives)


def _listed(challenges: Challenges) -> list[dict[str, bytes]]:
    return [{"verifier_public_key": key, "challenge": challenge} for key, challenge in challenges]
