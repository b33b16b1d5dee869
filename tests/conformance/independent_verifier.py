#!/usr/bin/env python3
"""Another verifier, written from docs/protocol.md and docs/conformance.md alone: it shares no code with ours.

::

    independent_verifier.py --vm ID --volume UUID --key-file FILE [--pcrs 0,1,...] [--refuse]

It serves one VM and one volume, and prints its URL and its public key as one JSON object. It speaks the whole protocol and
appraises next to nothing: **no report's signature, no measurement, no event log**. It serves to show that the documents
suffice, and to test an agent; whoever wants to release keys adds steps 2 to 10 of section 6. With ``--refuse`` every
verdict is no.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import secrets
import struct
import sys
import threading
import time
from base64 import b64decode, b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Message = dict[str, Any]

SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
FIELDS: Final = {
    "hello": [
        "version",
        "vm_id",
        "purpose",
        "kind",
        "hpke_public_key",
        "ek_public",
        "ak_public",
        "volumes",
        "agent",
    ],
    "challenge": ["version", "session", "nonce", "expires_in", "pcr_selection"],
    "evidence": [
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
    ],
    "confirm": ["version", "session", "outcome", "mac"],
}
OPTIONAL: Final = {
    "ek_public",
    "ak_public",
    "manifest",
    "certificates",
    "quote",
    "pcrs",
    "event_log",
    "enrol_proof",
}
LIFETIME_S: Final = 120
MAX_BODY: Final = 1 << 20
REPORT_DATA: Final = slice(0x50, 0x90)
EXTRA_DATA: Final = slice(8, 42)
"""Of a TPMS_ATTEST whose qualifiedSigner is left out below: a TPM2B of 32 bytes."""
MLKEM_SIZE: Final = 1184


class DeniedError(Exception):
    """The sender is told a code and nothing else."""


class Answer(NamedTuple):
    """What a session got, and what its Confirm is held against."""

    evidence: bytes
    body: bytes
    th: bytes
    confirm_key: bytes


def sha256(data: bytes) -> bytes:
    """Hash with SHA-256."""
    return hashlib.sha256(data).digest()


def sha512(data: bytes) -> bytes:
    """Hash with SHA-512."""
    return hashlib.sha512(data).digest()


def pcr_selection(indices: list[int]) -> bytes:
    """TPML_PCR_SELECTION with one entry: the SHA-256 bank, a bitmap of three bytes."""
    return struct.pack(">IHB", 1, 0x000B, 3) + sum(1 << index for index in indices).to_bytes(3, "little")


def sized(data: bytes) -> bytes:
    """TPM2B: a size of two bytes in front."""
    return struct.pack(">H", len(data)) + data


def encode(message: Any) -> bytes:  # noqa: ANN401 - a message, or a value in one
    """Write a message in its one form."""
    plain = json.dumps(
        message, default=lambda value: b64encode(value).decode(), separators=(",", ":"), ensure_ascii=False
    )
    return plain.encode()


def decode(kind: str, body: bytes) -> Message:
    """Read a message of this type, with its fields in order, and in its one form."""
    try:
        message = json.loads(body)
        expected = ["type", *(name for name in FIELDS[kind] if name in message or name not in OPTIONAL)]
        if list(message) != expected or message["type"] != kind or encode(message) != body:
            raise DeniedError("malformed")
    except (ValueError, TypeError, RecursionError):
        raise DeniedError("malformed") from None
    if message["version"] != 1:
        raise DeniedError("unsupported-version")
    return dict(message)


def unbase64(text: str) -> bytes:
    """Read a byte string, which has one form."""
    try:
        data = b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise DeniedError("malformed") from None
    if b64encode(data).decode() != text:
        raise DeniedError("malformed")
    return data


def make_credential(ek_public: bytes, ak_public: bytes, secret: bytes) -> Message:
    """TPM2_MakeCredential (TPM 2.0 part 1, section 24) for an EK of the TCG's template L-1 and an AK with a SHA-256 name."""
    name = struct.pack(">H", 0x000B) + sha256(ak_public)
    modulus = int.from_bytes(ek_public[-256:], "big")
    seed = secrets.token_bytes(32)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0")
    encrypted = rsa.RSAPublicNumbers(65537, modulus).public_key().encrypt(seed, oaep)

    def kdfa(label: bytes, context: bytes, bits: int) -> bytes:
        parts = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits)
        return hmac.digest(seed, parts, "sha256")[: bits // 8]

    cipher = Cipher(algorithms.AES(kdfa(b"STORAGE", name, 128)), CFB(bytes(16))).encryptor()
    identity = cipher.update(sized(secret)) + cipher.finalize()
    integrity = hmac.digest(kdfa(b"INTEGRITY", b"", 256), identity + name, "sha256")
    return {"id_object": sized(sized(integrity) + identity), "encrypted_secret": sized(encrypted)}


class Verifier:
    """One VM, one volume, one key. Challenges are remembered in their tokens, answers in memory."""

    def __init__(
        self, vm_id: str, volume: str, unlock_key: bytes, pcr_selection: bytes, *, refuse: bool
    ) -> None:
        """Make fresh keys of its own."""
        self._vm_id, self._volume, self._unlock_key, self._refuse = vm_id, volume, unlock_key, refuse
        self._pcr_selection = pcr_selection
        self._signing = Ed25519PrivateKey.generate()
        self._token_key = secrets.token_bytes(32)
        self._answers: dict[bytes, Answer] = {}
        self._lock = threading.Lock()
        self.public_key = self._signing.public_key().public_bytes_raw()

    def reply(self, path: str, body: bytes) -> tuple[int, bytes, str]:
        """Answer a request: HTTP status, body, and the header that makes it an answer."""
        session = b""
        status = 200
        try:
            if path == "/v1/challenge":
                reply = encode(self._challenge(body))
            elif path == "/v1/release":
                reply, session = self._release(body)
            else:
                reply = encode(self._confirm(body))
        except DeniedError as denied:
            status, code = 403, str(denied)
            denial: Message = {"type": "denial", "version": 1, "session": session, "code": code}
            if code == "unsupported-version":
                denial = {"type": code, "version": 1, "versions": [1]}
            reply = encode(denial)
        return status, reply, self._signed(body, reply)

    def _signed(self, request: bytes, reply: bytes) -> str:
        label = f"kagimori/1/reply/{json.loads(reply)['type']}".encode()
        signature = self._signing.sign(label + b"\0" + sha256(request) + reply)
        return f"ed25519; key={sha256(self.public_key)[:8].hex()}; sig={b64encode(signature).decode()}"

    def _challenge(self, body: bytes) -> Message:
        hello = decode("hello", body)
        if hello["vm_id"] != self._vm_id:
            raise DeniedError("unknown-vm")
        challenge: Message = {
            "type": "challenge",
            "version": 1,
            "session": b"",
            "nonce": secrets.token_bytes(32),
        }
        challenge |= {"expires_in": LIFETIME_S, "pcr_selection": self._pcr_selection}
        bound = sha256(body) + sha256(encode(challenge))
        issued = struct.pack(">Q", int(time.time()))
        sealed = AESGCM(self._token_key).encrypt(nonce := secrets.token_bytes(12), issued + bound, b"")
        return challenge | {"session": nonce + sealed}

    def _own(self, evidence: Message, hello_body: bytes) -> bytes:
        """Find our own challenge, and hold its token against clock, Hello and Challenge."""
        for one in evidence["challenges"]:
            body = unbase64(one["challenge"])
            if unbase64(one["key"]) != self.public_key:
                continue
            challenge = decode("challenge", body)
            token = unbase64(challenge["session"])
            try:
                content = AESGCM(self._token_key).decrypt(token[:12], token[12:], b"")
            except Exception:  # noqa: BLE001 - whatever it is, it is not our token
                raise DeniedError("stale-session") from None
            bound = sha256(hello_body) + sha256(encode(challenge | {"session": ""}))
            if content[8:] != bound:
                raise DeniedError("not-authentic")
            if not 0 <= time.time() - struct.unpack(">Q", content[:8])[0] <= LIFETIME_S:
                raise DeniedError("stale-session")
            return body
        raise DeniedError("stale-session")

    def _release(self, body: bytes) -> tuple[bytes, bytes]:
        evidence = decode("evidence", body)
        hello_body = unbase64(evidence["hello"])
        hello = decode("hello", hello_body)
        own = self._own(evidence, hello_body)
        listed = b"".join(
            sha256(unbase64(one["key"])) + sha256(unbase64(one["challenge"]))
            for one in evidence["challenges"]
        )
        count = bytes([len(evidence["challenges"])])
        t0 = sha512(b"kagimori/1/t0\0" + sha256(hello_body) + count + listed)
        if hello["vm_id"] != self._vm_id or set(hello["volumes"]) - {self._volume}:
            raise DeniedError("not-authentic")
        _require_tie(hello, evidence, t0)
        th = sha256(b"kagimori/1/answer\0" + t0 + sha256(own) + sha256(body))
        session = unbase64(json.loads(own)["session"])
        with self._lock:
            if session not in self._answers:
                self._answers[session] = self._answer(hello, session, th, body)
            answer = self._answers[session]
        if answer.evidence != sha256(body):
            raise DeniedError("used-session")
        return answer.body, session

    def _answer(self, hello: Message, session: bytes, th: bytes, evidence: bytes) -> Answer:
        confirm_key = secrets.token_bytes(32)
        payload: Message = {"type": "verdict", "confirm_key": confirm_key, "allowed": not self._refuse}
        check = {"id": "refused", "ok": False, "expected": "another day", "found": "today"}
        payload |= {"checks": [check] if self._refuse else []}
        if hello["purpose"] == "unlock" and not self._refuse:
            volume = {"uuid": self._volume, "unlock_key": self._unlock_key, "header_epoch": 0}
            payload = {"type": "keys", "confirm_key": confirm_key, "volumes": [volume]}
        inner = encode(payload)
        sealed: Message = {"type": "sealed", "version": 1, "session": session}
        if "ak_public" in hello:
            secret = secrets.token_bytes(32)
            ek, ak = unbase64(hello["ek_public"]), unbase64(hello["ak_public"])
            sealed["credential"] = make_credential(ek, ak, secret)
            key = HKDF(hashes.SHA256(), 32, th, b"kagimori/1/inner").derive(secret)
            inner = AESGCM(key).encrypt(bytes(12), inner, th)
        public = unbase64(hello["hpke_public_key"])
        recipient = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:MLKEM_SIZE]),
            X25519PublicKey.from_public_bytes(public[MLKEM_SIZE:]),
        )
        sealed["sealed"] = SUITE.encrypt(inner, recipient, info=b"kagimori/1/answer\0" + th)
        return Answer(sha256(evidence), encode(sealed), th, confirm_key)

    def _confirm(self, body: bytes) -> Message:
        confirm = decode("confirm", body)
        answer = self._answers.get(unbase64(confirm["session"]))
        if answer is None:
            raise DeniedError("not-authentic")
        covered = b"kagimori/1/confirm\0" + answer.th + confirm["outcome"].encode()
        if not hmac.compare_digest(
            hmac.digest(answer.confirm_key, covered, "sha256"), unbase64(confirm["mac"])
        ):
            raise DeniedError("not-authentic")
        sys.stderr.write(f"confirmed {confirm['outcome']}\n")
        sys.stderr.flush()
        return {"type": "receipt", "version": 1, "session": confirm["session"], "outcome": confirm["outcome"]}


def _require_tie(hello: Message, evidence: Message, t0: bytes) -> None:
    """Require that report and quote commit to this exchange. Who signed them is not looked at."""
    report = unbase64(evidence["report"])
    expected = sha512(b"kagimori/1/report-data\0" + t0)
    if hello["kind"] == "svsm-vtpm":
        manifest = unbase64(evidence["manifest"])
        expected = sha512(sha512(b"kagimori/1/svsm-nonce\0" + t0) + manifest)
        attest = unbase64(evidence["quote"]["attest"])
        signer_size = struct.unpack(">H", attest[6:8])[0]
        t1 = sha256(b"kagimori/1/quote\0" + t0 + sha256(report) + sha256(manifest))
        if manifest != unbase64(hello["ek_public"]) or (attest[:8] + attest[8 + signer_size :])[
            EXTRA_DATA
        ] != sized(t1):
            raise DeniedError("not-authentic")
    if report[REPORT_DATA] != expected:
        raise DeniedError("not-authentic")


def server(verifier: Verifier) -> ThreadingHTTPServer:
    """Serve it on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer one request."""
            size = int(self.headers.get("Content-Length", "0"))
            if size > MAX_BODY:
                self.send_error(413)
                return
            status, body, signature = verifier.reply(self.path, self.rfile.read(size))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Kagimori-Signature", signature)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def main() -> None:
    """Serve until somebody ends it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vm", required=True)
    parser.add_argument("--volume", required=True, metavar="UUID")
    parser.add_argument("--key-file", required=True, type=Path)
    parser.add_argument("--pcrs", default="0,1,2,3,4,5,7,8,9,14,15", help="what is to be quoted")
    parser.add_argument("--refuse", action="store_true")
    options = parser.parse_args()
    selection = pcr_selection([int(index) for index in options.pcrs.split(",")])
    key = options.key_file.read_bytes()
    verifier = Verifier(options.vm, options.volume, key, selection, refuse=options.refuse)
    serving = server(verifier)
    where = {
        "url": f"http://127.0.0.1:{serving.server_port}",
        "public_key": b64encode(verifier.public_key).decode(),
    }
    sys.stdout.write(json.dumps(where) + "\n")
    sys.stdout.flush()
    serving.serve_forever()


if __name__ == "__main__":
    main()
