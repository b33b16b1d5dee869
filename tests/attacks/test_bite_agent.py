"""Every check of the agent bites: what it takes, what it opens, and what it leaves behind it.

As in test_bite.py: blind to a story's checks the attack reaches its goal, and each of them alone stops it. Doors and disks
have tests of their own (tests/contract, tests/unit/luks); here is what the exchange, the two layers and the cap refuse.
"""

from __future__ import annotations

import pytest
from tests.attacks.bite import agents, names
from tests.attacks.bite.explained import AGENT
from tests.attacks.bite.story import Scene, Story, hold

BITTEN = frozenset(check for story in agents.STORIES for check in story.checks)
THE_VERIFIERS = {"manifest.hello"}
"""Checks of the verifier that stop a lie as well."""


@pytest.mark.parametrize("story", agents.STORIES, ids=lambda story: story.told)
def test_without_its_checks_an_attack_gets_through_and_each_of_them_alone_stops_it(
    story: Story, scene: Scene
) -> None:
    """The heart of the matter; the story's own words say what happens."""
    hold(story, scene, agents.TWINS)


def test_every_name_that_the_agent_can_refuse_by_has_a_story_or_an_explanation() -> None:
    """A check that is added without an attack that it stops is not finished."""
    known = names.of_the_agent()
    assert known - BITTEN - set(AGENT) == set(), "these checks have no story"
    assert (BITTEN - THE_VERIFIERS | set(AGENT)) - known == set(), "these names are in no code by now"
    assert BITTEN & set(AGENT) == set(), "these have a story, and need no explanation"
