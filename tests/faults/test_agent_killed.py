"""The agent is killed, or told to end, at each step of an unlock: the boot ends capped, and the next one gets the key."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.faults import invariants
from tests.faults.boots import Boot, booted
from tests.faults.guests import Guest
from tests.faults.programs import Launcher

from kagimori_protocol.messages import Kind
from kagimori_simulator.amd import AmdRoot

pytestmark = pytest.mark.slow  # a boot per step

POINTS = 28
"""How many points an unlock passes."""
ENDED = 128 + signal.SIGTERM
"""Exit code of an agent that was told to end."""


@pytest.fixture(scope="session")
def counted(
    launcher: Launcher,
    guests: dict[Kind, Guest],
    amd: AmdRoot,
    image: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """Unlock once, without a fault, and list the points."""
    directory = tmp_path_factory.mktemp("counted")
    with booted(launcher, guests["svsm-vtpm"], amd, image, directory) as boot:
        done = boot.unlock(record=directory / "record")
        assert done.code == 0, done.stderr.read_text()
    points = (directory / "record").read_text().splitlines()
    assert len(points) == len(set(points))
    return points


def test_every_step_is_a_case(counted: list[str]) -> None:
    """The cases of this file are all points that an unlock passes, and no other."""
    assert len(counted) == POINTS, counted


@pytest.mark.parametrize("number", range(POINTS))
def test_an_agent_killed_anywhere_leaves_a_boot_that_the_cap_closes(
    boot: Boot, counted: list[str], number: int
) -> None:
    """It cannot cap then, so the unit after it does; whoever gets into this boot asks in vain."""
    done = boot.unlock(at=counted[number])
    assert done.code == -signal.SIGKILL, counted[number]
    boot.cap()
    boot.nothing_more_is_released()
    if "confirmed-opened" not in boot.owner.events():
        boot.next_boot()


@pytest.mark.parametrize("number", range(POINTS))
def test_an_agent_told_to_end_anywhere_caps_before_it_does(
    boot: Boot, counted: list[str], number: int
) -> None:
    """Its unit is stopped; the boot is capped by the agent itself, once and as always."""
    done = boot.unlock(at=counted[number], signal=signal.SIGTERM)
    over = "the result is told" in counted[number]
    assert done.code == (-signal.SIGTERM if over else ENDED), counted[number]
    invariants.the_boot_is_capped(boot.vtpm)
    if "confirmed-opened" not in boot.owner.events():
        boot.next_boot()
