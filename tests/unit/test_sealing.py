"""What is sealed to one exchange opens there and nowhere else; HPKE is checked against published numbers."""

from __future__ import annotations

import hashlib
import hmac
from typing import TypedDict

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance.making.hpke import PUBLISHED, expand, extract, key_schedule

from kagimori_protocol import sealing
from kagimori_protocol.errors import KagimoriError, Malformed, NotAuthentic
from kagimori_protocol.messages import HPKE_PUBLIC_SIZE

BINDING = hashlib.sha256(b"TH").digest()
S = bytes(range(32, 64))
PAYLOAD = b'{"type":"verdict"}'
ENTROPY = [bytes(range(32)), b"\xaa" * 32]


class Suited(TypedDict):
    """One published test vector, in hexadecimal; names as in RFC 9180."""

    kem_id: int
    kdf_id: int
    aead_id: int
    info: str
    skRm: str
    pkRm: str
    enc: str
    shared_secret: str
    key: str
    base_nonce: str
    aad: str
    pt: str
    ct: str


@pytest.fixture(scope="module")
def key() -> sealing.ResponseKey:
    """Give the key pair of one exchange."""
    return sealing.ResponseKey(ENTROPY)


def hybrid_private_key(seed: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """Expand a private key of MLKEM768-X25519 as HPKE-PQ does: 96 bytes of SHAKE-256."""
    expanded = hashlib.shake_256(seed).digest(96)
    return (
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


@pytest.mark.parametrize("vector", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_the_key_schedule_of_this_test_is_the_published_one(vector: Suited) -> None:
    """Only then may it stand in for a sender: published secret in, published key, nonce and ciphertext out."""
    suite = vector["kem_id"], vector["kdf_id"], vector["aead_id"]
    secret, info = bytes.fromhex(vector["shared_secret"]), bytes.fromhex(vector["info"])
    key, nonce = key_schedule(suite, secret, info)
    assert (key.hex(), nonce.hex()) == (vector["key"], vector["base_nonce"])
    if vector["aead_id"] == 2:
        sealed = AESGCM(key).encrypt(nonce, bytes.fromhex(vector["pt"]), bytes.fromhex(vector["aad"]))
        assert sealed.hex() == vector["ct"]


def test_the_hybrid_kem_gives_the_published_secret() -> None:
    """ML-KEM-768 and X25519 of the package, joined as HPKE-PQ words it, make the published shared secret."""
    vector: Suited = PUBLISHED["MLKEM768-X25519"]
    mlkem, x25519 = hybrid_private_key(bytes.fromhex(vector["skRm"]))
    public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    assert public.hex() == vector["pkRm"]
    assert len(public) == HPKE_PUBLIC_SIZE
    enc = bytes.fromhex(vector["enc"])
    both = mlkem.decapsulate(enc[:1088]) + x25519.exchange(X25519PublicKey.from_public_bytes(enc[1088:]))
    label = b"\\.//^\\"
    secret = hashlib.sha3_256(both + enc[1088:] + public[1184:] + label).digest()
    assert secret.hex() == vector["shared_secret"]


def test_a_response_key_opens_what_a_sender_by_the_published_numbers_sealed(key: sealing.ResponseKey) -> None:
    """Published encapsulation and secret, our suite and our info: the production code opens it."""
    vector: Suited = PUBLISHED["MLKEM768-X25519"]
    recipient = sealing.ResponseKey(ENTROPY)
    recipient._private = MLKEM768X25519PrivateKey(*hybrid_private_key(bytes.fromhex(vector["skRm"])))
    info = b"kagimori/1/answer\x00" + BINDING
    aes_key, nonce = key_schedule((0x647A, 1, 2), bytes.fromhex(vector["shared_secret"]), info)
    sealed = bytes.fromhex(vector["enc"]) + AESGCM(aes_key).encrypt(nonce, PAYLOAD, b"")
    assert recipient.open(sealed, BINDING) == PAYLOAD
    with pytest.raises(NotAuthentic):
        key.open(sealed, BINDING)


def test_the_package_opens_rfc_9180_with_x25519() -> None:
    """The same for the KEM of RFC 9180 itself, with the same KDF and AEAD."""
    vector: Suited = PUBLISHED["DHKEM(X25519)"]
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["skRm"]))
    info = bytes.fromhex(vector["info"])
    sealed = AESGCM(bytes.fromhex(vector["key"])).encrypt(bytes.fromhex(vector["base_nonce"]), PAYLOAD, b"")
    assert suite.decrypt(bytes.fromhex(vector["enc"]) + sealed, private, info=info) == PAYLOAD
    with pytest.raises(InvalidTag):
        suite.decrypt(bytes.fromhex(vector["enc"]) + sealed, private, info=info + b"\x00")


# Our own two layers


@pytest.mark.parametrize("secret", [S, None], ids=["with a TPM", "without a TPM"])
def test_an_answer_opens_where_it_should(key: sealing.ResponseKey, secret: bytes | None) -> None:
    """Both layers with S; the outer one alone where there is no TPM."""
    inner = key.open(sealing.seal(key.public, BINDING, PAYLOAD, secret), BINDING)
    assert (inner if secret is None else sealing.open_inner(inner, BINDING, secret)) == PAYLOAD
    assert (PAYLOAD in inner) == (secret is None)


def test_the_inner_layer_is_the_one_that_the_protocol_words() -> None:
    """AES-256-GCM(HKDF-SHA256(S, salt = TH, info = label), payload, aad = TH), nonce zero: computed here."""
    aes_key = expand(extract(BINDING, S), b"kagimori/1/inner", 32)
    assert sealing.open_inner(AESGCM(aes_key).encrypt(bytes(12), PAYLOAD, BINDING), BINDING, S) == PAYLOAD


def test_two_answers_to_one_exchange_differ(key: sealing.ResponseKey) -> None:
    """The outer layer is made with fresh randomness each time."""
    assert sealing.seal(key.public, BINDING, PAYLOAD, S) != sealing.seal(key.public, BINDING, PAYLOAD, S)


def refused(code: str, error: pytest.ExceptionInfo[KagimoriError]) -> None:
    """Hold that an error names its check."""
    assert error.value.code == code


def test_an_answer_for_another_exchange_does_not_open(key: sealing.ResponseKey) -> None:
    """TH is in both layers: neither opens under another."""
    other = hashlib.sha256(b"another TH").digest()
    sealed = sealing.seal(key.public, BINDING, PAYLOAD, S)
    with pytest.raises(NotAuthentic) as caught:
        key.open(sealed, other)
    refused("answer.hpke", caught)
    with pytest.raises(NotAuthentic) as caught:
        sealing.open_inner(key.open(sealed, BINDING), other, S)
    refused("answer.inner", caught)


def test_another_key_or_another_s_opens_nothing(key: sealing.ResponseKey) -> None:
    """Who commands the TPM lacks the HPKE key, who has the HPKE key lacks S."""
    sealed = sealing.seal(key.public, BINDING, PAYLOAD, S)
    with pytest.raises(NotAuthentic) as caught:
        sealing.ResponseKey([bytes(32)]).open(sealed, BINDING)
    refused("answer.hpke", caught)
    inner = key.open(sealed, BINDING)
    for other in (bytes(32), S[:31], S + b"\x00", b""):
        with pytest.raises(NotAuthentic) as caught:
            sealing.open_inner(inner, BINDING, other)
        refused("answer.inner", caught)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 1087, 1088, 1119, 1120, 1135, 1136, -1])
def test_a_cut_answer_is_refused_with_its_name(key: sealing.ResponseKey, size: int) -> None:
    """At every border of encapsulation, ciphertext and tag."""
    sealed = sealing.seal(key.public, BINDING, PAYLOAD, S)
    with pytest.raises(NotAuthentic) as caught:
        key.open(sealed[:size], BINDING)
    refused("answer.hpke", caught)


@settings(max_examples=30)
@given(data=st.data())
def test_a_changed_answer_is_refused(data: st.DataObject) -> None:
    """Any flipped bit of either layer, and any bytes at all, are refused by name."""
    key = sealing.ResponseKey(ENTROPY)
    sealed = sealing.seal(key.public, BINDING, PAYLOAD, S)
    inner = key.open(sealed, BINDING)
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    with pytest.raises(NotAuthentic) as caught:
        key.open(flipped(sealed, bit), BINDING)
    refused("answer.hpke", caught)
    with pytest.raises(NotAuthentic) as caught:
        sealing.open_inner(flipped(inner, bit % (8 * len(inner))), BINDING, S)
    refused("answer.inner", caught)
    garbage = data.draw(st.binary(max_size=1300))
    with pytest.raises(NotAuthentic):
        key.open(garbage, BINDING)
    with pytest.raises(NotAuthentic):
        sealing.open_inner(garbage, BINDING, S)


def flipped(data: bytes, bit: int) -> bytes:
    """Flip one bit."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_key_that_is_gone_opens_nothing() -> None:
    """After the volumes are open, the answer in the host's records is worth nothing to whoever runs next."""
    key = sealing.ResponseKey(ENTROPY)
    sealed = sealing.seal(key.public, BINDING, PAYLOAD, S)
    key.forget()
    with pytest.raises(NotAuthentic) as caught:
        key.open(sealed, BINDING)
    refused("answer.hpke", caught)


def test_a_response_key_shows_nothing(key: sealing.ResponseKey) -> None:
    """Neither in a log nor in a traceback."""
    assert repr(key) == str(key) == "ResponseKey(...)"


def test_the_same_entropy_gives_the_same_key_and_any_other_gives_another() -> None:
    """Every source counts, and where one ends and the next begins."""
    same = sealing.ResponseKey(ENTROPY).public
    assert sealing.ResponseKey(list(ENTROPY)).public == same
    whole = b"".join(ENTROPY)
    others = [
        [ENTROPY[0], b"\xab" * 32],
        [b"\x01" * 32, ENTROPY[1]],
        ENTROPY[::-1],
        ENTROPY[:1],
        [*ENTROPY, b""],
        [whole],
        [whole[:33], whole[33:]],
    ]
    publics = {sealing.ResponseKey(other).public for other in others}
    assert len(publics) == len(others)
    assert same not in publics


@pytest.mark.parametrize("entropy", [[], [b""], [bytes(31)], [bytes(31), bytes(31)]])
def test_too_little_entropy_is_refused(entropy: list[bytes]) -> None:
    """At least one source must be good by itself: halves of nothing do not add up."""
    with pytest.raises(Malformed) as caught:
        sealing.ResponseKey(entropy)
    refused("sealing.entropy", caught)


def test_one_dead_source_does_no_harm() -> None:
    """A TPM whose random numbers are missing or known weakens nothing."""
    assert sealing.ResponseKey([bytes(range(32)), b""]).public


@pytest.mark.parametrize(
    "public",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(HPKE_PUBLIC_SIZE - 1), id="a byte too few"),
        pytest.param(bytes(HPKE_PUBLIC_SIZE + 1), id="a byte too many"),
        pytest.param(b"\xff" * HPKE_PUBLIC_SIZE, id="coefficients that are too large"),
        pytest.param(bytes(HPKE_PUBLIC_SIZE), id="an X25519 key of low order"),
    ],
)
def test_a_public_key_that_is_none_is_the_senders_fault(public: bytes) -> None:
    """It comes from a Hello; the verifier names it instead of stumbling."""
    with pytest.raises(Malformed) as caught:
        sealing.seal(public, BINDING, PAYLOAD, S)
    refused("hello.hpke-key", caught)


def test_a_confirmation_is_the_mac_that_the_protocol_words() -> None:
    """HMAC-SHA256(confirm_key, label || 0x00 || TH || outcome)."""
    covered = b"kagimori/1/confirm\x00" + BINDING + b"opened"
    assert sealing.confirm_mac(S, BINDING, "opened") == hmac.digest(S, covered, "sha256")


def test_a_confirmation_of_another_outcome_key_or_answer_differs() -> None:
    """No outcome can be turned into another on its way."""
    macs = {
        sealing.confirm_mac(key, binding, outcome)
        for key in (S, bytes(32))
        for binding in (BINDING, bytes(32))
        for outcome in ("received", "opened", "failed", "reencrypted")
    }
    assert len(macs) == 16
