"""Hosts that answer in the verifier's place: what they do with a request on its way."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET

from kagimori_protocol import messages, sealing, signature, tpm, transcript
from kagimori_protocol.messages import Challenge, Confirm, Evidence, Hello, Sealed

Reply = tuple[int, bytes, str | None]
"""Status, body, signature header."""
Middle = Callable[[str, bytes, Callable[[], Reply]], Reply]
"""What the host does with a request: path, body, and a way to ask the true verifier."""

PLANTED_KEY = b"\x66" * 32
"""Opens the disk that the host has planted."""


def attackers_answer(evidence: bytes, *, with_credential: bool = True) -> bytes:
    """Make the attacker's own answer to evidence: the EK, the AK and the HPKE key are all that it takes."""
    sent = messages.decode(Evidence, evidence)
    hello = messages.decode(Hello, sent.hello)
    own = sent.challenges[0]
    t0 = transcript.t0(sent.hello, [(own.key, own.challenge)])
    binding = transcript.answer_binding(t0, own.challenge, evidence)
    secret = bytes(32)
    assert isinstance(hello.ek_public, bytes)
    assert isinstance(hello.ak_public, bytes)
    id_object, encrypted = tpm.make_credential(hello.ek_public, tpm.object_name(hello.ak_public), secret)
    key = messages.VolumeKey(uuid=hello.volumes[0], unlock_key=PLANTED_KEY, header_epoch=0)
    payload = messages.encode(messages.Keys(confirm_key=bytes(32), volumes=[key]))
    credential = messages.Credential(id_object=id_object, encrypted_secret=encrypted)
    return messages.encode(
        Sealed(
            version=1,
            session=messages.decode(Challenge, own.challenge).session,
            credential=credential if with_credential else UNSET,
            sealed=sealing.seal(hello.hpke_public_key, binding, payload, secret if with_credential else None),
        )
    )


def unsigned(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Answer evidence with the attacker's own key for the attacker's own planted disk, and sign nothing."""
    return (200, attackers_answer(body), None) if path == messages.PATH_RELEASE else ask()


def own_key(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """As before, and sign with a key of the attacker's."""
    if path != messages.PATH_RELEASE:
        return ask()
    answer = attackers_answer(body)
    return 200, answer, signature.sign(Ed25519PrivateKey.generate(), body, answer)


def own_key_under_its_name(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """As before, and claim that it is the verifier's key."""
    status, _, signed = ask()
    if path != messages.PATH_RELEASE:
        return status, _, signed
    assert signed is not None
    answer = attackers_answer(body)
    forged = signature.sign(Ed25519PrivateKey.generate(), body, answer)
    return 200, answer, signed.split(" sig=")[0] + " sig=" + forged.split(" sig=")[1]


def signature_of_the_true_answer(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """As before, with the signature of the answer that it replaces."""
    status, true, signed = ask()
    return (status, true, signed) if path != messages.PATH_RELEASE else (200, attackers_answer(body), signed)


def without_credential(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """As ``unsigned``, and spare the TPM: the HPKE key is public, so its layer is no proof of who sealed."""
    if path != messages.PATH_RELEASE:
        return ask()
    return 200, attackers_answer(body, with_credential=False), None


def made_up_challenge(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Ask the agent, in the verifier's place, for evidence over a nonce of the host's choice."""
    status, true, signed = ask()
    if path != messages.PATH_CHALLENGE:
        return status, true, signed
    challenge = messages.decode(Challenge, true)
    return 200, messages.encode(msgspec.structs.replace(challenge, nonce=bytes(32))), None


def made_up_receipt(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Keep a Confirm from the verifier, and say that it has arrived."""
    if path != messages.PATH_CONFIRM:
        return ask()
    confirm = messages.decode(Confirm, body)
    receipt = messages.Receipt(version=1, session=confirm.session, outcome=confirm.outcome)
    return 200, messages.encode(receipt), None
