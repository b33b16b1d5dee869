"""Every check bites: without it, its attack gets through; and nothing that the code can check is left out.

One story is one lie (``bite/``). A verifier that is blind to all checks of a story gives the attacker what it wants; one
that is blind to all of them but one stops it by exactly that one. So each name alone is enough to stop its lie, and none
is there for nothing.
"""

from __future__ import annotations

import pytest
from tests.attacks.bite import enrolments, names, reports, sessions, tpms
from tests.attacks.bite.explained import EXPLAINED, WITHIN
from tests.attacks.bite.story import Scene, Story, hold
from tests.attacks.bite.twins import TWINS

STORIES = (*sessions.STORIES, *reports.STORIES, *tpms.STORIES, *enrolments.STORIES)
BITTEN = frozenset(check for story in STORIES for check in story.checks)


def by_told(story: Story) -> str:
    """Name a case by its story."""
    return story.told


@pytest.mark.parametrize("story", STORIES, ids=by_told)
def test_without_its_checks_an_attack_gets_through_and_each_of_them_alone_stops_it(
    story: Story, scene: Scene
) -> None:
    """The heart of the matter; the story's own words say what happens."""
    hold(story, scene, TWINS)


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
