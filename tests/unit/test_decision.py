"""Nothing is allowed but what was checked: an empty or incomplete trail denies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kagimori_verifier
from kagimori_protocol import messages
from kagimori_protocol.errors import Malformed, NotAuthentic
from kagimori_protocol.messages import Check, Kind
from kagimori_verifier.decision import MANDATORY, Allow, Deny, decide
from kagimori_verifier.explanations import EXPLANATIONS
from kagimori_verifier.trail import MAX_TEXT, Trail

KINDS = list(messages.KINDS)


def complete(kind: Kind) -> list[Check]:
    """Give a trail on which every mandatory check holds."""
    return [Check(id=check, ok=True, expected="so", found="so") for check in MANDATORY[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_trail_allows(kind: Kind) -> None:
    """And further checks that hold change nothing."""
    checks = complete(kind)
    assert decide(kind, checks) == Allow(tuple(checks))
    assert isinstance(decide(kind, [*checks, Check(id="pcr.0", ok=True, expected="", found="")]), Allow)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_trail_denies_and_says_what_is_missing(kind: Kind) -> None:
    """Nothing checked is nothing proven."""
    decision = decide(kind, [])
    assert isinstance(decision, Deny)
    assert {check.id for check in decision.checks} == set(MANDATORY[kind])
    assert not any(check.ok for check in decision.checks)


@pytest.mark.parametrize(("kind", "missing"), [(kind, check) for kind in KINDS for check in MANDATORY[kind]])
def test_a_mandatory_check_that_was_not_made_denies(kind: Kind, missing: str) -> None:
    """Even if all others hold, and it is shown as failed."""
    decision = decide(kind, [check for check in complete(kind) if check.id != missing])
    assert isinstance(decision, Deny)
    assert [check.id for check in decision.checks if not check.ok] == [missing]


@pytest.mark.parametrize("kind", KINDS)
def test_any_check_that_does_not_hold_denies(kind: Kind) -> None:
    """Mandatory or not, and even if it holds another time."""
    for failed in ("cap.off", "pcr.7", "report.signature", "anything"):
        check = Check(id=failed, ok=False, expected="so", found="not so")
        assert isinstance(decide(kind, [*complete(kind), check]), Deny)
        assert isinstance(decide(kind, [check, *complete(kind)]), Deny)


@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.sampled_from(sorted(MANDATORY["svsm-vtpm"])), st.booleans())),
)
def test_allow_means_that_all_was_made_and_all_holds(kind: Kind, made: list[tuple[str, bool]]) -> None:
    """For any trail whatever."""
    checks = [Check(id=check, ok=ok, expected="", found="") for check, ok in made]
    allowed = isinstance(decide(kind, checks), Allow)
    assert allowed == (all(ok for _, ok in made) and set(MANDATORY[kind]) <= {check for check, _ in made})


def test_a_tpm_brings_more_checks_and_takes_none_away() -> None:
    """What a report alone must show, a report with a TPM must show too; each kind has its list, each check once."""
    assert set(MANDATORY) == set(messages.KINDS)
    own = {"measurement.one-vm"}  # what a TPM's PCRs tell apart elsewhere
    assert set(MANDATORY["snp-direct"]) - own < set(MANDATORY["svsm-vtpm"])
    for checks in MANDATORY.values():
        assert len(checks) == len(set(checks))


def test_every_mandatory_check_is_made_somewhere_in_the_code() -> None:
    """A check that was renamed or removed would deny everybody; one that is only listed protects nobody."""
    directory = Path(str(kagimori_verifier.__file__)).parent
    code = "".join(
        path.read_text()
        for path in sorted(directory.rglob("*.py"))
        if path.name not in {"decision.py", "explanations.py"}
    )
    made = set(re.findall(r'"([a-z][a-z0-9-]*\.[a-z0-9-]+)"', code))
    named = set(re.findall(r'trail, "([a-z]+)", snp\.report', code))
    made |= {f"{subject}.{rule}" for subject in named for rule in ("allowed", "required")}
    assert set(MANDATORY["svsm-vtpm"]) - made == set()


def test_every_check_that_always_is_made_is_mandatory() -> None:
    """What is explained for steps 1 to 9 and not mandatory is made in some cases only, and those are named here."""
    explained = {check for check, explanation in EXPLANATIONS.items() if explanation.step <= 9}
    sometimes = {
        "endorsement.revoked",  # with a revocation list
        "signer.provider",  # for a VLEK
        "certificate.chain",  # codes of errors inside of a check, shown beside what was found
        "eventlog.bank",
        "eventlog.userspace",
        "pcr",  # one for each PCR that the policy governs: pcr.0, pcr.4, ...
    }
    assert explained - {check for checks in MANDATORY.values() for check in checks} - sometimes == set()


# The trail that decisions are taken from


def test_what_is_required_ends_the_exchange_under_its_name() -> None:
    """It is written down first, so that the ledger has it."""
    trail = Trail()
    trail.require("session.fresh", True, expected="young", found="young")
    with pytest.raises(NotAuthentic) as caught:
        trail.require("report.tie", False, expected="this", found="that")
    assert (caught.value.code, caught.value.expected, caught.value.found) == ("report.tie", "this", "that")
    assert [(check.id, check.ok) for check in trail.checks] == [
        ("session.fresh", True),
        ("report.tie", False),
    ]
    assert [check.id for check in trail.failed] == ["report.tie"]


def test_what_is_noted_is_gathered() -> None:
    """A failed note does not end anything: its owner wants all reasons at once."""
    trail = Trail()
    for number in range(3):
        trail.note(f"pcr.{number}", number == 1, expected="", found="")
    assert [check.id for check in trail.failed] == ["pcr.0", "pcr.2"]


def test_a_step_is_one_check_whatever_fails_inside() -> None:
    """An error of ours becomes the check's failure, with its own code beside; a bug of ours stays a bug."""
    trail = Trail()
    with trail.step("report.layout", "a report"):
        pass
    with pytest.raises(NotAuthentic) as caught, trail.step("manifest.ek", "an EK"):
        raise Malformed("It is none.", code="ek.size", found="3 bytes")
    assert (caught.value.code, caught.value.found) == ("manifest.ek", "3 bytes (ek.size)")
    assert [(check.id, check.ok) for check in trail.checks] == [
        ("report.layout", True),
        ("manifest.ek", False),
    ]
    with pytest.raises(ZeroDivisionError), trail.step("quote.layout", "a quote"):
        _ = 1 // 0
    assert len(trail.checks) == 2


def test_what_a_terminal_would_obey_is_escaped() -> None:
    """Texts hold words that whoever sent the evidence chose."""
    trail = Trail()
    trail.note("pcr.8", False, expected="\x1b[2J", found="a\nb\u202ec")
    assert (trail.checks[0].expected, trail.checks[0].found) == ("\\x1b[2J", "a\\nb\\u202ec")


@given(st.text(max_size=20), st.integers(0, 3 * MAX_TEXT))
def test_every_text_fits_a_verdict_whatever_it_holds(piece: str, times: int) -> None:
    """Escaping makes a text longer, but never longer than a guest would read."""
    trail = Trail()
    text = (piece * times)[: 5 * MAX_TEXT]
    trail.note("pcr.8", False, expected=text, found="\U000e0001" * times)
    verdict = messages.Verdict(confirm_key=bytes(32), allowed=False, checks=list(trail.checks))
    assert messages.decode_payload(messages.encode(verdict)) == verdict
    assert len(trail.checks[0].expected) <= MAX_TEXT
