"""``quote verify``: quotes of every kind of key hold, and nothing in one can be changed."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from tests.desks import Done, outside, run
from tests.evidence import azure_ak

from kagimori_protocol import tpm
from kagimori_protocol.errors import Malformed
from kagimori_verifier.examine import quote as examine
from kagimori_verifier.verify import vtpm

BANKS = {"sha1": 0x4, "sha256": 0xB, "sha384": 0xC, "sha512": 0xD}
HASHES = {
    "sha1": hashes.SHA1(),  # noqa: S303 - old TPMs sign with it
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
CURVES = {256: (0x3, ec.SECP256R1()), 384: (0x4, ec.SECP384R1()), 521: (0x5, ec.SECP521R1())}
AK = 0x00050072
"""restricted, sign, fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth."""
NONCE = bytes(range(20))
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def sized(data: bytes) -> bytes:
    """Write a TPM2B."""
    return struct.pack(">H", len(data)) + data


def attest(selection: dict[str, list[int]], values: bytes, algorithm: str, nonce: bytes = NONCE) -> bytes:
    """Write a TPMS_ATTEST of type quote."""
    banks = b"".join(
        struct.pack(">HB", BANKS[bank], 3) + sum(1 << pcr for pcr in pcrs).to_bytes(3, "little")
        for bank, pcrs in selection.items()
    )
    return (
        bytes.fromhex("ff5443478018") + sized(b"\x00\x0b" + bytes(32)) + sized(nonce)
        + struct.pack(">QIIBQ", 1000, 2, 3, 1, 0x20160511) + struct.pack(">I", len(selection)) + banks
        + sized(hashlib.new(algorithm, values).digest())
    )  # fmt: skip


def public(key: Key, scheme: int, algorithm: str, attributes: int = AK) -> bytes:
    """Write the TPMT_PUBLIC of a key."""
    numbers = key.public_key().public_numbers()
    head = struct.pack(">IHHHH", attributes, 0, 0x10, scheme, BANKS[algorithm])
    if isinstance(numbers, rsa.RSAPublicNumbers):
        size = key.key_size
        return (
            struct.pack(">HH", 1, 0xB)
            + head
            + struct.pack(">HI", size, 0)
            + sized(numbers.n.to_bytes(size // 8, "big"))
        )
    curve, _ = CURVES[key.key_size]
    size = (key.key_size + 7) // 8
    point = sized(numbers.x.to_bytes(size, "big")) + sized(numbers.y.to_bytes(size, "big"))
    return struct.pack(">HH", 0x23, 0xB) + head + struct.pack(">HH", curve, 0x10) + point


def sign(key: Key, scheme: int, algorithm: str, message: bytes) -> tuple[bytes, bytes]:
    """Sign; gives the TPMT_SIGNATURE and the bare signature."""
    head = struct.pack(">HH", scheme, BANKS[algorithm])
    if isinstance(key, rsa.RSAPrivateKey):
        pad: padding.AsymmetricPadding = padding.PKCS1v15()
        if scheme == 0x16:
            pad = padding.PSS(padding.MGF1(HASHES[algorithm]), HASHES[algorithm].digest_size)
        value = key.sign(message, pad, HASHES[algorithm])
        return head + sized(value), value
    value = key.sign(message, ec.ECDSA(HASHES[algorithm]))
    size = (key.key_size + 7) // 8
    r, s = (part.to_bytes(size, "big") for part in decode_dss_signature(value))
    return head + sized(r) + sized(s), value


def pem(key: Key) -> bytes:
    """Write a public key as PEM."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@dataclass
class Desk:
    """Runs ``quote verify`` on bytes."""

    tmp: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(
        self, quote: bytes, signature: bytes, ak: bytes, nonce: str = NONCE.hex(), pcrs: object = None
    ) -> Done:
        """Verify."""
        words: list[str | Path] = ["quote", "verify", "--json", "--qualifying", nonce]
        for name, content in (("attest", quote), ("signature", signature), ("ak", ak)):
            path = self.tmp / name
            path.write_bytes(content)
            words += [f"--{name}", path]
        if pcrs is not None:
            path = self.tmp / "pcrs"
            path.write_text(json.dumps(pcrs))
            words += ["--pcrs", path]
        done = run(self.capsys, *words)
        assert "Traceback" not in done.err
        assert done.json["verified"] is (done.code == 0)
        return done

    def holds(self, *parts: Any, **more: Any) -> Any:  # noqa: ANN401 - passed on
        """Verify what must hold."""
        done = self(*parts, **more)
        assert (done.code, done.json["reasons"]) == (0, [])
        return done.json

    def fails(self, *checks: str, code: int = 1, parts: tuple[Any, ...], **more: Any) -> Any:  # noqa: ANN401 - passed on
        """Verify what must fail by exactly these checks."""
        done = self(*parts, **more)
        assert done.code == code, done.out
        assert [reason.partition(":")[0] for reason in done.json["reasons"]] == list(checks)
        return done.json


@pytest.fixture
def quote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Give the command."""
    return Desk(tmp_path, capsys)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    """Give an RSA key."""
    return rsa.generate_private_key(65537, 2048)


def cloud(vectors: Path) -> tuple[bytes, bytes, bytes]:
    """Give a real quote, its signature and its AK."""
    directory = vectors / "gce-tpm" / "gce-cos-85-nonce9009"
    names = ("quote_sha256.msg", "quote_sha256.sig", "ak.tpmt_public")
    quote, signature, ak = ((directory / name).read_bytes() for name in names)
    return quote, signature, ak


# Keys and containers of every kind


@pytest.mark.parametrize("algorithm", BANKS)
@pytest.mark.parametrize(
    "scheme", [0x14, 0x16, 256, 384, 521], ids=["RSASSA", "RSAPSS", "P-256", "P-384", "P-521"]
)
def test_a_quote_holds_whatever_signed_it_and_in_every_container(
    scheme: int, algorithm: str, key: rsa.RSAPrivateKey, quote: Desk
) -> None:
    """The digest of the PCR values is made with the hash of the signature, whatever the banks are."""
    signer: Key = key if scheme < 0x100 else ec.generate_private_key(CURVES[scheme][1])
    kind = scheme if scheme < 0x100 else 0x18
    pcrs = {
        "sha1": {str(i): bytes([i] * 20).hex() for i in range(24)},
        "sha384": {"7": "07" * 48, "8": "08" * 48},
    }
    values = bytes([0] * 20 + [10] * 20) + bytes([7] * 48 + [8] * 48)
    message = attest({"sha1": [0, 10], "sha384": [7, 8]}, values, algorithm)
    wrapped, bare = sign(signer, kind, algorithm, message)
    area = public(signer, kind, algorithm)
    der = signer.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    forms = {
        "TPMT_PUBLIC": area,
        "TPM2B_PUBLIC": sized(area),
        "PEM public key": pem(signer),
        "DER public key": der,
    }
    for form, ak in forms.items():
        for signature in (wrapped, bare):
            told = quote.holds(message, signature, ak, pcrs=pcrs)
            assert (told["ak"]["form"], told["signature"]["hash"]) == (form, algorithm)
            assert (told["ak"]["attributes"] is None) is ("key" in form)
            beside = "not covered by the quote, so not checked: PCRs 1 to 9, 11 to 23 of sha1"
            assert beside in told["notes"]
    if kind == 0x18:
        plain = wrapped[6 : 6 + (len(wrapped) - 8) // 2] + wrapped[-(len(wrapped) - 8) // 2 :]
        assert quote.holds(message, plain, area)["signature"]["form"] == "bare ECDSA signature (r, s)"
    changed = {"sha1": pcrs["sha1"] | {"10": "00" * 20}, "sha384": pcrs["sha384"]}
    quote.fails("quote.pcr-values", parts=(message, bare, area), pcrs=changed)
    quote.fails("quote.pcr-values", parts=(message, bare, area), pcrs={"sha1": pcrs["sha1"]})


def test_an_azure_quote_holds_with_the_key_that_its_report_names(vectors: Path, quote: Desk) -> None:
    """A bare signature, a key as JWK, a nonce of 48 bytes: the notes say why the pipeline takes none of it."""
    directory = vectors / "azure" / "trustee-evidence-v2"
    message, signature = ((directory / f"quote.{end}").read_bytes() for end in ("msg", "sig"))
    nonce = tpm.Attest.parse(message).extra_data.hex()
    pcrs = json.loads((directory / "pcrs_sha256.json").read_bytes())
    told = quote.holds(message, signature, azure_ak((directory / "hcl_report.bin").read_bytes()), nonce, pcrs)
    assert told["signature"] == {"form": "bare RSA signature", "scheme": "RSASSA", "hash": "sha256"}
    refusals = [
        note for note in told["notes"] if note.startswith("a verifier refuses a boot with such a quote")
    ]
    assert len(refusals) == 3


# Real quotes, changed


def test_any_changed_byte_of_a_real_quote_is_refused(vectors: Path, quote: Desk) -> None:
    """The signature covers all; magic, type and challenge are named besides; a broken frame is no quote at all."""
    message, signature, ak = cloud(vectors)
    nonce = message.index(bytes.fromhex("9009"))
    for at in range(len(message)):
        changed = message[:at] + bytes([message[at] ^ 0x01]) + message[at + 1 :]
        done = quote(changed, signature, ak, "9009")
        codes = {reason.partition(":")[0] for reason in done.json["reasons"]}
        if done.code == 2:
            assert codes <= {"quote.layout", "quote.magic", "quote.type"}
            continue
        assert "quote.signature" in codes or codes == {"quote.type"}
        assert ("quote.magic" in codes) is (at < 4)
        assert ("quote.type" in codes) is (at in (4, 5))
        assert ("quote.qualifying-data" in codes) is (at in (nonce, nonce + 1))


def test_any_changed_byte_of_a_real_signature_is_refused(vectors: Path, quote: Desk) -> None:
    """Also in its head, which says how it was made."""
    message, signature, ak = cloud(vectors)
    for at in [*range(8), *random.Random(3).sample(range(8, len(signature)), 20)]:
        changed = signature[:at] + bytes([signature[at] ^ 0x01]) + signature[at + 1 :]
        done = quote(message, changed, ak, "9009")
        assert done.code == 1
        assert done.json["reasons"][-1].startswith("quote.signature: ")


def test_any_changed_byte_of_an_ak_is_refused(vectors: Path, quote: Desk) -> None:
    """Another key, another right, or no key at all."""
    message, signature, ak = cloud(vectors)
    for at in [*range(2, 24), *random.Random(4).sample(range(24, len(ak)), 20)]:
        changed = ak[:at] + bytes([ak[at] ^ 0x04]) + ak[at + 1 :]
        done = quote(message, signature, changed, "9009")
        if done.code == 0:
            # A Name with another hash, or another right that says nothing about quotes: still the key that signed.
            assert at in range(2, 8), at
            continue
        assert all(reason.startswith(("ak.", "quote.signature: ")) for reason in done.json["reasons"])


@pytest.mark.parametrize(
    ("attributes", "wrong"),
    [
        (0x00040072, "not restricted"),
        (0x00010072, "not sign"),
        (0x00050070, "not fixedTPM"),
        (0x00050062, "not fixedParent"),
        (0x00050052, "not sensitiveDataOrigin"),
        (0x00070072, "decrypt"),
    ],
)
def test_an_ak_that_could_sign_what_no_tpm_made_is_refused(
    attributes: int, wrong: str, key: rsa.RSAPrivateKey, quote: Desk
) -> None:
    """Such a key can sign a quote that somebody wrote by hand, and its signature is as good as any."""
    attributes &= ~0x2 if wrong == "not fixedTPM" else 0xFFFFFFFF
    if wrong == "not sensitiveDataOrigin":
        attributes = AK & ~0x20
    if wrong == "not fixedParent":
        attributes = AK & ~0x10
    message = attest({"sha256": [0]}, bytes(32), "sha256")
    wrapped, _ = sign(key, 0x14, "sha256", message)
    told = quote.fails("ak.attributes", parts=(message, wrapped, public(key, 0x14, "sha256", attributes)))
    assert wrong in told["reasons"][0]
    notes = quote.holds(message, wrapped, pem(key))["notes"]
    assert any("whether it is restricted" in note for note in notes)


# What a quote must say


def test_a_quote_about_no_pcr_is_refused(key: rsa.RSAPrivateKey, quote: Desk) -> None:
    """It would prove nothing, with any values or none."""
    selections: tuple[dict[str, list[int]], ...] = ({}, {"sha256": []})
    for selection in selections:
        message = attest(selection, b"", "sha256")
        parts = (message, sign(key, 0x14, "sha256", message)[0], pem(key))
        quote.fails("quote.pcr-selection", parts=parts)
        quote.fails("quote.pcr-selection", "quote.pcr-values", parts=parts, pcrs={"0": "00" * 32})


def test_an_attestation_of_something_else_is_no_quote(key: rsa.RSAPrivateKey, quote: Desk) -> None:
    """The same AK signs the time and other objects, with the same magic."""
    time = bytes.fromhex("ff5443478019") + sized(b"") + sized(NONCE)
    time += struct.pack(">QIIBQ", 1000, 2, 3, 1, 4) + struct.pack(">QQIIBQ", 1, 1000, 2, 3, 1, 4)
    parts = (time, sign(key, 0x14, "sha256", time)[0], pem(key))
    quote.fails("quote.type", parts=parts)


def test_all_reasons_are_told_at_once(key: rsa.RSAPrivateKey, quote: Desk) -> None:
    """Who looks for an error should not find one after the other."""
    message = attest({"sha256": [0]}, bytes(32), "sha256")
    wrapped, _ = sign(key, 0x14, "sha256", message + b"\0")
    area = public(key, 0x14, "sha256", AK & ~0x00010000)
    wanted = ("ak.attributes", "quote.qualifying-data", "quote.signature", "quote.pcr-values")
    quote.fails(*wanted, parts=(message, wrapped, area, "00"), pcrs={"0": "11" * 32})


def test_a_quote_without_challenge_is_said_not_to_be_fresh(key: rsa.RSAPrivateKey, quote: Desk) -> None:
    """An empty challenge is one that any old quote without any answers."""
    message = attest({"sha256": [0]}, bytes(32), "sha256", nonce=b"")
    told = quote.holds(message, sign(key, 0x14, "sha256", message)[0], pem(key), "")
    assert any("fresh" in note for note in told["notes"])


@pytest.mark.parametrize("nonce", ["9", "zz", "0x9009", "90 09", "\uff19\uff10\uff10\uff19", "9009\n"])
def test_a_challenge_that_is_no_hex_is_a_usage_error(nonce: str, vectors: Path, quote: Desk) -> None:
    """It is not guessed what was meant."""
    done = quote(*cloud(vectors), nonce)
    assert (done.code, done.error) == (2, "quote.qualifying-data")


@pytest.mark.parametrize("part", [0, 1, 2], ids=["attest", "signature", "ak"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"text\n" * 20,
        random.Random(5).randbytes(300),
        bytes(70000),
        b"-----BEGIN PUBLIC KEY-----\n",
    ],
    ids=["empty", "zero", "text", "noise", "huge", "half a PEM"],
)
def test_bytes_that_are_none_of_it_are_said_to_be_none(
    part: int, content: bytes, vectors: Path, quote: Desk
) -> None:
    """And the file is named."""
    real = cloud(vectors)
    message, signature, ak = (content if at == part else one for at, one in enumerate(real))
    done = quote(message, signature, ak, "9009")
    assert done.code == 2
    assert ("attest", "signature", "ak")[part] in done.json["error"]["what"]
    assert {"expected", "found", "todo"} <= set(done.json["error"])


@pytest.mark.parametrize("kind", ["private", "Ed25519", "RSA 1024"])
def test_a_key_of_another_kind_is_no_ak(kind: str, vectors: Path, quote: Desk) -> None:
    """A private key has no business here; the others no TPM signs quotes with."""
    message, signature, _ = cloud(vectors)
    if kind == "private":
        made = ec.generate_private_key(ec.SECP256R1())
        ak = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    elif kind == "Ed25519":
        other = ed25519.Ed25519PrivateKey.generate().public_key()
        ak = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    else:
        ak = pem(rsa.generate_private_key(65537, 1024))  # noqa: S505 - too small is what is tried
    done = quote(message, signature, ak, "9009")
    assert (done.code, done.error) == (2, "ak.layout")


def test_the_pipeline_takes_nothing_of_what_only_the_command_takes() -> None:
    """Wider is what is looked at, never what releases a key."""
    assert vtpm.ALGORITHMS.rsa_bits == {2048}
    assert list(vtpm.ALGORITHMS.curves) == [0x3]
    assert list(vtpm.ALGORITHMS.hashes) == [0xB]
    assert set(examine.ALGORITHMS.hashes) == set(BANKS.values())


def test_any_selection_is_read_in_its_own_order() -> None:
    """Several banks, wide selections, and nothing behind them."""
    raw = bytes.fromhex("00000002" + "000b03010080" + "000404010000ff")
    assert tpm.pcr_banks(raw) == ((0xB, (0, 23)), (0x4, (0, 24, 25, 26, 27, 28, 29, 30, 31)))
    assert tpm.pcr_banks(tpm.NO_PCRS) == ()
    with pytest.raises(Malformed):
        tpm.pcr_banks(raw + b"\0")


def test_as_a_process_it_is_silent_about_what_holds(vectors: Path) -> None:
    """Nothing on stderr, also not from the TSS, which likes to log what it cannot read."""
    directory = vectors / "gce-tpm" / "gce-cos-85-nonce9009"
    words = ("quote", "verify", "--attest", directory / "quote_sha1.msg", "--qualifying", "9009", "--json")
    ak = ("--ak", directory / "ak.tpmt_public", "--pcrs", directory / "pcrs_sha1.json")
    done = outside(*words, *ak, "--signature", directory / "quote_sha1.sig")
    assert (done.returncode, done.stderr) == (0, "")
    broken = outside(*words, *ak, "--signature", directory / "eventlog.bin")
    assert broken.returncode == 2
    assert broken.stderr.startswith("kagimori-verifier: ")
    assert "ERROR" not in broken.stderr
    assert json.loads(broken.stdout)["error"]["code"] == "quote.signature-layout"
