"""TPM structures are read to their last byte, or refused by name."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given
from hypothesis import strategies as st
from tpm2_pytss.constants import TPM2_ALG, TPMA_OBJECT

from kagimori_protocol import tpm
from kagimori_protocol.errors import Malformed

MODULUS = b"\x80" + bytes(254) + b"\x01"
EK = tpm.EK_TEMPLATE_L1[:-256] + MODULUS
ATTEST = bytes.fromhex(
    "ff544347"  # magic
    "8018"  # type: quote
    "0000"  # qualifiedSigner
    "0004aabbccdd"  # extraData
    "0000000000001234"  # clock
    "00000005"  # resetCount
    "00000006"  # restartCount
    "01"  # safe
    "1122334455667788"  # firmwareVersion
    "00000001000b03010080"  # pcrSelect: SHA-256, PCRs 0 and 23
    "0020" + "ee" * 32  # pcrDigest
)


def refused(error: pytest.ExceptionInfo[Malformed], code: str) -> None:
    """Hold that an error names its check, what was expected and what was found."""
    assert error.value.code == code
    assert error.value.expected
    assert error.value.found


def test_the_ek_template_is_the_tcgs(vectors: Path) -> None:
    """Byte for byte the template that was collected, with its policy computed here from TPM2_PolicySecret."""
    assert (vectors / "tpm" / "ek-template-rsa2048-L1.bin").read_bytes() == tpm.EK_TEMPLATE_L1
    secret = hashlib.sha256(bytes(32) + bytes.fromhex("000001514000000b")).digest()
    assert hashlib.sha256(secret).digest() in tpm.EK_TEMPLATE_L1


def test_the_ek_template_decodes_to_the_values_that_its_comments_name() -> None:
    """Read by the TSS itself: RSA 2048, SHA-256, AES-128-CFB, a restricted decryption key."""
    public = tpm.parse_public(tpm.EK_TEMPLATE_L1)
    assert (public.type, public.nameAlg) == (TPM2_ALG.RSA, TPM2_ALG.SHA256)
    assert public.objectAttributes == TPMA_OBJECT.parse(
        "fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|restricted|decrypt"
    )
    detail = public.parameters.rsaDetail
    assert (detail.keyBits, detail.exponent, detail.scheme.scheme) == (2048, 0, TPM2_ALG.NULL)
    symmetric = detail.symmetric
    assert (symmetric.algorithm, symmetric.keyBits.aes, symmetric.mode.aes) == (
        TPM2_ALG.AES,
        128,
        TPM2_ALG.CFB,
    )


def test_a_manifest_of_one_ek_is_returned() -> None:
    """The check gives back what it checked."""
    assert tpm.require_ek_l1(EK) == EK


def test_a_real_ek_of_the_template_is_one(vectors: Path) -> None:
    """The TPM2B_PUBLIC of an emulator's EK, without its size in front."""
    public = (vectors / "tpm-quote" / "keylime-emulator" / "ek.pub").read_bytes()
    assert tpm.require_ek_l1(public[2:]) == public[2:]
    with pytest.raises(Malformed):
        tpm.require_ek_l1(public)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"", "ek.size", id="nothing"),
        pytest.param(EK[:-1], "ek.size", id="a byte too few"),
        pytest.param(EK + b"\x00", "ek.size", id="a byte behind"),
        pytest.param(EK + EK, "ek.size", id="two of them"),
        pytest.param(b"\x01\x3a" + EK, "ek.size", id="a size in front"),
        pytest.param(bytes(tpm.EK_SIZE), "ek.template", id="zeros"),
        pytest.param(b"\x00\x23" + EK[2:], "ek.template", id="an ECC key"),
        pytest.param(EK[:4] + b"\x00\x05\x00\x72" + EK[8:], "ek.template", id="an AK in its place"),
        pytest.param(EK[:7] + b"\xf2" + EK[8:], "ek.template", id="an EK that needs no policy"),
        pytest.param(tpm.EK_TEMPLATE_L1, "ek.modulus", id="the template itself"),
        pytest.param(EK[:-1] + b"\x02", "ek.modulus", id="an even modulus"),
        pytest.param(EK[:58] + b"\x7f" + EK[59:], "ek.modulus", id="a modulus of 2047 bits"),
    ],
)
def test_what_is_not_exactly_one_ek_is_refused(raw: bytes, code: str) -> None:
    """Size, template and modulus, each by name."""
    with pytest.raises(Malformed) as caught:
        tpm.require_ek_l1(raw)
    refused(caught, code)


@given(st.integers(0, 57), st.integers(1, 255))
def test_every_byte_of_the_template_counts(at: int, change: int) -> None:
    """All but the modulus is fixed."""
    raw = bytearray(EK)
    raw[at] ^= change
    with pytest.raises(Malformed) as caught:
        tpm.require_ek_l1(bytes(raw))
    refused(caught, "ek.template")


def test_a_name_is_made_here_and_as_a_tpm_makes_it(vectors: Path) -> None:
    """The name is nameAlg and the SHA-256 of the public area, the same that a real TPM gave."""
    directory = vectors / "tpm-quote" / "keylime-emulator"
    public = (directory / "ak.pub").read_bytes()[2:]
    assert tpm.object_name(public) == (directory / "ak.name").read_bytes()
    assert tpm.object_name(EK) == b"\x00\x0b" + hashlib.sha256(EK).digest()


@pytest.mark.parametrize("algorithm", ["0004", "000c", "000d", "0010"])
def test_a_name_made_with_another_hash_is_refused(algorithm: str) -> None:
    """Version 1 has SHA-256 names only."""
    with pytest.raises(Malformed) as caught:
        tpm.object_name(EK[:2] + bytes.fromhex(algorithm) + EK[4:])
    assert caught.value.code in {"public.name-alg", "public.layout"}


@pytest.mark.parametrize("raw", [b"", EK[:-1], EK + b"\x00", b"\x00\x00" + EK[2:]])
def test_a_public_area_ends_where_it_ends(raw: bytes) -> None:
    """Nothing before, behind or missing."""
    with pytest.raises(Malformed) as caught:
        tpm.parse_public(raw)
    refused(caught, "public.layout")


@pytest.mark.parametrize(
    ("indices", "selection"),
    [
        ([], "00000000"),
        ([0], "00000001000b03010000"),
        ([15], "00000001000b03008000"),
        ([23, 0, 8, 0], "00000001000b03010180"),
        (range(24), "00000001000b03ffffff"),
    ],
)
def test_a_pcr_selection_has_one_form(indices: list[int], selection: str) -> None:
    """One entry, SHA-256, three bytes, whatever the order asked for; and it reads back."""
    assert tpm.pcr_selection(indices).hex() == selection
    assert tpm.selected_pcrs(bytes.fromhex(selection)) == tuple(sorted(set(indices)))


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param("", id="nothing"),
        pytest.param("00000001000403010000", id="the SHA-1 bank"),
        pytest.param("00000001000c03010000", id="the SHA-384 bank"),
        pytest.param("00000001000b020100", id="two bytes"),
        pytest.param("00000001000b0401000000", id="four bytes"),
        pytest.param("00000001000b03000000", id="an entry with no PCR"),
        pytest.param("00000002000b03010000000b03020000", id="the bank twice"),
        pytest.param("00000002000b03010000000403010000", id="two banks"),
        pytest.param("00000001000b0301000000", id="a byte behind"),
        pytest.param("00000001000b030100", id="a byte missing"),
        pytest.param("00000011" + "000b03010000" * 17, id="more entries than a TPM has banks"),
        pytest.param("ffffffff", id="2^32 - 1 entries"),
    ],
)
def test_any_other_pcr_selection_is_refused(selection: str) -> None:
    """A verifier that read the first entry only would miss what the quote really covers."""
    with pytest.raises(Malformed) as caught:
        tpm.selected_pcrs(bytes.fromhex(selection))
    assert caught.value.code in {"pcr-selection.layout", "pcr-selection.form"}


@given(st.sets(st.integers(0, 23)))
def test_a_pcr_selection_reads_back(indices: set[int]) -> None:
    """For every set of PCRs."""
    assert tpm.selected_pcrs(tpm.pcr_selection(indices)) == tuple(sorted(indices))


def test_a_quote_gives_the_fields_that_are_judged() -> None:
    """Each from its place, all integers big-endian."""
    assert tpm.Attest.parse(ATTEST) == tpm.Attest(
        extra_data=bytes.fromhex("aabbccdd"),
        pcr_select=bytes.fromhex("00000001000b03010080"),
        pcr_digest=b"\xee" * 32,
        clock_ms=0x1234,
        reset_count=5,
        restart_count=6,
        firmware_version=0x1122334455667788,
    )


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"", "quote.layout", id="nothing"),
        pytest.param(ATTEST[:-1], "quote.layout", id="a byte missing"),
        pytest.param(ATTEST + b"\x00", "quote.layout", id="a byte behind"),
        pytest.param(b"\xff\x54\x43\x48" + ATTEST[4:], "quote.magic", id="made by whoever can sign"),
        pytest.param(ATTEST[:4] + b"\x80\x17" + ATTEST[6:], "quote.type", id="a certification's type"),
    ],
)
def test_what_is_no_quote_is_refused(raw: bytes, code: str) -> None:
    """A restricted key signs other things too; only a quote speaks of PCRs."""
    with pytest.raises(Malformed) as caught:
        tpm.Attest.parse(raw)
    refused(caught, code)


def test_an_attestation_of_another_type_is_no_quote() -> None:
    """TPM2_GetTime's structure decodes, and is refused for its type."""
    time = ATTEST[:4] + b"\x80\x19" + ATTEST[6:39] + bytes(8 + 17 + 8)
    with pytest.raises(Malformed) as caught:
        tpm.Attest.parse(time)
    refused(caught, "quote.type")


def test_real_quotes_parse(vectors: Path) -> None:
    """Of a cloud's vTPM (each bank) and of an emulator."""
    directory = vectors / "gce-tpm" / "gce-cos-85-nonce9009"
    for bank in ("sha1", "sha256", "sha384"):
        attest = tpm.Attest.parse((directory / f"quote_{bank}.msg").read_bytes())
        assert attest.extra_data == bytes.fromhex("9009")
        assert tpm.parse_signature((directory / f"quote_{bank}.sig").read_bytes()).sigAlg == TPM2_ALG.RSASSA
    emulator = vectors / "tpm-quote" / "keylime-emulator"
    attest = tpm.Attest.parse((emulator / "quote.out").read_bytes())
    assert tpm.selected_pcrs(attest.pcr_select) == (15, 16, 22)
    assert tpm.parse_signature((emulator / "quotesig.out").read_bytes())


def test_a_credential_opens_with_the_key_of_the_ek_and_is_bound_to_the_name() -> None:
    """Opened here by hand (TPM 2.0 part 1, section 24): OAEP with label IDENTITY, KDFa, HMAC over the name."""
    private = rsa.generate_private_key(65537, 2048)
    modulus = private.public_key().public_numbers().n.to_bytes(256, "big")
    ek, name, secret = tpm.EK_TEMPLATE_L1[:-256] + modulus, tpm.object_name(EK), bytes(range(32))
    id_object, encrypted = tpm.make_credential(ek, name, secret)
    assert int.from_bytes(encrypted[:2], "big") == len(encrypted) - 2 == 256
    assert int.from_bytes(id_object[:2], "big") == len(id_object) - 2
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\x00")
    seed = private.decrypt(encrypted[2:], oaep)
    integrity_size = int.from_bytes(id_object[2:4], "big")
    integrity, sealed = id_object[4 : 4 + integrity_size], id_object[4 + integrity_size :]
    assert integrity == kdfa_hmac(seed, sealed + name)
    assert integrity != kdfa_hmac(seed, sealed + tpm.object_name(ek))
    assert secret not in id_object


def kdfa_hmac(seed: bytes, data: bytes) -> bytes:
    """HMAC-SHA256 under KDFa(seed, "INTEGRITY") (TPM 2.0 part 1, section 11.4.10.2)."""
    key = hmac.digest(seed, b"\x00\x00\x00\x01INTEGRITY\x00\x00\x00\x01\x00", "sha256")
    return hmac.digest(key, data, "sha256")


def test_no_credential_is_made_for_another_kind_of_key() -> None:
    """The EK's form is checked again where S would leave the verifier."""
    with pytest.raises(Malformed) as caught:
        tpm.make_credential(EK[:7] + b"\xf2" + EK[8:], tpm.object_name(EK), bytes(32))
    refused(caught, "ek.template")


STRUCTURES: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "public": (tpm.parse_public, EK),
    "attest": (tpm.Attest.parse, ATTEST),
    "signature": (tpm.parse_signature, bytes.fromhex("0014000b0100") + MODULUS),
    "ecdsa signature": (
        tpm.parse_signature,
        bytes.fromhex("0018000b0020") + bytes(32) + b"\x00\x20" + bytes(32),
    ),
    "selection": (tpm.selected_pcrs, bytes.fromhex("00000001000b03010080")),
    "name": (tpm.object_name, EK),
    "ek": (tpm.require_ek_l1, EK),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@given(data=st.data())
def test_no_bytes_make_a_parser_stumble(structure: str, data: st.DataObject) -> None:
    """Garbage, and a good structure with a few bytes changed, cut or lengthened: Malformed at most."""
    parse, good = STRUCTURES[structure]
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(39, len(raw) - 1)) | st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    changed = bytes(raw[: data.draw(st.integers(0, len(raw)))]) + data.draw(st.binary(max_size=2))
    for attempt in (bytes(raw), changed, data.draw(st.binary(max_size=64))):
        try:
            parse(attempt)
        except Malformed as error:
            assert error.expected  # noqa: PT017 - not raised is as good


def test_the_attributes_that_an_ak_must_have_are_five() -> None:
    """As in GCE's AKs: 0x00050072 without userWithAuth and noDA."""
    assert int(tpm.AK_REQUIRED) == 0x00050032
