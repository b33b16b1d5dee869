"""Step 6: the AK signs only what a TPM made; its name is computed by the verifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.attacks.attacker import SoftwareAk, denied
from tests.attacks.lies import quote_by_an_unrestricted_key, with_software_ak
from tpm2_pytss.constants import TPMA_OBJECT

from kagimori_protocol.errors import HardwareError, NotAuthentic
from kagimori_protocol.tpm import AK_REQUIRED
from kagimori_verifier.store import observations

if TYPE_CHECKING:
    from tests.attacks.attacker import Prey

LACKS = {
    "restricted": TPMA_OBJECT.RESTRICTED,
    "sign": TPMA_OBJECT.SIGN_ENCRYPT,
    "fixedTPM": TPMA_OBJECT.FIXEDTPM,
    "fixedParent": TPMA_OBJECT.FIXEDPARENT,
    "sensitiveDataOrigin": TPMA_OBJECT.SENSITIVEDATAORIGIN,
}


@pytest.mark.parametrize("attribute", LACKS)
def test_an_ak_without_an_attribute_may_have_signed_anything(prey: Prey, attribute: str) -> None:
    """T9: without ``restricted`` the TPM signs quotes made by hand; without the others the key may live elsewhere."""
    attacker = prey.attacker()
    ak = SoftwareAk(int(AK_REQUIRED) & ~int(LACKS[attribute]))
    denied(prey.office, attacker.send(with_software_ak(attacker, ak)), "not-authentic", "ak.attributes")
    assert f"not {attribute}" in prey.office.refusals()[0].found


def test_an_ak_that_also_decrypts_is_no_ak(prey: Prey) -> None:
    """T9: a restricted key that decrypts is a storage key; what it signs was not made for being believed."""
    attacker = prey.attacker()
    ak = SoftwareAk(int(AK_REQUIRED | TPMA_OBJECT.DECRYPT))
    denied(prey.office, attacker.send(with_software_ak(attacker, ak)), "not-authentic", "ak.attributes")
    assert "decrypt" in prey.office.refusals()[0].found


@pytest.mark.parametrize("template", ["ecc256:ecdsa-sha1:null", "ecc384:ecdsa-sha256:null"])
def test_an_ak_of_another_make_is_refused(prey: Prey, template: str) -> None:
    """T9: weak or unusual signatures are refused before one is verified."""
    attacker = prey.attacker()
    told = attacker.send(with_software_ak(attacker, SoftwareAk(template=template)))
    denied(prey.office, told, "not-authentic", "ak.scheme")


@pytest.mark.parametrize("raw", [b"\x00", b"\x00" * 118, b"an AK"], ids=["short", "zeros", "text"])
def test_bytes_that_are_no_public_area_are_no_ak(prey: Prey, raw: bytes) -> None:
    """T22: the name would be the hash of bytes that nobody has understood."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(ak_public=raw)))
    denied(prey.office, told, "not-authentic", "ak.layout")


def test_evidence_without_an_ak_names_what_is_missing(prey: Prey) -> None:
    """T22: no AK is not an AK without faults."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(ak_public=msgspec.UNSET)))
    denied(prey.office, told, "not-authentic", "evidence.parts")


def test_the_tpms_own_unrestricted_key_signs_a_forged_quote_and_is_refused(prey: Prey) -> None:
    """T9: root has the genuine TPM make an unrestricted key and sign a quote over PCRs that it never had.

    TPM and EK are genuine, the key lives in the TPM, the signature verifies: only its attributes tell.
    """
    attacker = prey.attacker()
    with quote_by_an_unrestricted_key(attacker) as parts:
        denied(prey.office, attacker.send(parts), "not-authentic", "ak.attributes")


def test_a_software_ak_with_perfect_words_gets_an_answer_that_it_cannot_open(prey: Prey) -> None:
    """T9: the attacker commands SVSM and TPM of a VM with a bad kernel, and signs a perfect quote in software.

    Nothing in the evidence tells; but S is sealed to an object of that name in the TPM of that EK, and there is
    none. So the ledger shows a release that was never confirmed, and nothing is learned from it.
    """
    attacker = prey.attacker()
    told = attacker.send(with_software_ak(attacker, SoftwareAk()))
    with pytest.raises(HardwareError) as caught:
        attacker.open(told)
    assert caught.value.code == "tpm.credential"
    assert prey.office.events(told.session) == ["released"]
    with prey.office.verifier.store.read() as txn:
        seen = observations.get(txn, told.session)
    assert seen is not None
    assert not seen.confirmed, "nothing may be learned from an AK that is unproven"


def test_who_opens_only_the_outer_layer_can_neither_read_nor_confirm(prey: Prey) -> None:
    """T9: the attacker holds the HPKE key, so the outer layer opens; the inner one and the Confirm's key need S."""
    from kagimori_protocol import messages, sealing

    attacker = prey.attacker()
    told = attacker.send(with_software_ak(attacker, SoftwareAk()))
    assert isinstance(told.message, messages.Sealed)
    binding = attacker.binding(told)
    inner = attacker.key.open(told.message.sealed, binding)
    for guess in (bytes(32), inner[:32], binding):
        with pytest.raises(NotAuthentic):
            sealing.open_inner(inner, binding, guess)
        mac = sealing.confirm_mac(guess, binding, "opened")
        body = messages.encode(
            messages.Confirm(version=1, session=told.message.session, outcome="opened", mac=mac)
        )
        assert attacker.send_confirm(body) == "not-authentic"
        assert prey.office.refusals()[0].code == "confirm.mac"
    assert prey.office.events(told.session) == ["released"]
