"""Step 7: the quote is this exchange's, over exactly the PCRs that policy selects, and the values are those quoted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, SoftwareAk, denied, judged, t0_of, t1_of
from tests.attacks.lies import raw_quote

from kagimori_protocol import messages, tpm, transcript
from kagimori_protocol.messages import PcrValue
from kagimori_simulator import measured_boot

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.attacks.attacker import Prey

POLICY = tpm.pcr_selection([0, 1, 2, 3, 4, 5, 7, 8, 9, 14, 15])
SHA384_BANK = POLICY[:4] + b"\x00\x0c" + POLICY[6:]
OTHER_SELECTIONS = {
    "one PCR less": tpm.pcr_selection([0, 1, 2, 3, 4, 5, 7, 8, 9, 15]),
    "one PCR more": tpm.pcr_selection([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15]),
    "without the cap": tpm.pcr_selection([0, 1, 2, 3, 4, 5, 7, 8, 9, 14]),
    "a PCR that anyone can reset": tpm.pcr_selection([23]),
    "another bank": SHA384_BANK,
    "no PCR at all": tpm.NO_PCRS,
}


def test_the_policys_selection_is_the_one_that_these_stories_know(prey: Prey) -> None:
    """A story about "other PCRs" would tell nothing if the policy's own were others by now."""
    attacker = prey.attacker()
    challenge = messages.decode(messages.Challenge, attacker.challenge(attacker.hello()).challenge)
    assert challenge.pcr_selection == POLICY


@pytest.mark.parametrize("selection", OTHER_SELECTIONS)
def test_a_quote_over_other_pcrs_says_nothing_of_those_that_count(prey: Prey, selection: str) -> None:
    """T22: a guest with a bad kernel quotes only PCRs that are good, or a bank that nobody extended."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    parts |= raw_quote(attacker, t1_of(parts), OTHER_SELECTIONS[selection])
    denied(prey.office, attacker.send(parts), "not-authentic", "quote.pcr-selection")


def test_a_quote_of_an_earlier_exchange_is_refused(prey: Prey) -> None:
    """T8: the host keeps the quote of a good boot and plays it again with everything else fresh."""
    attacker = prey.attacker()
    earlier = attacker.evidence()
    parts = attacker.evidence() | {name: earlier[name] for name in ("quote", "pcrs")}
    denied(prey.office, attacker.send(parts), "not-authentic", "quote.qualifying-data")


@pytest.mark.parametrize("what", ["nothing", "the nonce", "T0 alone", "another report", "T1 and more"])
def test_qualifying_data_is_t1_and_nothing_like_it(prey: Prey, what: str) -> None:
    """T8, T9: a quote that commits to less (a nonce, T0) can be lent to another report or another key."""
    attacker = prey.attacker()
    earlier = attacker.evidence()
    parts = attacker.evidence()
    nonce = messages.decode(messages.Challenge, parts["challenges"][0].challenge).nonce
    t0 = t0_of(parts)
    qualifying = {
        "nothing": b"",
        "the nonce": nonce,
        "T0 alone": t0[:32],
        "another report": transcript.quote_qualifying_data(t0, earlier["report"], parts["manifest"]),
        "T1 and more": t1_of(parts) + b"\x00",
    }[what]
    told = attacker.send(parts | raw_quote(attacker, qualifying, POLICY))
    denied(prey.office, told, "not-authentic", "quote.qualifying-data")


def test_a_quote_by_another_key_of_the_same_tpm_is_not_the_aks(prey: Prey) -> None:
    """T9: each attempt has an AK of its own; one attempt's key cannot speak for the other's."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    attacker.tpm.make_keys()
    denied(prey.office, attacker.send(parts | attacker.quote(parts)), "not-authentic", "quote.signature")


def test_a_quote_by_a_software_key_under_the_tpms_name_is_refused(prey: Prey) -> None:
    """T9: the attacker names the TPM's own AK in Hello and signs with its own."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    values = {value.index: value.digest for value in parts["pcrs"]}
    told = attacker.send(parts | SoftwareAk().quote(t1_of(parts), values))
    denied(prey.office, told, "not-authentic", "quote.signature")


@pytest.mark.parametrize("lie", ["a byte after it", "a byte less", "no scheme", "nothing"])
def test_bytes_that_are_no_signature_are_not_half_understood(prey: Prey, lie: str) -> None:
    """T22: two readers of the same bytes must not find two signatures in them, nor one where there is none."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    quote: messages.Quote = parts["quote"]
    bent = {
        "a byte after it": quote.signature + b"\x00",
        "a byte less": quote.signature[:-1],
        "no scheme": b"\x00\x10",
        "nothing": b"",
    }[lie]
    parts["quote"] = msgspec.structs.replace(quote, signature=bent)
    check = "quote.signature" if lie == "no scheme" else "quote.signature-layout"
    denied(prey.office, attacker.send(parts), "not-authentic", check)


@pytest.mark.parametrize(
    "marks", [{"magic": b"\x00TCG"}, {"kind": b"\x80\x17"}], ids=["magic", "type certify"]
)
def test_what_is_not_marked_as_a_tpms_quote_is_none(prey: Prey, marks: dict[str, bytes]) -> None:
    """T9: a restricted key signs outside data only if that does not look like the TPM's own; so the mark counts."""
    attacker = prey.attacker()
    ak = SoftwareAk()
    parts = attacker.evidence(attacker.hello(ak_public=ak.public))
    values = {value.index: value.digest for value in parts["pcrs"]}
    told = attacker.send(parts | ak.quote(t1_of(parts), values, **marks))
    denied(prey.office, told, "not-authentic", "quote.layout")


VALUE_LIES: dict[str, Callable[[list[PcrValue]], list[PcrValue]]] = {
    "the values that the owner wants": lambda pcrs: [
        msgspec.structs.replace(value, digest=measured_boot.grub().pcr(value.index)) for value in pcrs
    ],
    "one left out": lambda pcrs: pcrs[:-1],
    "one too many": lambda pcrs: [*pcrs, PcrValue(index=23, digest=bytes(32))],
    "in another order": lambda pcrs: pcrs[::-1],
    "one twice": lambda pcrs: [pcrs[0], *pcrs],
    "under other numbers": lambda pcrs: [
        msgspec.structs.replace(value, index=value.index + 1) for value in pcrs
    ],
    "none": lambda pcrs: [],  # noqa: ARG005 - a lie about nothing
}


@pytest.mark.parametrize("lie", VALUE_LIES)
def test_pcr_values_that_were_not_quoted_are_refused(prey: Prey, lie: str) -> None:
    """T22: the TPM signs a digest only; the values beside it are the guest's claim until they hash to it."""
    prey.tpm.extend(9, b"\x66" * 32)
    attacker = prey.attacker()
    parts = attacker.evidence()
    parts["pcrs"] = VALUE_LIES[lie](parts["pcrs"])
    denied(prey.office, attacker.send(parts), "not-authentic", "quote.pcr-values")


def test_a_policy_that_changes_under_a_challenge_counts_at_once(prey: Prey) -> None:
    """T22: the owner adds a PCR while a token is on its way; the quote over fewer is no longer enough."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    prey.office.change_policy("grub", extra_pcrs=[6])
    denied(prey.office, attacker.send(parts), "not-authentic", "quote.pcr-selection")
    told = attacker.send(attacker.evidence())
    assert attacker.keys(told) == {UUID: UNLOCK_KEY}, "PCR 6 is in the accepted state as well"
    prey.office.change_policy("grub", extra_pcrs=[6, 16])
    judged(attacker, attacker.send(attacker.evidence()), "pcr.16")
