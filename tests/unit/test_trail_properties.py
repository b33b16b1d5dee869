"""What a trail says of a check, and of its refusal, whatever a sender put into it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol import messages
from kagimori_protocol.errors import NotAuthentic
from kagimori_protocol.messages import Verdict
from kagimori_verifier.trail import MAX_TEXT, Trail

texts = st.text(max_size=3000) | st.text("\x1b\u202e\ud800\u00e9a", min_size=900, max_size=1200)


@given(texts, texts)
def test_a_refusal_says_no_more_than_its_check(expected: str, found: str) -> None:
    """A chain of sixty names of eight kilobytes each is the host's to send, and must not become a line of a log."""
    trail = Trail()
    with pytest.raises(NotAuthentic) as caught:
        trail.require("endorsement.root", False, expected=expected, found=found)
    error = caught.value
    assert (error.expected, error.found) == (trail.checks[0].expected, trail.checks[0].found)
    assert len(str(error)) <= 2 * MAX_TEXT + 100
    assert str(error).replace("\n", "").isprintable()


@given(st.lists(st.tuples(st.booleans(), texts, texts), max_size=4))
def test_whatever_was_noted_can_be_sent_and_read(notes: list[tuple[bool, str, str]]) -> None:
    """The verdict is made of the trail; half a surrogate in it would keep it from being written."""
    trail = Trail()
    for holds, expected, found in notes:
        trail.note("pcr.8", holds, expected=expected, found=found)
    verdict = Verdict(confirm_key=bytes(32), allowed=not trail.failed, checks=list(trail.checks))
    assert messages.decode_payload(messages.encode(verdict)) == verdict
