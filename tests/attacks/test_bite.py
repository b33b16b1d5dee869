"""Every check bites: without it, its attack gets through; and nothing that the code can check is left out.

One story is one lie (``bite/``). A verifier that is blind to all checks of a story gives the attacker what it wants; one
that is blind to all of them but one stops it by exactly that one. So each name alone is enough to stop its lie, and none
is there for nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID
from tests.attacks.bite import names, reports, sessions, tpms
from tests.attacks.bite.blind import blind
from tests.attacks.bite.explained import EXPLAINED, WITHIN
from tests.attacks.bite.story import Scene, Stand, Stopped, Story
from tests.attacks.bite.twins import TWINS
from tests.attacks.lies import GOVERNED
from tests.worlds import CHIP_ID, DIRECT, SVSM, Owner, enrol_direct_vm, enrol_vm_below_svsm

from kagimori_agent.cap import CAP_DATA
from kagimori_agent.devices.vtpm import open_vtpm
from kagimori_protocol import tpm
from kagimori_simulator import measured_boot, pe
from kagimori_simulator.amd import AmdRoot, Vek
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm
from kagimori_verifier.appraise.policy import BootWay

STORIES = (*sessions.STORIES, *reports.STORIES, *tpms.STORIES)
BITTEN = frozenset(check for story in STORIES for check in story.checks)
BOOTS: dict[str, MeasuredBoot] = {
    "honest": measured_boot.grub(),
    "evil": measured_boot.grub(kernel=pe.image({".text": b"an attacker's kernel"})),
    "capped": measured_boot.grub(),
    "uki": measured_boot.uki(),
}

Stands = Callable[[str], tuple[Stand, dict[str, Any]]]


@pytest.fixture(scope="module")
def stands(tmp_path_factory: pytest.TempPathFactory, amd: AmdRoot) -> Iterator[Stands]:
    """Give the TPMs that stories share, each started when it is first asked for."""
    started: dict[str, tuple[Stand, dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:

        def start(where: str) -> tuple[Stand, dict[str, Any]]:
            if where not in started:
                vtpm = stack.enter_context(Vtpm.start(tmp_path_factory.mktemp(where)))
                vtpm.play(BOOTS[where])
                svsm = Svsm(SnpMachine(amd, chip_id=CHIP_ID, svsm=True, measurement=SVSM), vtpm)
                opened = stack.enter_context(open_vtpm(tcti=vtpm.tcti, event_log=vtpm.event_log_path))
                stand = Stand(svsm, opened, opened.make_keys())
                kept: dict[str, Any] = {}
                if where == "capped":
                    kept["quote"] = opened.quote(bytes(32), tpm.pcr_selection((*GOVERNED, 15)))
                    opened.measure(15, CAP_DATA)
                started[where] = stand, kept
            return started[where]

        yield start


@pytest.fixture
def scene(
    request: pytest.FixtureRequest,
    office: Owner,
    stands: Stands,
    veks: dict[tuple[str, bytes, bytes, str], Vek],
) -> Scene:
    """Give the VM of a story, as its owner has enrolled it."""
    story: Story = request.getfixturevalue("story")
    direct = story.where == "direct"
    measurement = DIRECT if direct else SVSM
    machine = SnpMachine(
        office.root, chip_id=CHIP_ID, svsm=not direct, measurement=measurement, report_version=3
    )
    machine._veks = veks
    if direct:
        enrol_direct_vm(office, UUID, UNLOCK_KEY)
        return Scene(office, machine, "direct")
    profile: BootWay = "uki" if story.where == "uki" else "grub"
    enrol_vm_below_svsm(office, UUID, UNLOCK_KEY, profile, BOOTS["uki" if profile == "uki" else "honest"])
    stand, kept = stands(story.where)
    svsm = copy.copy(stand.svsm)
    svsm.machine = machine
    return Scene(office, machine, profile, svsm, stand, kept)


def by_told(story: Story) -> str:
    """Name a case by its story."""
    return story.told


@pytest.mark.parametrize("story", STORIES, ids=by_told)
def test_without_its_checks_an_attack_gets_through_and_each_of_them_alone_stops_it(
    story: Story, scene: Scene
) -> None:
    """The heart of the matter; the story's own words say what happens."""
    twins = TWINS | dict(story.twins)
    story.prepare(scene)
    for last in story.checks:
        with blind(set(story.checks) - {last}, twins), pytest.raises(Stopped) as stopped:
            story.attack(scene)
        assert stopped.value.by == {last}
    if len(story.checks) > 1:
        with pytest.raises(Stopped) as stopped:
            story.attack(scene)
        assert stopped.value.by <= set(story.checks)
    with blind(story.checks, twins):
        story.attack(scene)


def test_every_name_that_the_verifier_can_give_a_check_has_a_story_or_an_explanation() -> None:
    """A check that is added without an attack that it stops is not finished."""
    known = names.on_a_trail() | names.in_errors()
    assert known - BITTEN - set(EXPLAINED) == set(), "these checks have no story"
    assert (BITTEN | set(EXPLAINED)) - known == set(), "these names are in no code by now"
    assert names.importers_of_rooms_for_people() == set(), "these would let a room that only shows decide"
    assert BITTEN & set(EXPLAINED) == set(), "these have a story, and need no explanation"


def test_every_reason_within_a_step_belongs_to_a_check_that_has_a_story() -> None:
    """What a parser complains of is told as a part of a named check, and never by itself."""
    assert names.within_steps() - BITTEN - set(WITHIN) == set(), "these codes belong to no check"
    assert set(WITHIN) - names.within_steps() == set(), "these codes are in no code by now"
    assert set(WITHIN.values()) <= BITTEN | set(EXPLAINED)
