"""The bound: one loop in one process that does nothing but the cryptography that one attestation needs each time.

Counted is what depends on this exchange alone, so that no verifier can spare it: see ``OPERATIONS``. Not counted is what a
verifier may remember by its bytes (the signatures of VCEK, ASK, ARK and revocation list: RSA-4096, PSS), and everything that
is no cryptography: HTTP, JSON, TPM structures, event logs, policy, the database. Keys are loaded ahead, except those that
arrive with the evidence (AK, EK, HPKE key), which are loaded from bytes as a verifier must.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from typing import Final

from bench.guest import kdfa
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kagimori_protocol.messages import Kind
from kagimori_protocol.sealing import ResponseKey

OPERATIONS: Final = """\
report: ECDSA P-384 with SHA-384 over 672 bytes; quote: ECDSA P-256, AK loaded from its point;
credential: RSA-2048 OAEP, two KDFa, AES-CFB, HMAC; answer: AES-256-GCM and HPKE (ML-KEM-768 + X25519, HKDF-SHA256,
AES-256-GCM); boxes (HKDF-SHA256 and AES-256-GCM): token sealed, token opened, unlock key opened, confirm key sealed,
confirm key opened; Confirm: HMAC; three replies: Ed25519; SHA-256 of Hello, Evidence (60 kB) and event log (34 kB), of REPORT_DATA and
quote; snp-direct has no quote, credential, event log and inner layer"""

_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_MLKEM: Final = 1184
_SIZES: Final[dict[Kind, int]] = {"svsm-vtpm": 60_000, "snp-direct": 9_000}


def attestation(kind: Kind) -> Callable[[], None]:
    """Give a function that does the cryptography of one attestation of this kind."""
    p384, p256 = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
    report, attest = os.urandom(0x2A0), os.urandom(145)
    report_key, report_signature = p384.public_key(), p384.sign(report, ec.ECDSA(hashes.SHA384()))
    point = p256.public_key().public_numbers()
    quote_signature = p256.sign(attest, ec.ECDSA(hashes.SHA256()))
    ek = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\x00")
    hpke = ResponseKey([os.urandom(64)]).public
    signing, kek = Ed25519PrivateKey.generate(), os.urandom(32)
    hello, evidence, log, payload = (os.urandom(size) for size in (2800, _SIZES[kind], 34_000, 200))
    reply, name, with_tpm = os.urandom(300), os.urandom(34), kind == "svsm-vtpm"

    def sealed(content: bytes) -> tuple[bytes, bytes]:
        salt = os.urandom(32)
        key = HKDF(hashes.SHA256(), 32, salt, b"label").derive(kek)
        return salt, AESGCM(key).encrypt(bytes(12), content, b"")

    def opened(box: tuple[bytes, bytes]) -> None:
        key = HKDF(hashes.SHA256(), 32, box[0], b"label").derive(kek)
        AESGCM(key).decrypt(bytes(12), box[1], b"")

    token, unlock_key = sealed(os.urandom(104)), sealed(os.urandom(32))

    def credential() -> bytes:
        key = rsa.RSAPublicNumbers(ek.e, ek.n).public_key()
        seed, secret = os.urandom(32), os.urandom(32)
        key.encrypt(seed, oaep)
        encryptor = Cipher(AES(kdfa(seed, b"STORAGE", name, 16)), CFB(bytes(16))).encryptor()
        encrypted = encryptor.update(b"\x00\x20" + secret) + encryptor.finalize()
        hmac.new(kdfa(seed, b"INTEGRITY", b"", 32), encrypted + name, hashlib.sha256).digest()
        return secret

    def once() -> None:
        hashlib.sha256(hello).digest()
        sealed(os.urandom(104))
        signing.sign(reply)
        opened(token)
        hashlib.sha256(evidence).digest()
        hashlib.sha512(hello[:378]).digest()
        report_key.verify(report_signature, report, ec.ECDSA(hashes.SHA384()))
        inner = payload
        if with_tpm:
            public = ec.EllipticCurvePublicNumbers(point.x, point.y, ec.SECP256R1()).public_key()
            public.verify(quote_signature, attest, ec.ECDSA(hashes.SHA256()))
            hashlib.sha256(log).digest()
            key = HKDF(hashes.SHA256(), 32, name, b"inner").derive(credential())
            inner = AESGCM(key).encrypt(bytes(12), payload, name)
        opened(unlock_key)
        recipient = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(hpke[:_MLKEM]),
            X25519PublicKey.from_public_bytes(hpke[_MLKEM:]),
        )
        _SUITE.encrypt(inner, recipient, info=name)
        box = sealed(os.urandom(32))
        signing.sign(reply)
        opened(box)
        hmac.new(kek, reply, hashlib.sha256).digest()
        signing.sign(reply)

    return once


def measure(kind: Kind, seconds: float) -> tuple[float, float]:
    """Run the loop; gives attestations a second by the clock, and processor milliseconds of each."""
    once = attestation(kind)
    once()
    count, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        once()
        count += 1
    return count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1000
