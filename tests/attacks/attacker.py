"""An attacker's hands: the protocol driven step by step, each part of it there to be bent.

The attacker commands whatever the stories need: the network, the host, a VM's report door, its TPM, its event log. What
it never has is a key of the verifier's, of AMD's, of the SVSM's or of the TPM's.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from tests.worlds import VM, Owner
from tpm2_pytss.types import TPMS_ECC_POINT, TPMT_PUBLIC

from kagimori_agent.devices.vtpm import Quote, open_vtpm
from kagimori_agent.devices.vtpm import Vtpm as OpenVtpm
from kagimori_protocol import messages, sealing, signature, tpm, transcript
from kagimori_protocol.messages import Answer, Evidence, Keys, Payload, Sealed, SignedChallenge, Verdict
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm

VTPM_SERVICE: Final = uuid.UUID("c476f1eb-0123-45a5-9641-b4e7dde5bfe3")
UUID: Final = "11111111-2222-4333-8444-555555555555"
UNLOCK_KEY: Final = b"the unlock key of the volume ...".ljust(32, b".")
Post = Callable[[str, bytes], bytes]
Activate = Callable[[bytes, bytes], bytes]
"""Opens a credential: id_object and encrypted_secret in, S out."""


@dataclass
class Told:
    """What the sender was told: the request, the reply's bytes, and what they say."""

    request: bytes
    body: bytes

    @property
    def message(self) -> Answer:
        return messages.decode_answer(self.body)

    @property
    def denial(self) -> str | None:
        """The code of a denial; None for any other answer."""
        return getattr(self.message, "code", None)

    @property
    def session(self) -> str:
        """The name that the owner knows this session by; empty if the reply names none."""
        session = getattr(self.message, "session", b"")
        return transcript.session_id(session) if session else ""


class Attacker:
    """One that asks as a VM does. Every reply must be signed, or it is no answer to anybody."""

    def __init__(
        self,
        office: Owner,
        machine: SnpMachine,
        svsm: Svsm | None,
        vtpm: OpenVtpm | None,
        post: Post | None = None,
        keys: tuple[bytes, bytes] | None = None,
    ) -> None:
        """``keys`` are EK and AK that the TPM has made already; otherwise it makes them now."""
        self.office = office
        self.machine = machine
        self.svsm = svsm
        self.vtpm = vtpm
        self.key = sealing.ResponseKey([os.urandom(64)])
        self.activate: Activate | None = None
        self._post = post or in_process(office)
        self._keys = keys or ((None, None) if vtpm is None else vtpm.make_keys())

    @property
    def public_areas(self) -> tuple[bytes, bytes]:
        """EK and AK as Hello names them."""
        ek_public, ak_public = self._keys
        assert ek_public is not None
        assert ak_public is not None
        return ek_public, ak_public

    def hello(self, **changes: object) -> bytes:
        """Say Hello, as the enrolled VM would or otherwise."""
        ek_public, ak_public = self._keys
        fields: dict[str, Any] = {
            "version": 1,
            "vm_id": VM,
            "purpose": "unlock",
            "kind": "snp-direct" if self.svsm is None else "svsm-vtpm",
            "hpke_public_key": self.key.public,
            "ek_public": msgspec.UNSET if ek_public is None else ek_public,
            "ak_public": msgspec.UNSET if ak_public is None else ak_public,
            "volumes": [UUID],
            "agent": "an attacker",
        }
        return messages.encode(messages.Hello(**(fields | changes)))

    def challenge(self, hello: bytes) -> SignedChallenge:
        """Draw a Challenge."""
        body = self._post(messages.PATH_CHALLENGE, hello)
        assert isinstance(messages.decode_challenge_reply(body), messages.Challenge), body
        return SignedChallenge(key=self.office.public_key, challenge=body)

    def refused_challenge(self, hello: bytes) -> str:
        """Ask for a Challenge that is not given; returns the denial's code."""
        reply = messages.decode_challenge_reply(self._post(messages.PATH_CHALLENGE, hello))
        assert isinstance(reply, messages.Denial), reply
        return reply.code

    def evidence(self, hello: bytes | None = None, *challenges: SignedChallenge) -> dict[str, Any]:
        """Collect the evidence of this machine as it is, honestly: the fields of an Evidence, by name."""
        hello = hello or self.hello()
        parts: dict[str, Any] = {
            "version": 1,
            "hello": hello,
            "challenges": list(challenges) or [self.challenge(hello)],
        }
        t0 = t0_of(parts)
        if self.svsm is None:
            parts["report"] = self.machine.report(transcript.direct_report_data(t0), 0)
            parts["certificates"] = self.machine.certificate_table()
            return parts
        nonce = transcript.svsm_nonce(t0)
        parts |= zip(
            ("report", "manifest", "certificates"),
            self.svsm.attest_single_service(nonce, VTPM_SERVICE),
            strict=True,
        )
        return parts | self.quote(parts) | {"event_log": self.tpm.event_log()}

    def quote(self, parts: dict[str, Any], selection: bytes | None = None) -> dict[str, Any]:
        """Let the TPM quote what ``parts`` hold by now, over the PCRs of the first challenge or others."""
        if selection is None:
            first = messages.decode(messages.Challenge, parts["challenges"][0].challenge)
            selection = first.pcr_selection
        return quoted(self.tpm.quote(t1_of(parts), selection))

    def send(self, parts: dict[str, Any]) -> Told:
        """Send evidence."""
        return self.send_bytes(messages.encode(Evidence(**parts)))

    def send_bytes(self, request: bytes) -> Told:
        """Send bytes in evidence's place."""
        return Told(request, self._post(messages.PATH_RELEASE, request))

    def open(self, told: Told, key: sealing.ResponseKey | None = None) -> Payload:
        """Open an answer as the agent does. Raises NotAuthentic or HardwareError."""
        assert isinstance(told.message, Sealed), told.body
        binding = self.binding(told)
        inner = (key or self.key).open(told.message.sealed, binding)
        if isinstance(told.message.credential, msgspec.UnsetType):
            return messages.decode_payload(inner)
        credential = told.message.credential
        activate = self.activate or self.tpm.activate
        secret = activate(credential.id_object, credential.encrypted_secret)
        return messages.decode_payload(sealing.open_inner(inner, binding, secret))

    def keys(self, told: Told) -> dict[str, bytes]:
        """Open an answer that holds keys."""
        payload = self.open(told)
        assert isinstance(payload, Keys), payload
        return {volume.uuid: volume.unlock_key for volume in payload.volumes}

    def verdict(self, told: Told) -> Verdict:
        """Open an answer that holds a verdict."""
        payload = self.open(told)
        assert isinstance(payload, Verdict), payload
        return payload

    def binding(self, told: Told) -> bytes:
        """Compute TH from what was sent."""
        return self.binding_of(told.request)

    def binding_of(self, request: bytes) -> bytes:
        """Compute TH from an Evidence."""
        evidence = messages.decode(Evidence, request)
        own = next(one for one in evidence.challenges if one.key == self.office.public_key)
        t0 = transcript.t0(evidence.hello, [(one.key, one.challenge) for one in evidence.challenges])
        return transcript.answer_binding(t0, own.challenge, request)

    def confirm(self, told: Told, payload: Payload, outcome: messages.Outcome = "opened") -> bytes:
        """Make the Confirm of an opened answer."""
        assert isinstance(told.message, Sealed)
        mac = sealing.confirm_mac(payload.confirm_key, self.binding(told), outcome)
        return messages.encode(
            messages.Confirm(version=1, session=told.message.session, outcome=outcome, mac=mac)
        )

    def send_confirm(self, body: bytes) -> str:
        """Send a Confirm; returns the outcome that was written down, or the denial's code."""
        reply = messages.decode_confirm_reply(self._post(messages.PATH_CONFIRM, body))
        return reply.outcome if isinstance(reply, messages.Receipt) else getattr(reply, "code", "")

    @property
    def tpm(self) -> OpenVtpm:
        assert self.vtpm is not None, "a story about a TPM needs a VM that has one"
        return self.vtpm


def in_process(office: Owner) -> Post:
    """Talk to a verifier without a network, and hold it to its promise that every reply is signed."""
    service = office.verifier.service
    doors = {
        messages.PATH_CHALLENGE: service.challenge,
        messages.PATH_RELEASE: service.release,
        messages.PATH_CONFIRM: service.confirm,
    }

    def post(path: str, body: bytes) -> bytes:
        reply = doors[path](body, "203.0.113.7")
        signature.verify([office.public_key], reply.signature, body, reply.body)
        return reply.body

    return post


def t0_of(parts: dict[str, Any]) -> bytes:
    """Compute T0 of what ``parts`` hold."""
    return transcript.t0(parts["hello"], [(one.key, one.challenge) for one in parts["challenges"]])


def t1_of(parts: dict[str, Any]) -> bytes:
    """Compute T1 of what ``parts`` hold."""
    return transcript.quote_qualifying_data(t0_of(parts), parts["report"], parts["manifest"])


def quoted(quote: Quote) -> dict[str, Any]:
    """Give a quote as the fields of an Evidence."""
    return {
        "quote": messages.Quote(attest=quote.attest, signature=quote.signature),
        "pcrs": [messages.PcrValue(index=index, digest=digest) for index, digest in quote.pcrs],
    }


def recoded(body: bytes, message: type[msgspec.Struct], **changes: object) -> bytes:
    """Change fields of an encoded message."""
    return messages.encode(msgspec.structs.replace(messages.decode(message, body), **changes))


def denied(office: Owner, told: Told, code: str, check: str) -> None:
    """Hold both sides: the sender learned only ``code``, the owner that ``check`` failed; nothing was released."""
    assert told.denial == code, f"the sender was told {told.body!r}"
    newest = office.refusals()[0]
    assert newest.code == check, f"the owner sees {newest}"
    assert newest.path == "release"
    assert (newest.session or "") == told.session
    assert office.events() == [], "nothing may have been decided"


def judged(attacker: Attacker, told: Told, *checks: str) -> None:
    """Hold both sides: the VM's own agent learned that exactly ``checks`` failed, and the ledger has the same line."""
    verdict = attacker.verdict(told)
    assert not verdict.allowed
    failed = [check for check in verdict.checks if not check.ok]
    assert {check.id for check in failed} == set(checks), failed
    assert all(check.expected and check.found for check in failed)
    line = attacker.office.ledger(told.session)[-1]
    assert line.event == "refused"
    assert {check["id"] for check in line.body["checks"] if not check["ok"]} == set(checks)


class SoftwareAk:
    """An attestation key that lives in a file: it says of itself whatever is wanted, and signs whatever is wanted."""

    def __init__(
        self, attributes: int = int(tpm.AK_REQUIRED), template: str = "ecc256:ecdsa-sha256:null"
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        numbers = self.key.public_key().public_numbers()
        public = TPMT_PUBLIC.parse(template, objectAttributes=int(tpm.AK_REQUIRED))
        public.objectAttributes = attributes
        public.unique.ecc = TPMS_ECC_POINT(x=numbers.x.to_bytes(32), y=numbers.y.to_bytes(32))
        self.public = bytes(public.marshal())

    def quote(self, qualifying: bytes, pcrs: dict[int, bytes], **marks: bytes) -> dict[str, Any]:
        """Make up a quote over PCR values that no TPM has."""
        attest = made_up_attest(qualifying, pcrs, **marks)
        return quoted(Quote(attest, self.sign(attest), sorted(pcrs.items())))

    def sign(self, message: bytes) -> bytes:
        """Sign as a TPM would; returns a TPMT_SIGNATURE."""
        r, s = decode_dss_signature(self.key.sign(message, ec.ECDSA(hashes.SHA256())))
        sized = b"".join(_sized(part.to_bytes(32)) for part in (r, s))
        return bytes.fromhex("0018000b") + sized  # ECDSA, SHA-256


def made_up_attest(
    qualifying: bytes, pcrs: dict[int, bytes], *, magic: bytes = b"\xffTCG", kind: bytes = b"\x80\x18"
) -> bytes:
    """Write a TPMS_ATTEST of type quote (TPM 2.0 part 2, section 10.12) by hand."""
    digest = hashes.Hash(hashes.SHA256())
    for _, value in sorted(pcrs.items()):
        digest.update(value)
    clock = struct.pack(">QIIB", 1000, 0, 0, 1)
    return b"".join(
        (
            magic,
            kind,
            _sized(b"\x00\x0b" + bytes(32)),
            _sized(qualifying),
            clock,
            bytes(8),
            tpm.pcr_selection(pcrs),
            _sized(digest.finalize()),
        )
    )


def _sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


@dataclass
class Prey:
    """One enrolled VM, running on a machine in the attacker's hands. Lies come first, ``attacker`` after them."""

    office: Owner
    machine: SnpMachine
    svsm: Svsm | None = None
    vtpm: Vtpm | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def attacker(self, office: Owner | None = None, post: Post | None = None) -> Attacker:
        """Take the VM's place; the TPM has room for one client, so the one before is put away."""
        self.stack.close()
        opened = None
        if self.vtpm is not None:
            opened = self.stack.enter_context(
                open_vtpm(tcti=self.vtpm.tcti, event_log=self.vtpm.event_log_path)
            )
        return Attacker(office or self.office, self.machine, self.svsm, opened, post)

    @property
    def tpm(self) -> Vtpm:
        assert self.vtpm is not None
        return self.vtpm

    @property
    def monitor(self) -> Svsm:
        assert self.svsm is not None
        return self.svsm


@contextlib.contextmanager
def closing(prey: Prey) -> Iterator[Prey]:
    """Put the TPM's client away, whatever the story did."""
    with prey.stack:
        yield prey
