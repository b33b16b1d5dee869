"""The targets by themselves: seeds get through, mutations of them are refused or accepted, and a fault would be seen."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz import inputs, workshop
from tests.fuzz import target as target_module
from tests.fuzz.mutators import documents, tlv
from tests.fuzz.target import MAX_REFUSAL, OverBound, Target, accepts, accepts_within, peak_mib
from tests.fuzz.targets import planted, x509
from tests.fuzz.targets.names import NAMES, load

from kagimori_protocol.errors import Malformed

TRIES = 1000
"""Mutations of each target's seeds in the quick suite; the fuzzers make a thousand times as many."""


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_gets_through(name: str) -> None:
    """A target that refuses everything at the door would find nothing, and say so happily."""
    target = load(name)
    seeds = list(target.seeds())
    assert len(seeds) >= 5
    for index, seed in enumerate(seeds):
        assert accepts(target, seed), f"seed {index}: {seed[:40].hex()}"


@pytest.mark.parametrize("name", NAMES)
def test_mutated_seeds_are_refused_or_accepted_and_nothing_else(name: str) -> None:
    """By the same mutators as the fuzzers', with chance that is the same each time, and without coverage to lead it."""
    target = load(name)
    assert target.mutate is not None
    seeds = [seed for seed in target.seeds() if len(seed) <= target.bound.fuzzed]
    chance = random.Random(name)

    def bytewise(data: bytes, limit: int) -> bytes:
        changed = bytearray(data[:limit])
        for _ in range(chance.randint(1, 3)):
            at = chance.randint(0, len(changed))
            changed[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        return bytes(changed[:limit])

    outcomes = set()
    for _ in range(TRIES):
        data = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 3))):
            data = target.mutate(data, target.bound.fuzzed, random.Random(chance.random()), bytewise)
            assert isinstance(data, bytes)
        outcomes.add(accepts(target, data[: target.bound.fuzzed]))
    assert outcomes == {True, False}


def test_a_stray_error_is_a_finding() -> None:
    """Only the refusals that a target names may leave it."""
    assert accepts(planted.TARGET, b"a")
    assert not accepts(planted.TARGET, b"x")
    with pytest.raises(ValueError, match="stray"):
        accepts(planted.TARGET, b"b")


def test_an_input_that_is_slow_is_a_finding() -> None:
    """Each is measured by itself, so that a thousand quick inputs do not hide it."""
    assert accepts_within(planted.TARGET, b"a", slower=1)
    assert accepts_within(planted.TARGET, b"a", slower=1)
    with pytest.raises(OverBound, match="ms of CPU"):
        accepts_within(planted.TARGET, b"c", slower=1)


def test_an_input_that_raises_the_high_water_mark_by_more_than_its_bound_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the process had at most before is not counted to it."""
    bound = planted.TARGET.bound.memory_mib
    for grown, found in ((bound, False), (bound + 1, True)):
        marks = iter([500.0, 500.0 + grown])
        monkeypatch.setattr(target_module, "peak_mib", lambda marks=marks: next(marks))
        if not found:
            assert accepts_within(planted.TARGET, b"a", slower=1)
            continue
        with pytest.raises(OverBound, match="MiB"):
            accepts_within(planted.TARGET, b"a", slower=1)


def test_the_mark_is_this_processs_own() -> None:
    """In MiB: a Python process has tens of them, and 64 more show."""
    before = peak_mib()
    assert 10 < before < 1 << 16
    held = [bytearray(b"x" * (1 << 20)) for _ in range(64)]
    assert peak_mib() >= before
    assert len(held) == 64


def test_a_refusal_of_boundless_length_is_a_finding() -> None:
    """Parts of a refusal are the sender's, and it reaches logs and consoles."""

    def run(data: bytes) -> None:
        raise Malformed("broken", found=data.hex())

    target = Target("told", "", planted.TARGET.bound, (Malformed,), run, planted.seeds, planted.worst)
    assert not accepts(target, b"short")
    with pytest.raises(AssertionError, match="characters"):
        accepts(target, bytes(MAX_REFUSAL))


@given(st.binary(max_size=5000))
def test_an_input_is_printed_so_that_it_can_be_given_back(data: bytes) -> None:
    """The log of a CI is all that is left of a finding there."""
    text = inputs.as_text(data)
    assert text.isascii()
    assert inputs.from_text(text) == data


@pytest.mark.parametrize("text", ["xyz", "z:00", "z:", "0"])
def test_what_is_no_input_is_said_to_be_none(text: str) -> None:
    """A person copies it by hand."""
    with pytest.raises(ValueError, match=r".+"):
        inputs.from_text(text)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=4))
def test_parts_are_cut_as_they_were_joined(parts: list[bytes]) -> None:
    """And any bytes at all can be cut."""
    assert workshop.cut(workshop.joined(*parts), len(parts)) == parts
    assert len(workshop.cut(parts[0], 3)) == 3


def test_a_change_deep_inside_der_keeps_every_length_true() -> None:
    """Otherwise each mutation would be refused for its lengths, and nothing behind them be reached."""
    whole = x509.authorities()[0].raw
    tree = tlv.nodes(whole)
    assert len(tree) > 50
    for index, node in enumerate(tree):
        changed = tlv.replaced(whole, tree, index, tlv.element(whole[node.start], b"x" * 300))
        assert tlv.nodes(changed)[0].end == len(changed)
        same = tlv.replaced(whole, tree, index, whole[node.start : node.end])
        assert same == whole


@pytest.mark.slow
def test_a_list_that_is_repeated_again_and_again_stays_within_the_limit() -> None:
    """One mutation may take the same list twice; a fuzzer that ran out of memory by itself would look like a finding."""
    limit, data = 4000, b'{"versions":[%s]}' % b",".join([b"1"] * 900)
    tracemalloc.start()
    try:
        for seed in range(2000):
            mutated = documents.mutate_message(data, limit, random.Random(seed), lambda one, most: one[:most])
            assert len(mutated) <= limit
        assert tracemalloc.get_traced_memory()[1] < 200 * limit
    finally:
        tracemalloc.stop()
