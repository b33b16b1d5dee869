"""A TPM made of files: an attacker that holds the private half of an EK opens what is sealed to it, for any AK.

It is what a forged manifest is good for. Without it a story about one would end at "an answer went out"; with it the
attacker reads the unlock key, or does not.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from tests.attacks.attacker import SoftwareAk

from kagimori_protocol.tpm import EK_TEMPLATE_L1, EK_UNIQUE_SIZE, object_name

_DIGEST_SIZE = 32


class SoftwareTpm:
    """An EK of template L-1 and an AK with perfect attributes, both out of files."""

    def __init__(self) -> None:
        self.key = _rsa_key()
        modulus = self.key.public_key().public_numbers().n.to_bytes(EK_UNIQUE_SIZE, "big")
        self.ek_public = EK_TEMPLATE_L1[:-EK_UNIQUE_SIZE] + modulus
        self.ak = SoftwareAk()

    def activate(self, id_object: bytes, encrypted_secret: bytes) -> bytes:
        """Do what TPM2_ActivateCredential does (TPM 2.0 part 1, section 24), but for whoever asks."""
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\x00")
        seed = self.key.decrypt(encrypted_secret[2:], oaep)
        name = object_name(self.ak.public)
        integrity, encrypted = id_object[4 : 4 + _DIGEST_SIZE], id_object[4 + _DIGEST_SIZE :]
        mac_key = _kdfa(seed, b"INTEGRITY", b"", 256)
        assert hmac.compare_digest(hmac.digest(mac_key, encrypted + name, "sha256"), integrity)
        cipher = Cipher(algorithms.AES(_kdfa(seed, b"STORAGE", name, 128)), CFB(bytes(16))).decryptor()
        return (cipher.update(encrypted) + cipher.finalize())[2:]


@functools.cache
def _rsa_key() -> rsa.RSAPrivateKey:
    """Make the EK once: that takes a while, and an attacker may use it as often as it likes."""
    return rsa.generate_private_key(public_exponent=65537, key_size=EK_UNIQUE_SIZE * 8)


def _kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa (TPM 2.0 part 1, section 11.4.10.2) for at most 256 bits."""
    message = struct.pack(">I", 1) + label + b"\x00" + context + struct.pack(">I", bits)
    return hmac.digest(key, message, hashlib.sha256)[: bits // 8]
