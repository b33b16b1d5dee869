"""VMs in software, as fast as they can be: real messages and real signatures, only the TPM is a pair of keys in memory.

A swtpm makes a few quotes a second, and a verifier is to be given hundreds. Reports are signed by the simulator's own
root, quotes by a fresh P-256 AK (what kagimori-agent makes), and credentials are opened with the EK's private key. The
verifier cannot tell the difference, and runs unmodified.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from msgspec import UNSET

from kagimori_protocol import messages, sealing, tpm, transcript
from kagimori_protocol.messages import Challenge, Keys, Kind, Outcome, PcrValue, Quote, Sealed

if TYPE_CHECKING:
    from kagimori_simulator.event_log import MeasuredBoot
    from kagimori_simulator.machine import SnpMachine

_ATTRIBUTES: Final = int(tpm.AK_REQUIRED) | 0x40  # userWithAuth, as kagimori-agent asks for
_ECDSA_SHA256: Final = "0018000b"
_NIST_P256: Final = "0003"
_HASH_SIZE: Final = 32


class SoftwareTpm:
    """An EK and the AKs below it. ``ek_public`` is a TPMT_PUBLIC of template L-1."""

    def __init__(self) -> None:
        """Make the EK; takes a tenth of a second."""
        self._ek = rsa.generate_private_key(65537, 2048)
        modulus = self._ek.public_key().public_numbers().n.to_bytes(tpm.EK_UNIQUE_SIZE, "big")
        self.ek_public = tpm.EK_TEMPLATE_L1[: -tpm.EK_UNIQUE_SIZE] + modulus

    def activate(self, credential: messages.Credential, name: bytes) -> bytes:
        """TPM2_ActivateCredential: give the secret (TPM 2.0 part 1, section 24). Its MAC is not checked: time is measured."""
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\x00")
        seed = self._ek.decrypt(credential.encrypted_secret[2:], oaep)
        key = kdfa(seed, b"STORAGE", name, 16)
        sealed = credential.id_object[2 + 2 + _HASH_SIZE :]
        decryptor = Cipher(AES(key), CFB(bytes(16))).decryptor()
        return (decryptor.update(sealed) + decryptor.finalize())[2:]


def kdfa(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """KDFa of TPM 2.0 part 1, section 11.4.10.2, with SHA-256."""
    return KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=size,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    ).derive(key)


@dataclass(frozen=True)
class Vm:
    """What is the VM's own: its id, its volume, what it boots, and the PCR values that come of it."""

    vm_id: str
    uuid: str
    event_log: bytes
    pcrs: dict[int, bytes]

    @classmethod
    def booting(cls, vm_id: str, uuid: str, boot: MeasuredBoot | None) -> Vm:
        """Make a VM that boots ``boot``, or one without a TPM."""
        if boot is None:
            return cls(vm_id, uuid, b"", {})
        return cls(vm_id, uuid, boot.event_log(), {index: boot.pcr(index) for index in range(16)})


class Attempt:
    """One exchange of one VM, from its Hello to its Confirm."""

    def __init__(self, vm: Vm, vtpm: SoftwareTpm | None, key: sealing.ResponseKey) -> None:
        """Make an AK and a Hello. ``key`` may serve other attempts too, to spare the generator: an agent's is fresh."""
        self._vm = vm
        self._vtpm = vtpm
        self.key = key
        self._ak = ec.generate_private_key(ec.SECP256R1())
        self._ak_public = _ak_public(self._ak)
        self._binding = b""
        kind: Kind = "snp-direct" if vtpm is None else "svsm-vtpm"
        self.hello = messages.encode(
            messages.Hello(
                version=messages.VERSION,
                vm_id=vm.vm_id,
                purpose="unlock",
                kind=kind,
                hpke_public_key=self.key.public,
                ek_public=UNSET if vtpm is None else vtpm.ek_public,
                ak_public=UNSET if vtpm is None else self._ak_public,
                volumes=[vm.uuid],
                agent="kagimori-bench",
            )
        )

    def evidence(self, machine: SnpMachine, public_key: bytes, body: bytes) -> bytes:
        """Answer a Challenge from a fresh boot of ``machine``; ``public_key`` is the verifier's."""
        machine.reboot()
        challenge = messages.decode(Challenge, body)
        t0 = transcript.t0(self.hello, [(public_key, body)])
        parts = self._direct(machine, t0) if self._vtpm is None else self._svsm(machine, t0, challenge)
        evidence = messages.encode(
            messages.Evidence(
                version=messages.VERSION,
                hello=self.hello,
                challenges=[messages.SignedChallenge(key=public_key, challenge=body)],
                **parts,  # type: ignore[arg-type]  # fields of Evidence, by name
            )
        )
        self._binding = transcript.answer_binding(t0, body, evidence)
        return evidence

    def confirm(self, body: bytes, outcome: Outcome = "opened") -> bytes:
        """Open an answer that must hold keys, and make its Confirm."""
        sealed = messages.decode_answer(body)
        if not isinstance(sealed, Sealed):
            raise TypeError(body)
        inner = self.key.open(sealed.sealed, self._binding)
        if self._vtpm is not None and sealed.credential is not UNSET:
            secret = self._vtpm.activate(sealed.credential, tpm.object_name(self._ak_public))
            inner = sealing.open_inner(inner, self._binding, secret)
        keys = messages.decode_payload(inner)
        if not isinstance(keys, Keys):
            raise TypeError(keys)
        mac = sealing.confirm_mac(keys.confirm_key, self._binding, outcome)
        return messages.encode(
            messages.Confirm(version=messages.VERSION, session=sealed.session, outcome=outcome, mac=mac)
        )

    def _direct(self, machine: SnpMachine, t0: bytes) -> dict[str, object]:
        report = machine.report(transcript.direct_report_data(t0), 0)
        return {"report": report, "certificates": machine.certificate_table()}

    def _svsm(self, machine: SnpMachine, t0: bytes, challenge: Challenge) -> dict[str, object]:
        assert self._vtpm is not None  # noqa: S101 - the caller has looked
        manifest = self._vtpm.ek_public
        nonce = transcript.svsm_nonce(t0)
        report = machine.report(transcript.svsm_report_data(nonce, manifest), 0)
        qualifying = transcript.quote_qualifying_data(t0, report, manifest)
        values = [self._vm.pcrs[index] for index in tpm.selected_pcrs(challenge.pcr_selection)]
        attest = _attest(qualifying, challenge.pcr_selection, values)
        r, s = decode_dss_signature(self._ak.sign(attest, ec.ECDSA(hashes.SHA256())))
        signature = (
            bytes.fromhex(_ECDSA_SHA256) + _sized(r.to_bytes(32, "big")) + _sized(s.to_bytes(32, "big"))
        )
        indices = tpm.selected_pcrs(challenge.pcr_selection)
        return {
            "report": report,
            "manifest": manifest,
            "certificates": machine.certificate_table(),
            "quote": Quote(attest=attest, signature=signature),
            "pcrs": [PcrValue(index=i, digest=value) for i, value in zip(indices, values, strict=True)],
            "event_log": self._vm.event_log,
        }


def _ak_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write the TPMT_PUBLIC of a restricted P-256 signing key."""
    numbers = key.public_key().public_numbers()
    head = f"0023000b{_ATTRIBUTES:08x}00000010{_ECDSA_SHA256}{_NIST_P256}0010"
    return bytes.fromhex(head) + b"".join(
        _sized(value.to_bytes(32, "big")) for value in (numbers.x, numbers.y)
    )


def _attest(qualifying: bytes, selection: bytes, values: list[bytes]) -> bytes:
    """Write the TPMS_ATTEST of a quote."""
    digest = hashlib.sha256(b"".join(values)).digest()
    signer = _sized(b"\x00\x0b" + secrets.token_bytes(_HASH_SIZE))
    clock = secrets.token_bytes(16) + b"\x01"
    return b"\xffTCG\x80\x18" + signer + _sized(qualifying) + clock + bytes(8) + selection + _sized(digest)


def _sized(part: bytes) -> bytes:
    return len(part).to_bytes(2, "big") + part
