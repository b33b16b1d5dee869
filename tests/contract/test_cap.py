"""The cap against a real swtpm: after it, no quote shows a cap PCR of zero."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from kagimori_agent import cap as cap_module
from kagimori_agent.cap import ATTEMPTS, CAP_DATA, CAPPED, ZERO, cap
from kagimori_agent.devices import vtpm as vtpm_module
from kagimori_agent.devices.tpm_places import Place
from kagimori_agent.devices.vtpm import SHA256, Vtpm, open_vtpm
from kagimori_protocol.errors import HardwareError, ImageError
from kagimori_protocol.tpm import pcr_selection
from kagimori_simulator.vtpm import Vtpm as SimulatedVtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[SimulatedVtpm]:
    """Give a fresh TPM."""
    with SimulatedVtpm.start(tmp_path) as started:
        yield started


@pytest.fixture
def vtpm(swtpm: SimulatedVtpm) -> Iterator[Vtpm]:
    """Open it as the agent does, by its TCTI."""
    with open_vtpm(tcti=swtpm.tcti, event_log=swtpm.event_log_path) as opened:
        yield opened


def test_the_cap_extends_every_bank_by_its_own_hash_of_the_label(swtpm: SimulatedVtpm) -> None:
    """Whatever bank a quote is of, it shows no zero after the cap."""
    ((name, before, after),) = cap(tcti=swtpm.tcti)
    assert (name, before, after) == (swtpm.tcti, ZERO, CAPPED)
    with open_vtpm(tcti=swtpm.tcti, event_log=swtpm.event_log_path) as opened:
        banks = opened.active_banks(15)
        assert SHA256 in banks
        for bank in banks:
            ((_, value),) = opened.read_pcrs([15], bank)
            hashed: Callable[[bytes], Any] = {
                4: hashlib.sha1,
                11: hashlib.sha256,
                12: hashlib.sha384,
                13: hashlib.sha512,
            }[bank]
            assert value == hashed(bytes(len(value)) + hashed(CAP_DATA).digest()).digest()


def test_a_second_cap_leaves_the_first_one_as_it_is(swtpm: SimulatedVtpm) -> None:
    """The agent caps, and its unit caps again: the value stays the one that can be known."""
    cap(tcti=swtpm.tcti)
    ((_, before, after),) = cap(tcti=swtpm.tcti)
    assert before == after == CAPPED


def test_a_pcr_that_holds_something_else_is_extended_all_the_same(swtpm: SimulatedVtpm) -> None:
    """Only the cap counts as the cap."""
    swtpm.extend(15, b"\x07" * 32)
    ((_, before, after),) = cap(tcti=swtpm.tcti)
    assert before == hashlib.sha256(bytes(32) + b"\x07" * 32).digest()
    assert after == hashlib.sha256(before + hashlib.sha256(CAP_DATA).digest()).digest()


def test_a_capped_sha256_bank_beside_an_open_one_is_capped_again(swtpm: SimulatedVtpm) -> None:
    """Extending the SHA-256 bank alone leaves the others zero, and one of them might be quoted."""
    swtpm.extend(15, hashlib.sha256(CAP_DATA).digest())
    ((_, before, after),) = cap(tcti=swtpm.tcti)
    assert before == CAPPED != after
    with open_vtpm(tcti=swtpm.tcti, event_log=swtpm.event_log_path) as opened:
        for bank in opened.active_banks(15):
            assert any(opened.read_pcrs([15], bank)[0][1])


def test_another_pcr_can_be_the_cap(swtpm: SimulatedVtpm) -> None:
    """The profile names it."""
    assert cap(8, tcti=swtpm.tcti)[0].after == CAPPED
    assert cap(tcti=swtpm.tcti)[0].before == ZERO


def test_a_tpm_that_does_not_extend_is_not_capped(
    swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Success of the command is not believed: the value is read back, a few times."""
    tries = []
    monkeypatch.setattr(vtpm_module.Vtpm, "measure", lambda *_: tries.append(1))
    with pytest.raises(HardwareError) as caught:
        cap(tcti=swtpm.tcti)
    assert caught.value.code == "cap.not-held"
    assert len(tries) == ATTEMPTS


def test_a_cap_that_was_disturbed_once_holds_in_the_end(
    swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else that extends the PCR meanwhile is no reason to power off."""
    measure = vtpm_module.Vtpm.measure
    disturbed: list[int] = []

    def then_extend(opened: Vtpm, pcr: int, data: bytes) -> None:
        measure(opened, pcr, data)
        if not disturbed:
            disturbed.append(1)
            opened.extend(pcr, b"\x01" * 32)

    monkeypatch.setattr(vtpm_module.Vtpm, "measure", then_extend)
    ((_, before, after),) = cap(tcti=swtpm.tcti)
    assert before == ZERO
    assert after not in {ZERO, CAPPED}


def test_a_bug_while_capping_one_tpm_is_a_named_error(
    swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens with one TPM, the next one is tried, and the end is an error."""

    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(vtpm_module.Vtpm, "active_banks", broken)
    with pytest.raises(HardwareError) as caught:
        cap(tcti=swtpm.tcti)
    assert caught.value.code == "cap.failed"
    assert "unforeseen" in str(caught.value.found)


def test_after_the_cap_a_quote_shows_it(vtpm: Vtpm, swtpm: SimulatedVtpm) -> None:
    """That is all that keeps root of the running system from asking again."""
    vtpm.make_keys()
    open_boot = dict(vtpm.quote(bytes(32), pcr_selection(range(24))).pcrs)[15]
    cap(tcti=swtpm.tcti)
    assert (open_boot, dict(vtpm.quote(bytes(32), pcr_selection(range(24))).pcrs)[15]) == (ZERO, CAPPED)


def test_every_tpm_is_capped_though_another_one_fails(
    swtpm: SimulatedVtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has no device node; the second is capped all the same, and the end is the first's error."""
    unreachable = Place(name="tpm0", driver="tpm_crb", tcti=None, event_log=swtpm.event_log_path)
    reachable = Place(name="tpm1", driver="tpm_svsm", tcti=swtpm.tcti, event_log=swtpm.event_log_path)
    monkeypatch.setattr(cap_module, "present", lambda _: [unreachable, reachable])
    with pytest.raises(ImageError) as caught:
        cap(driver=None)
    assert caught.value.code == "tpm.no-node"
    assert swtpm.pcr(15) == CAPPED
