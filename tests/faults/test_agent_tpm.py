"""The TPM dies, or falls silent, at each command of an unlock: no key is left behind, and the next boot gets it.

A TPM that has died cannot be capped, and need not: nothing in this boot can quote by it any more. The agent must say so
by its exit code, and whoever started it powers off.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.faults import invariants
from tests.faults.boots import HARDWARE, Boot, booted
from tests.faults.guests import Guest
from tests.faults.programs import WAIT_S, Launcher

from kagimori_protocol.messages import Kind
from kagimori_simulator.amd import AmdRoot

pytestmark = pytest.mark.slow  # a boot per command

COMMANDS = 27
"""How many commands an unlock sends to its TPM."""
ACTIONS = ("quote", "activatecredential", "pcr_event")
"""Commands after which the TPM has done something that its death keeps from being told."""
STALLS = ("createprimary", "getrandom", "quote", "activatecredential", "pcr_event", "getcapability")


@pytest.fixture(scope="session")
def counted(
    launcher: Launcher,
    guests: dict[Kind, Guest],
    amd: AmdRoot,
    image: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """Unlock once, without a fault, and list the commands."""
    with booted(launcher, guests["svsm-vtpm"], amd, image, tmp_path_factory.mktemp("counted")) as boot:
        done = boot.unlock()
        assert done.code == 0, done.stderr.read_text()
        commands = list(boot.tpm.commands)
        invariants.the_boot_is_capped(boot.vtpm)
        boot.nothing_more_is_released()
    return commands


def test_every_command_is_a_case(counted: list[str]) -> None:
    """The cases of this file are all commands that an unlock sends, and no other."""
    assert len(counted) == COMMANDS, counted
    assert set(ACTIONS) | set(STALLS) <= set(counted)


@pytest.mark.parametrize("number", range(COMMANDS))
def test_a_tpm_that_dies_ends_the_boot_and_the_next_one_gets_the_key(boot: Boot, number: int) -> None:
    """Before any command, also those of the cap: the exit code says that nothing is capped, in words of what to do."""
    boot.tpm.at = number
    _end_by_death(boot)
    boot.next_boot()


@pytest.mark.parametrize("command", ACTIONS)
def test_a_tpm_that_dies_once_it_has_acted_ends_the_boot_too(
    boot: Boot, counted: list[str], command: str
) -> None:
    """It quoted, it opened the credential, it was capped; nobody learned of it."""
    boot.tpm.at, boot.tpm.fault = counted.index(command), "dies after"
    _end_by_death(boot)
    boot.next_boot()


def _end_by_death(boot: Boot) -> None:
    done = boot.unlock()
    assert boot.vtpm.process.poll() == -signal.SIGKILL, "the fault has come"
    assert done.code == HARDWARE, done.stderr.read_text()
    error = done.json["error"]
    assert error["what"]
    assert error["code"].startswith(("tpm.", "cap."))
    again = boot.start("cap")
    assert again.wait() == HARDWARE, "a TPM that is gone is not capped, and that is an error"


@pytest.mark.parametrize("command", STALLS)
def test_a_tpm_that_answers_late_only_costs_time(boot: Boot, counted: list[str], command: str) -> None:
    """The SVSM is slow, or the host does not run it; once it runs again, the unlock ends as always."""
    boot.tpm.at, boot.tpm.fault = counted.index(command), "stalls"
    agent = boot.start("unlock", "--prove")
    assert boot.tpm.stalled.wait(WAIT_S)
    boot.tpm.go_on.set()
    assert agent.wait() == 0, agent.stderr.read_text()
    assert agent.json["confirmed"]
    invariants.the_boot_is_capped(boot.vtpm)
    assert boot.owner.events() == ["released", "confirmed-opened"]


@pytest.mark.parametrize("command", STALLS)
def test_an_agent_killed_while_its_tpm_is_silent_leaves_a_boot_that_can_be_capped(
    boot: Boot, counted: list[str], command: str
) -> None:
    """Its unit lost patience, and then the unit of the cap runs, with a TPM that has come back meanwhile."""
    boot.tpm.at, boot.tpm.fault = counted.index(command), "stalls"
    agent = boot.start("unlock", "--prove")
    assert boot.tpm.stalled.wait(WAIT_S)
    agent.send(signal.SIGTERM)
    agent.send(signal.SIGKILL)
    assert agent.wait() == -signal.SIGKILL
    boot.tpm.go_on.set()
    boot.cap()
    boot.nothing_more_is_released()
    if "confirmed-opened" not in boot.owner.events():
        boot.next_boot()
