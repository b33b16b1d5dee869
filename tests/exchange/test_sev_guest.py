"""A VM whose kernel has /dev/sev-guest: its key, once, through an ioctl; and certificates for a VM below an SVSM."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from kagimori_agent.devices.report import KeyWiped
from kagimori_agent.unlock import dry_run, unlock
from kagimori_protocol import certificate_table, messages
from kagimori_protocol.errors import HardwareError, Refused
from kagimori_simulator import faults
from kagimori_simulator.world import CONFIGFS_TSM, SEV_GUEST
from kagimori_verifier import settings as verifier_settings
from kagimori_verifier.endorsements.directory import EndorsementDirectory

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.worlds import Enrolled

    from kagimori_agent.config import Config
    from kagimori_simulator.machine import SnpMachine
    from kagimori_simulator.sev_guest import SevGuest
    from kagimori_simulator.svsm import Svsm

BOTH = (CONFIGFS_TSM, SEV_GUEST)


def quiet(_: str) -> None:
    """Say nothing."""


def shortly(config: Config, seconds: float) -> Config:
    """Give the boot less time."""
    limits = replace(config.limits, boot_budget_s=seconds, attempt_s=seconds)
    return replace(config, limits=limits)


def test_a_vm_gets_its_key_through_the_device_once_in_a_boot(enrolled_direct: Enrolled) -> None:
    """A dry-run before it is no grant; a second unlock is refused; the next boot may ask again."""
    said: list[str] = []
    with enrolled_direct.booted(doors=[SEV_GUEST]) as (world, config):
        verdict, _ = dry_run(config, said.append)
        assert verdict.allowed, [check for check in verdict.checks if not check.ok]
        unlocked = unlock(config, quiet, prove=True)
        assert unlocked.volumes[0].how == "proved"
        assert unlocked.confirmed
        with pytest.raises(Refused) as caught:
            unlock(config, quiet, prove=True)
        assert len(world.tsm.driver.asked) == 3  # one request for each, and no more
        world.machine.reboot()
        assert unlock(config, quiet, prove=True).confirmed
    assert "boot.unopened" in str(caught.value.expected) + str(caught.value.code)
    assert enrolled_direct.owner.events(unlocked.session) == ["released", "confirmed-opened"]
    assert "report door: sev-guest, of sev-guest" in said


def test_with_both_doors_configfs_tsm_is_used_unless_agent_toml_names_the_other(
    enrolled_direct: Enrolled,
) -> None:
    """And a dry-run says which one it was, and which ones there are."""
    with enrolled_direct.booted(doors=BOTH) as (_, config):
        for named, used in ((config, CONFIGFS_TSM), (replace(config, report_door="sev-guest"), SEV_GUEST)):
            said: list[str] = []
            assert dry_run(named, said.append)[0].allowed
            assert f"report door: {used}, of configfs-tsm, sev-guest" in said


def test_the_evidence_carries_the_hosts_certificates(enrolled_direct: Enrolled) -> None:
    """Cut to what the host put in, and enough for a verifier that has never seen this chip."""
    with enrolled_direct.booted(doors=[SEV_GUEST]) as (world, config):
        _, answered = dry_run(config, quiet)
        evidence = messages.decode(messages.Evidence, answered.evidence)
        assert evidence.certificates == world.machine.certificate_table()


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        (faults.wiped_key, "sev-guest.key-wiped"),
        (faults.garbled_answers, "sev-guest.key-wiped"),
        (faults.failing_host, "sev-guest.firmware"),
    ],
)
def test_a_key_that_is_gone_ends_the_boot_at_once(
    enrolled_direct: Enrolled, lie: Callable[[SevGuest], None], code: str
) -> None:
    """No waiting for better times within the budget, and no second request."""
    with enrolled_direct.booted(doors=BOTH) as (world, config):
        lie(world.tsm.driver)
        started = time.monotonic()
        with pytest.raises(KeyWiped) as caught:
            unlock(replace(config, report_door="sev-guest"), quiet, prove=True)
        assert time.monotonic() - started < config.limits.boot_budget_s / 2
        assert caught.value.code == code
        assert len(world.tsm.driver.asked) <= 1
    assert enrolled_direct.owner.events() == []


def test_a_busy_host_is_waited_for(enrolled_direct: Enrolled) -> None:
    """As long as the driver waits, and the budget lasts."""
    with enrolled_direct.booted(doors=[SEV_GUEST]) as (world, config):
        world.tsm.driver.retry_delay_s = 0.1
        faults.throttling_host(world.tsm.driver, 1)
        assert unlock(config, quiet, prove=True).confirmed
        assert len(world.tsm.driver.asked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("door", [CONFIGFS_TSM, SEV_GUEST])
def test_a_host_that_never_answers_ends_the_boot_with_its_budget(
    enrolled_direct: Enrolled, door: str
) -> None:
    """Whichever door it is; the caller can go on to what has to come last."""
    with enrolled_direct.booted(doors=[door]) as (world, config):
        released = faults.silent_host(world.tsm.driver)
        started = time.monotonic()
        try:
            with pytest.raises(HardwareError) as caught:
                unlock(shortly(config, 3), quiet, prove=True)
            assert time.monotonic() - started < 8
        finally:
            released.set()
        assert caught.value.code == "report.stalled"
        assert len(world.tsm.driver.asked) == 1


@pytest.mark.slow
def test_the_agent_as_a_program_ends_too_though_the_host_holds_its_request(
    enrolled_direct: Enrolled,
) -> None:
    """The thread that is left in the kernel does not keep the process; exit code 5, and the error as JSON."""
    with enrolled_direct.booted(doors=[SEV_GUEST]) as (world, _):
        path = world.directory / "agent.toml"
        text = path.read_text().replace("boot_budget_s = 20", "boot_budget_s = 3")
        path.write_text(text.replace("attempt_s = 10", "attempt_s = 3"))
        released = faults.silent_host(world.tsm.driver)
        command = [sys.executable, "-m", "kagimori_agent", "dry-run", "--json", "--config", str(path)]
        ran = subprocess.run(command, capture_output=True, timeout=30, check=False)
        released.set()
    assert ran.returncode == 5
    assert json.loads(ran.stdout)["error"]["code"] == "report.stalled"


def svsm_without_certificates(svsm: Svsm) -> None:
    """Let the SVSM pass no certificates on, as COCONUT did for long."""
    attest = svsm.attest_single_service
    svsm.attest_single_service = (  # type: ignore[method-assign]  # an older build of it
        lambda *asked: (*attest(*asked)[:2], b"")
    )


def import_vcek(enrolled: Enrolled, machine: SnpMachine) -> None:
    """Let the owner import the chip's certificate, as from AMD's server."""
    vek = machine.vek()
    assert vek is not None
    settings = verifier_settings.load(enrolled.owner.directory / "verifier.toml")
    EndorsementDirectory(settings.path(settings.endorsements)).add(vek.certificate_der)


def shown_certificates(config: Config, said: list[str]) -> tuple[bool, bytes]:
    """Make a dry-run; gives whether it would be allowed, and the certificates that were sent."""
    verdict, answered = dry_run(config, said.append)
    evidence = messages.decode(messages.Evidence, answered.evidence)
    return verdict.allowed, evidence.certificates or b""


def test_below_an_svsm_that_passes_no_certificates_on_they_come_from_the_device(enrolled: Enrolled) -> None:
    """At the guest's own VMPL 2; the report that comes with them is no evidence, and is thrown away."""
    with enrolled.booted(doors=BOTH) as (world, config):
        assert world.svsm is not None
        svsm_without_certificates(world.svsm)
        allowed, certificates = shown_certificates(config, [])
        assert allowed
        assert certificates == world.machine.certificate_table()
        (request,) = world.tsm.driver.asked
        assert request[:68] == bytes(64) + (2).to_bytes(4, "little")


def test_an_svsm_that_passes_certificates_on_spares_the_request(enrolled: Enrolled) -> None:
    """Every request to the host is one that it can fail."""
    with enrolled.booted(doors=BOTH) as (world, config):
        allowed, certificates = shown_certificates(config, [])
        assert allowed
        assert certificate_table.parse(certificates)
        assert world.tsm.driver.asked == []


@pytest.mark.parametrize("lie", [faults.wiped_key, faults.failing_host, faults.garbled_answers])
def test_a_failure_of_the_device_costs_a_vm_below_an_svsm_nothing(
    enrolled: Enrolled, lie: Callable[[SevGuest], None]
) -> None:
    """The verifier knows this chip's certificate; the SVSM has a key of its own for its reports."""
    with enrolled.booted(doors=BOTH) as (world, config):
        import_vcek(enrolled, world.machine)
        assert world.svsm is not None
        svsm_without_certificates(world.svsm)
        lie(world.tsm.driver)
        said: list[str] = []
        allowed, certificates = shown_certificates(config, said)
        assert (allowed, certificates) == (True, b"")
        assert any("no certificates from" in line for line in said)
        assert unlock(config, quiet, prove=True).confirmed


def test_a_device_that_hangs_costs_a_vm_below_an_svsm_a_part_of_its_time(enrolled: Enrolled) -> None:
    """A quarter of the budget at most, and then the boot goes on without certificates."""
    with enrolled.booted(doors=BOTH) as (world, config):
        import_vcek(enrolled, world.machine)
        assert world.svsm is not None
        svsm_without_certificates(world.svsm)
        released = faults.silent_host(world.tsm.driver)
        try:
            assert shown_certificates(shortly(config, 4), []) == (True, b"")
        finally:
            released.set()


def vmpl_1(machine: SnpMachine) -> None:
    """Let the firmware say another VMPL than the kernel asked for."""
    machine.overrides["vmpl"] = 1


def test_a_report_of_another_vmpl_never_leaves_the_guest(enrolled_direct: Enrolled) -> None:
    """It would be refused anyway; here the error tells where it went wrong."""
    with (
        enrolled_direct.booted(lie=vmpl_1, doors=[SEV_GUEST]) as (_, config),
        pytest.raises(HardwareError) as caught,
    ):
        dry_run(config, quiet)
    assert caught.value.code == "sev-guest.other-vmpl"
