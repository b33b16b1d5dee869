"""What docs/conformance.md says a verifier does with the vectors, done by ours, whose replies are signed bytes before any HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import pytest
from tests.conformance.test_vectors import DIRECTORIES, VECTORS, Given

from kagimori_protocol import messages, signature
from kagimori_protocol.messages import MAX_BODY

if TYPE_CHECKING:
    from tests.worlds import Owner

REQUESTS: Final = ("hello", "evidence", "confirm")
ENDS: Final = dict(zip(REQUESTS, ("challenge", "release", "confirm"), strict=True))


def refused(kind: str) -> list[str]:
    """Name the vectors of a request that must be refused, and that a transport would let through."""
    return [
        name
        for name in DIRECTORIES
        if name.startswith(f"messages/{kind}/") and name.endswith("_fail") and "too-large" not in name
    ]


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_that_must_be_refused_gets_a_signed_denial(kind: str, office: Owner) -> None:
    """`malformed`, or `unsupported-version` with the versions that are spoken: each reply is one that counts."""
    names = refused(kind)
    assert len(names) > 15
    for name in names:
        body = Given(name).body()
        assert len(body) <= MAX_BODY
        reply = getattr(office.verifier.service, ENDS[kind])(body, "test")
        assert signature.verify([office.public_key], reply.signature, body, reply.body) == office.public_key
        told = json.loads(reply.body)
        fails = json.loads((VECTORS / name / "expected.json").read_bytes())["fails"]
        if fails == "unsupported-version":
            assert (told["type"], told["versions"]) == ("unsupported-version", list(messages.VERSIONS))
        else:
            assert (told["type"], told["code"]) == ("denial", "malformed"), name
