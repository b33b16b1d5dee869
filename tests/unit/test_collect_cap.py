"""A cap that the verifier does not look at closes nothing, so no evidence is given to such a verifier."""

from __future__ import annotations

from typing import Any

import pytest

from kagimori_agent.collect import SvsmVtpm
from kagimori_protocol.errors import Malformed, PeerError
from kagimori_protocol.tpm import pcr_selection


class _Door:
    """A report door that must not be asked; a failed request can cost the VM its report key."""

    def service_report(self, *_: object) -> None:
        raise AssertionError("a report was requested")


@pytest.mark.parametrize("looked_at", [[0, 1, 2, 7, 14], []])
def test_a_verifier_that_does_not_look_at_our_cap_gets_no_evidence(looked_at: list[int]) -> None:
    """T4: root of the booted system would be given the key as often as it asks."""
    door: Any = _Door()
    attester = SvsmVtpm(door, door, cap_pcr=15)
    with pytest.raises(PeerError) as caught:
        attester.collect(bytes(64), pcr_selection(looked_at), 10)
    assert caught.value.code == "challenge.cap-pcr"


def test_a_selection_that_cannot_be_read_gets_no_evidence_either() -> None:
    """It came from the network, signed or not."""
    door: Any = _Door()
    with pytest.raises(Malformed):
        SvsmVtpm(door, door, cap_pcr=15).collect(bytes(64), b"\x00\x00\x00\x01", 10)


def test_a_verifier_that_looks_at_our_cap_gets_its_evidence() -> None:
    """The report is requested next."""
    door: Any = _Door()
    with pytest.raises(AssertionError, match="a report was requested"):
        SvsmVtpm(door, door, cap_pcr=15).collect(bytes(64), pcr_selection([0, 15]), 10)
