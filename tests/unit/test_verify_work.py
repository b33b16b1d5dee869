"""What evidence can make a verifier do before anything of it is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kagimori_protocol.errors import NotAuthentic
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier.claims import Root
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify import certificate
from kagimori_verifier.verify.certificate import Certificate
from kagimori_verifier.verify.snp import Endorsements, verify_report

MANY = 20
"""As many of each as fit a certificate table of 64 KiB."""


def _broken(der: bytes, at: int) -> bytes:
    """Spoil a certificate's signature, each time in another place."""
    return bytes([*der[: -1 - at], der[-1 - at] ^ 1, *der[len(der) - at :]])


def test_signature_checks_grow_with_the_certificates_and_not_with_their_pairs(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone may send 20 ASKs that AMD never signed and 20 ARKs, copies or spoilt; that is 400 pairs."""
    root = AmdRoot.cached(cache / "amd")
    machine = SnpMachine(root)
    vek = root.vcek(machine.chip_id, machine.reported_tcb).certificate_der
    asks = [_broken(root.ask_der, at) for at in range(MANY)]
    arks = [root.ark_der] * MANY + [_broken(root.ark_der, at) for at in range(MANY)]
    trusted = TrustedRoots([Root(Certificate.parse(root.ark_der).spki_sha256, "Milan", "simulated")])
    report = machine.report(bytes(64), 0)
    checked, real = [], certificate.verify_pss

    def count(*arguments: object) -> None:
        checked.append(arguments)
        real(*arguments)  # type: ignore[arg-type]  # whatever it was called with

    monkeypatch.setattr(certificate, "verify_pss", count)
    with pytest.raises(NotAuthentic) as caught:
        verify_report(Trail(), report, Endorsements([vek, *asks, *arks]), trusted)
    assert caught.value.code == "endorsement.chain"
    assert len(checked) <= len(asks) + len(set(arks))
