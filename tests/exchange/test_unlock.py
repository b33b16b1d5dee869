"""The whole exchange over HTTP: what an honest VM gets, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kagimori_agent.unlock import dry_run, unlock
from kagimori_protocol.errors import Refused
from kagimori_simulator import measured_boot, pe

if TYPE_CHECKING:
    from tests.worlds import Enrolled


def quiet(_: str) -> None:
    """Say nothing."""


def test_an_honest_boot_opens_its_volume_and_the_ledger_tells_released_from_opened(
    enrolled: Enrolled,
) -> None:
    """The key fits the volume, the boot is capped, and the verifier has the Confirm."""
    with enrolled.booted() as (world, config):
        unlocked = unlock(config, quiet, prove=True)
        assert unlocked.volumes[0].how == "proved"
        assert unlocked.confirmed
        assert world.vtpm is not None
        assert world.vtpm.pcr(15) != bytes(32)
    assert enrolled.owner.events(unlocked.session) == ["released", "confirmed-opened"]


def test_a_second_unlock_in_the_same_boot_is_refused_because_the_boot_is_capped(enrolled: Enrolled) -> None:
    """Root of the booted system asks as the agent did, and gets a verdict instead of a key."""
    with enrolled.booted() as (_, config):
        unlock(config, quiet, prove=True)
        with pytest.raises(Refused) as caught:
            unlock(config, quiet, prove=True)
    assert "cap.off" in (caught.value.expected or "")
    assert "boot.unopened" in (caught.value.expected or "")


def test_another_kernel_is_refused_and_the_agent_learns_which_pcr(enrolled: Enrolled) -> None:
    """The verdict reaches the guest, sealed, with the PCR that differs."""
    kernel = pe.image({".text": b"another kernel"})
    with enrolled.booted(measured_boot.grub(kernel=kernel)) as (_, config), pytest.raises(Refused) as caught:
        unlock(config, quiet, prove=True)
    assert "pcr.9" in (caught.value.expected or "")


def test_a_dry_run_tells_the_verdict_and_leaves_the_boot_as_it_was(enrolled: Enrolled) -> None:
    """No key travels, no PCR changes, and an unlock afterwards still works."""
    with enrolled.booted() as (world, config):
        verdict, _ = dry_run(config, quiet)
        assert verdict.allowed, [check for check in verdict.checks if not check.ok]
        assert world.vtpm is not None
        assert world.vtpm.pcr(15) == bytes(32)
        assert unlock(config, quiet, prove=True).confirmed


def test_a_vm_without_an_svsm_gets_its_keys_once_for_each_boot(enrolled_direct: Enrolled) -> None:
    """Kind snp-direct has no cap PCR: a second request in the same boot is refused by REPORT_ID."""
    with enrolled_direct.booted() as (world, config):
        assert unlock(config, quiet, prove=True).confirmed
        with pytest.raises(Refused):
            unlock(config, quiet, prove=True)
        world.machine.reboot()
        assert unlock(config, quiet, prove=True).confirmed
