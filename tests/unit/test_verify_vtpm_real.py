"""Quotes of real TPMs hold through the code that the pipeline uses, and no changed one does."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from hypothesis import given, settings
from hypothesis import strategies as st

from kagimori_protocol import tpm
from kagimori_protocol.errors import KagimoriError, NotAuthentic
from kagimori_protocol.messages import PcrValue, Quote
from kagimori_verifier.claims import VtpmClaims
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify import vtpm

EK = tpm.EK_TEMPLATE_L1[:-256] + b"\x80" + bytes(254) + b"\x01"
AK_HEAD = bytes.fromhex("0001000b00050072000000100014000b0800000000000100")
"""TPMT_PUBLIC of an RSA 2048 AK with RSASSA and SHA-256, up to its modulus."""


def verify(arguments: dict[str, Any]) -> VtpmClaims:
    """Verify a quote under some EK, which nothing here depends on."""
    return vtpm.verify_quote(Trail(), ek_public=EK, **arguments)


def cloud(vectors: Path) -> dict[str, Any]:
    """Give a cloud vTPM's quote over all PCRs of the SHA-256 bank, as arguments of verify_quote."""
    directory = vectors / "gce-tpm" / "gce-cos-85-nonce9009"
    ak = (directory / "ak.tpmt_public").read_bytes()
    values = json.loads((directory / "pcrs_sha256.json").read_text())
    return {
        "ak_public": ak,
        "ak_name": vtpm.verify_ak(Trail(), ak),
        "quote": Quote(
            attest=(directory / "quote_sha256.msg").read_bytes(),
            signature=(directory / "quote_sha256.sig").read_bytes(),
        ),
        "pcrs": [PcrValue(index=index, digest=bytes.fromhex(values[str(index)])) for index in range(24)],
        "qualifying_data": bytes.fromhex("9009"),
        "selection": tpm.pcr_selection(range(24)),
    }


def emulated(vectors: Path) -> dict[str, Any]:
    """Give an emulator's quote over three PCRs that are zero, or all ones after no dynamic launch."""
    directory = vectors / "tpm-quote" / "keylime-emulator"
    ak = (directory / "ak.pub").read_bytes()[2:]
    quote = Quote(
        attest=(directory / "quote.out").read_bytes(), signature=(directory / "quotesig.out").read_bytes()
    )
    said = tpm.Attest.parse(quote.attest)
    # tpm2_quote writes a C structure: 132 bytes of selection, then digests, each after its 16-bit size.
    raw = (directory / "quotepcr.out").read_bytes()
    digests = [raw[at + 2 : at + 34] for at in range(len(raw) - 34) if raw[at : at + 2] == b"\x20\x00"]
    return {
        "ak_public": ak,
        "ak_name": vtpm.verify_ak(Trail(), ak),
        "quote": quote,
        "pcrs": [
            PcrValue(index=index, digest=digest) for index, digest in zip((15, 16, 22), digests, strict=False)
        ],
        "qualifying_data": said.extra_data,
        "selection": tpm.pcr_selection([15, 16, 22]),
    }


def test_a_real_cloud_quote_holds(vectors: Path) -> None:
    """All of verify_quote, on what a cloud's vTPM signed."""
    claims = verify(cloud(vectors))
    assert len(claims.pcrs) == 24


def test_a_real_emulator_quote_holds(vectors: Path) -> None:
    """And its AK's name is the one that the TPM itself computed."""
    arguments = emulated(vectors)
    assert arguments["ak_name"] == (vectors / "tpm-quote" / "keylime-emulator" / "ak.name").read_bytes()
    assert sorted(verify(arguments).pcrs) == [15, 16, 22]


@pytest.mark.parametrize("bank", ["sha1", "sha384"])
def test_real_quotes_of_other_banks_are_signed_but_not_accepted(vectors: Path, bank: str) -> None:
    """The signature holds, the selection is not version 1's."""
    directory = vectors / "gce-tpm" / "gce-cos-85-nonce9009"
    message = (directory / f"quote_{bank}.msg").read_bytes()
    signature = (directory / f"quote_{bank}.sig").read_bytes()
    arguments = cloud(vectors)
    vtpm.signature_holds(tpm.parse_public(arguments["ak_public"]), tpm.parse_signature(signature), message)
    with pytest.raises(NotAuthentic) as caught:
        verify(arguments | {"quote": Quote(attest=message, signature=signature)})
    assert caught.value.code == "quote.pcr-selection"


@pytest.mark.parametrize("case", ["trustee-evidence-v2", "trustee-evidence-genoa"])
def test_real_azure_quotes_are_signed_by_the_key_that_their_report_names(vectors: Path, case: str) -> None:
    """Another container around the signature and a larger nonce, so not version 1's; the arithmetic is the same."""
    directory = vectors / "azure" / case
    message = (directory / "quote.msg").read_bytes()
    hcl = (directory / "hcl_report.bin").read_bytes()
    variable = json.loads(hcl[0x4D4 : 0x4D4 + int.from_bytes(hcl[0x4D0:0x4D4], "little")])
    (named,) = (key for key in variable["keys"] if key["kid"] == "HCLAkPub")
    ak = tpm.parse_public(AK_HEAD + _base64url(named["n"]))
    signature = bytes.fromhex("0014000b0100") + (directory / "quote.sig").read_bytes()
    vtpm.signature_holds(ak, tpm.parse_signature(signature), message)
    assert len(tpm.Attest.parse(message).extra_data) == 48
    with pytest.raises(InvalidSignature):
        vtpm.signature_holds(ak, tpm.parse_signature(signature), message[:-1] + b"\x00")


def _base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@settings(max_examples=60)
@given(data=st.data())
def test_a_changed_real_quote_is_refused(vectors: Path, data: st.DataObject) -> None:
    """One bit of quote, signature, AK or a PCR value."""
    arguments = data.draw(st.sampled_from([cloud, emulated]))(vectors)
    part = data.draw(st.sampled_from(["attest", "signature", "ak", "pcr"]))
    quote, pcrs = arguments["quote"], list(arguments["pcrs"])
    if part == "ak":
        arguments["ak_public"] = _flip(data, arguments["ak_public"], first=20)
    elif part == "pcr":
        at = data.draw(st.integers(0, len(pcrs) - 1))
        pcrs[at] = PcrValue(index=pcrs[at].index, digest=_flip(data, pcrs[at].digest))
        arguments["pcrs"] = pcrs
    else:
        parts = {"attest": quote.attest, "signature": quote.signature}
        arguments["quote"] = Quote(**parts | {part: _flip(data, parts[part])})
    with pytest.raises(KagimoriError):
        verify(arguments)


def _flip(data: st.DataObject, raw: bytes, first: int = 0) -> bytes:
    bit = data.draw(st.integers(8 * first, 8 * len(raw) - 1))
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
