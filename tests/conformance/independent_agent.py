#!/usr/bin/env python3
"""Another agent, written from docs/protocol.md and docs/conformance.md alone: it shares no code with ours.

::

    independent_agent.py unlock|dry-run|enrol --config FILE

``enrol`` reads an operator's code and an existing passphrase from stdin, a line each. It asks the first verifier of FILE, at its first URL, and prints one JSON object: how each volume was proved, or the
verdict. It serves to show that the documents suffice, and to be read; an initramfs wants more (budgets, several verifiers,
memory that is not swapped, power off where the cap fails).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import tomllib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import requests
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Message = dict[str, Any]

SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
SERVICE: Final = "c476f1eb-0123-45a5-9641-b4e7dde5bfe3"
CAP: Final = b"another agent's cap"
TIMEOUT_S: Final = 20
TRIES: Final = 5


def sha256(data: bytes) -> bytes:
    """Hash with SHA-256."""
    return hashlib.sha256(data).digest()


def encode(message: Any) -> bytes:  # noqa: ANN401 - a message, or a value in one
    """Write a message in its one form."""
    plain = json.dumps(
        message, default=lambda value: b64encode(value).decode(), separators=(",", ":"), ensure_ascii=False
    )
    return plain.encode()


def decode(body: bytes, kinds: Mapping[str, tuple[str, ...]]) -> Message:
    """Read a message of one of these types, with these fields in this order, and in its one form."""
    message: Message = json.loads(body)
    fields = kinds.get(message["type"])
    present = tuple(name for name in fields or () if name in message)
    one_form = tuple(message) == ("type", *present) and encode(message) == body
    if fields is None or not one_form or message.get("version", 1) != 1:
        raise SystemExit(f"not a message of ours: {body[:200]!r}")
    return message


def unbase64(text: str) -> bytes:
    """Read a byte string, which has one form."""
    data = b64decode(text, validate=True)
    if b64encode(data).decode() != text:
        raise SystemExit("loose base64")
    return data


def ask(verifier: Message, path: str, body: bytes) -> tuple[bytes, bytes]:
    """Send a request; give the reply and the key that signed it. What is not signed is no answer."""
    response = requests.post(verifier["urls"][0] + path, body, timeout=TIMEOUT_S, allow_redirects=False)
    reply, header = response.content, response.headers.get("Kagimori-Signature", "")
    for key in map(unbase64, verifier["keys"]):
        start = f"ed25519; key={sha256(key)[:8].hex()}; sig="
        if header.startswith(start):
            label = f"kagimori/1/reply/{json.loads(reply)['type']}".encode()
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(
                    unbase64(header.removeprefix(start)), label + b"\0" + sha256(body) + reply
                )
            except InvalidSignature:
                continue
            return reply, key
    raise SystemExit(f"away: HTTP {response.status_code} without a signature that counts")


def report(root: Path, inblob: bytes, *, service: bool) -> dict[str, bytes]:
    """Ask configfs-tsm for a report: the guest's own, or the SVSM's with the vTPM's manifest."""
    item = root / "report" / f"another-{os.getpid()}"
    item.mkdir()
    try:
        if service:
            (item / "service_provider").write_text("svsm")
            (item / "service_guid").write_text(SERVICE)
        (item / "inblob").write_bytes(inblob)
        blobs = {"report": (item / "outblob").read_bytes()}
        if service:
            blobs["manifest"] = (item / "manifestblob").read_bytes()
        return blobs | {"certificates": (item / "auxblob").read_bytes()}
    finally:
        item.rmdir()


class Tpm:
    """The vTPM: EK of the TCG's template L-1, a fresh AK, a quote, a credential opened, the cap."""

    def __init__(self, config: Message) -> None:
        """Open it and make both keys."""
        from tpm2_pytss import constants, types
        from tpm2_pytss.ESAPI import ESAPI

        os.environ.setdefault("TSS2_LOG", "all+none")
        self._constants: Any = constants
        self._types: Any = types
        self._esapi: Any = ESAPI(config["tcti"])
        self._cap_pcr = constants.ESYS_TR(config.get("cap_pcr", 15))
        self.event_log = Path(config["event_log"]).read_bytes()
        ek: Any = types.TPMT_PUBLIC.parse(
            "rsa2048:aes128cfb",
            objectAttributes="fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|restricted|decrypt",
            authPolicy=bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"),
        )
        ek.unique.rsa = bytes(256)
        ak: Any = types.TPMT_PUBLIC.parse(
            "ecc256:ecdsa-sha256:null",
            objectAttributes="fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign",
        )
        ak.unique.ecc = types.TPMS_ECC_POINT(x=os.urandom(32), y=os.urandom(32))
        self._ek, self.ek_public = self._create(ek)
        self._ak, self.ak_public = self._create(ak)

    def quote(self, selection: bytes, qualifying_data: bytes) -> Message:
        """Quote the PCRs of a challenge, with their values; both are taken again if a PCR changes meanwhile."""
        types = self._types
        chosen, _ = types.TPML_PCR_SELECTION.unmarshal(selection)
        indices = [n for n in range(24) if int.from_bytes(selection[-3:], "little") >> n & 1]
        for _ in range(TRIES):
            values = [self._pcr(index) for index in indices]
            attest, signature = self._esapi.quote(self._ak, chosen, qualifying_data)
            if bytes(attest)[-32:] == sha256(b"".join(values)):
                return {
                    "quote": {"attest": bytes(attest), "signature": bytes(signature.marshal())},
                    "pcrs": [{"index": n, "digest": value} for n, value in zip(indices, values, strict=True)],
                    "event_log": self.event_log,
                }
        raise SystemExit("PCRs keep changing")

    def activate(self, credential: Message) -> bytes:
        """Open a credential: TPM2_PolicySecret for the EK's policy, then TPM2_ActivateCredential."""
        types, constants, esapi = self._types, self._constants, self._esapi
        identity, _ = types.TPM2B_ID_OBJECT.unmarshal(unbase64(credential["id_object"]))
        secret, _ = types.TPM2B_ENCRYPTED_SECRET.unmarshal(unbase64(credential["encrypted_secret"]))
        tr = constants.ESYS_TR
        session = esapi.start_auth_session(
            tr.NONE, tr.NONE, constants.TPM2_SE.POLICY, None, constants.TPM2_ALG.SHA256
        )
        try:
            esapi.policy_secret(tr.ENDORSEMENT, session, expiration=0)
            opened = esapi.activate_credential(
                self._ak, self._ek, identity, secret, session1=tr.PASSWORD, session2=session
            )
            return bytes(opened)
        finally:
            esapi.flush_context(session)

    def cap(self) -> None:
        """Close this boot's chance: nothing that runs later may ask again."""
        self._esapi.pcr_event(self._cap_pcr, CAP)
        if self._pcr(int(self._cap_pcr)) == bytes(32):
            raise SystemExit("the cap PCR is still zero: power off")

    def close(self) -> None:
        """Flush what was made."""
        for handle in (self._ak, self._ek):
            self._esapi.flush_context(handle)
        self._esapi.close()

    def _create(self, template: object) -> tuple[Any, bytes]:
        public = self._types.TPM2B_PUBLIC(publicArea=template)
        made = self._esapi.create_primary(None, public, self._constants.ESYS_TR.ENDORSEMENT)
        return made[0], bytes(made[1].publicArea.marshal())

    def _pcr(self, index: int) -> bytes:
        _, _, digests = self._esapi.pcr_read(f"sha256:{index}")
        return bytes(digests[0])


def collect(config: Message, tpm: Tpm | None, t0: bytes, selection: bytes) -> Message:
    """Take one report, and with a TPM one quote, that answer the challenges behind T0."""
    root = Path(config["tsm"]["root"])
    if tpm is None:
        return report(root, hashlib.sha512(b"kagimori/1/report-data\0" + t0).digest(), service=False)
    nonce = hashlib.sha512(b"kagimori/1/svsm-nonce\0" + t0).digest()
    blobs = report(root, nonce, service=True)
    if blobs["manifest"] != tpm.ek_public:
        raise SystemExit("the SVSM vouches for another TPM")
    t1 = sha256(b"kagimori/1/quote\0" + t0 + sha256(blobs["report"]) + sha256(blobs["manifest"]))
    return {**blobs, **tpm.quote(selection, t1)}


class Code:
    """An operator's code: the key that proves it, and the one verifier key that it believes."""

    def __init__(self, text: str) -> None:
        """Read it as it was typed."""
        typed = "".join(text.split()).replace("-", "").lower().translate(str.maketrans("ilo", "110"))
        bits = "".join(f"{'0123456789abcdefghjkmnpqrstvwxyz'.index(one):05b}" for one in typed)
        raw = int(bits, 2).to_bytes(30, "big")
        if len(typed) != 48 or sha256(b"kagimori/1/enrol-check\0" + raw[:26])[:4] != raw[26:]:
            raise SystemExit("a typing error in the code")
        self._key = Ed25519PrivateKey.from_private_bytes(sha256(b"kagimori/1/enrol-key\0" + raw[:16]))
        self._fingerprint = raw[16:26]

    def prove(self, key: bytes, t0: bytes) -> bytes:
        """Prove it for one exchange with the verifier that it is of."""
        if sha256(key)[:10] != self._fingerprint:
            raise SystemExit("another verifier than the code's")
        return self._key.sign(b"kagimori/1/enrol-proof\0" + t0)


def exchange(
    config: Message, purpose: str, tpm: Tpm | None, code: Code | None
) -> tuple[Message, Message, bytes, bytes]:
    """Hello, Challenge, Evidence, answer: gives the opened payload, the Sealed, TH and the Evidence."""
    verifier = config["verifiers"][0]
    mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
    public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    hello: Message = {"type": "hello", "version": 1, "vm_id": config["vm_id"], "purpose": purpose}
    hello |= {"kind": config["kind"], "hpke_public_key": public}
    if tpm is not None:
        hello |= {"ek_public": tpm.ek_public, "ak_public": tpm.ak_public}
    hello |= {"volumes": [volume["uuid"] for volume in config.get("volumes", [])], "agent": "another agent"}
    hello_body = encode(hello)
    challenge_body, key = ask(verifier, "/v1/challenge", hello_body)
    fields = ("version", "session", "nonce", "expires_in", "pcr_selection")
    challenge = decode(challenge_body, {"challenge": fields})
    # One challenge here; with more of them, their number and their hashes follow one another.
    listed = bytes([1]) + sha256(key) + sha256(challenge_body)
    t0 = hashlib.sha512(b"kagimori/1/t0\0" + sha256(hello_body) + listed).digest()
    evidence = {
        "type": "evidence",
        "version": 1,
        "hello": hello_body,
        "challenges": [{"key": key, "challenge": challenge_body}],
        **collect(config, tpm, t0, unbase64(challenge["pcr_selection"])),
    }
    if code is not None:
        evidence["enrol_proof"] = code.prove(key, t0)
    order = (
        "type",
        "version",
        "hello",
        "challenges",
        "report",
        "manifest",
        "certificates",
        "quote",
        "pcrs",
        "event_log",
        "enrol_proof",
    )
    evidence_body = encode({name: evidence[name] for name in order if name in evidence})
    reply, _ = ask(verifier, "/v1/release", evidence_body)
    sealed = decode(reply, {"sealed": ("version", "session", "credential", "sealed")})
    th = sha256(b"kagimori/1/answer\0" + t0 + sha256(challenge_body) + sha256(evidence_body))
    private = MLKEM768X25519PrivateKey(mlkem, x25519)
    payload = SUITE.decrypt(unbase64(sealed["sealed"]), private, info=b"kagimori/1/answer\0" + th)
    if tpm is not None:
        secret = tpm.activate(sealed["credential"])
        inner_key = HKDF(hashes.SHA256(), 32, th, b"kagimori/1/inner").derive(secret)
        payload = AESGCM(inner_key).decrypt(bytes(12), payload, th)
    kinds = {
        "keys": ("confirm_key", "volumes", "recovery_key"),
        "verdict": ("confirm_key", "allowed", "checks"),
    }
    return decode(payload, kinds), sealed, th, evidence_body


def confirm(config: Message, sealed: Message, th: bytes, confirm_key: bytes, outcome: str) -> bool:
    """Tell the verifier what became of its answer; gives whether its receipt says the same."""
    mac = hmac.digest(confirm_key, b"kagimori/1/confirm\0" + th + outcome.encode(), "sha256")
    told = {"type": "confirm", "version": 1, "session": sealed["session"], "outcome": outcome, "mac": mac}
    reply, _ = ask(config["verifiers"][0], "/v1/confirm", encode(told))
    kinds = {"receipt": ("version", "session", "outcome")}
    return bool(decode(reply, kinds)["outcome"] == outcome)


def prove(config: Message, payload: Message) -> list[str]:
    """Try the key on each volume, by a pipe; gives the UUIDs of those that it opens."""
    keys = {one["uuid"]: unbase64(one["unlock_key"]) for one in payload["volumes"]}
    command = ["cryptsetup", "open", "--test-passphrase", "--type", "luks2", "--key-file", "-"]
    return [
        volume["uuid"]
        for volume in config["volumes"]
        if subprocess.run([*command, volume["device"]], input=keys[volume["uuid"]], check=False).returncode
        == 0
    ]


def add(config: Message, payload: Message, passphrase: str) -> None:
    """Add keyslots for the new keys. What our own agent does beyond that, the header's tokens, is left out here."""
    fast = ["--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    devices = {volume["uuid"]: volume["device"] for volume in config["volumes"]}
    more = [payload["recovery_key"]] if "recovery_key" in payload else []
    pairs = [(one["uuid"], key) for one in payload["volumes"] for key in (one["unlock_key"], *more)]
    for uuid, key in pairs:
        reader, writer = os.pipe()
        os.write(writer, unbase64(key))
        os.close(writer)
        command = ["cryptsetup", "luksAddKey", *fast, devices[uuid], f"/dev/fd/{reader}"]
        subprocess.run(command, input=passphrase.encode(), check=True, pass_fds=(reader,))
        os.close(reader)


def main(purpose: str, config: Message) -> int:
    """Ask for this purpose; unlock caps the boot whatever happens."""
    code = Code(sys.stdin.readline()) if purpose == "enrol" else None
    passphrase = sys.stdin.readline().removesuffix("\n") if purpose == "enrol" else ""
    tpm = Tpm(config["tpm"]) if config["kind"] == "svsm-vtpm" else None
    try:
        try:
            payload, sealed, th, _ = exchange(config, purpose, tpm, code)
            if code is not None and payload["type"] == "keys":
                add(config, payload, passphrase)
            proved = prove(config, payload) if payload["type"] == "keys" else []
        finally:
            if tpm is not None and purpose == "unlock":
                tpm.cap()
    finally:
        if tpm is not None:
            tpm.close()
    outcome = "received"
    if payload["type"] == "keys":
        outcome = "opened" if len(proved) == len(config["volumes"]) else "failed"
    confirmed = confirm(config, sealed, th, unbase64(payload["confirm_key"]), outcome)
    failing = [check["id"] for check in payload.get("checks", []) if not check["ok"]]
    allowed = payload.get("allowed", outcome == "opened")
    told = {"allowed": allowed, "proved": proved, "failing": failing, "confirmed": confirmed}
    told["session"] = sha256(unbase64(sealed["session"]))[:8].hex()
    sys.stdout.write(json.dumps(told) + "\n")
    return 0 if allowed else 1


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in {"unlock", "dry-run", "enrol"} or sys.argv[2] != "--config":
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], tomllib.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))))
