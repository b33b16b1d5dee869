"""Every rule of step 9 by table: what passes, what fails, and that nothing known means no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.messages import Check
from kagimori_protocol.snp import POLICY_BITS, REPORT_SIZE, Report, TcbVersion
from kagimori_verifier.appraise.boot import appraise_boot
from kagimori_verifier.appraise.endorsement import appraise_endorsement
from kagimori_verifier.appraise.policy import BootWay, Policy, TcbFloor
from kagimori_verifier.appraise.reference import BootState, PcrReference, References
from kagimori_verifier.appraise.snp import appraise_snp
from kagimori_verifier.claims import Revocation, Root, SnpClaims
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.eventlog import Event

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CHIP = bytes(range(64))
FLOOR = TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219)
TCB = TcbVersion(None, 4, 0, 24, 219)
POLICY = Policy(boot_way="grub", tcb_floors={"Milan": FLOOR})
GOOD = 1 << 17 | 1 << 16
"""RESERVED_MUST_BE_ONE and SMT: an ordinary guest policy."""


def report(**fields: Any) -> Report:  # noqa: ANN401 - fields of a report
    """Make a report of version 5 on an ordinary platform."""
    ordinary: dict[str, Any] = {"policy": GOOD, "platform_info": 0b100101, "chip_id": CHIP}
    return replace(Report.parse(b"\x05" + bytes(REPORT_SIZE - 1)), **(ordinary | fields))


def claims(made: Report | None = None, /, **changes: Any) -> SnpClaims:  # noqa: ANN401 - claims of a report
    """Make the claims of a genuine, recent Milan."""
    honest = SnpClaims(
        report=report() if made is None else made,
        product="Milan",
        root=Root(bytes(32), "Milan"),
        signer="vcek",
        csp_id=None,
        reported_tcb=TCB,
        committed_tcb=TCB,
        current_tcb=TCB,
        launch_tcb=TCB,
        valid_from=NOW - DAY,
        valid_until=NOW + DAY,
        revocation=Revocation(NOW + DAY, None),
    )
    return replace(honest, **changes)


def policy(**changes: Any) -> Policy:  # noqa: ANN401 - fields of a policy
    """Change the ordinary policy."""
    return msgspec.structs.replace(POLICY, **changes)


def judged(snp: SnpClaims, wanted: Policy = POLICY, chips: frozenset[bytes] = frozenset({CHIP})) -> Trail:
    """Apply every rule about chip, firmware and certificates."""
    trail = Trail()
    appraise_endorsement(trail, snp, wanted, NOW)
    appraise_snp(trail, snp, References(wanted, chips, (), ()))
    return trail


def failed(trail: Trail) -> set[str]:
    """Name the checks that do not hold."""
    return {check.id for check in trail.failed}


def test_an_ordinary_machine_passes_every_rule() -> None:
    """The table below changes one thing at a time."""
    trail = judged(claims())
    assert failed(trail) == set()
    assert len({check.id for check in trail.checks}) == len(trail.checks) >= 13


TCBS = ("reported_tcb", "committed_tcb", "current_tcb", "launch_tcb")

CASES = {
    "a VLEK where only a VCEK counts": (
        claims(signer="vlek", csp_id="a provider"),
        POLICY,
        {"signer.allowed", "signer.provider", "chip.allowed"},
    ),
    "a VLEK of another provider": (
        claims(signer="vlek", csp_id="another"),
        policy(signers=["vlek"], csp_ids=["a provider"], any_chip=True),
        {"signer.provider"},
    ),
    "a VLEK without a provider": (
        claims(signer="vlek", csp_id=None),
        policy(signers=["vlek"], csp_ids=["a provider"], any_chip=True),
        {"signer.provider"},
    ),
    "a VLEK of the provider": (
        claims(signer="vlek", csp_id="a provider"),
        policy(signers=["vlek"], csp_ids=["a provider"], any_chip=True),
        set(),
    ),
    "a VLEK says nothing about a chip": (
        claims(signer="vlek", csp_id="a provider"),
        policy(signers=["vlek"], csp_ids=["a provider"]),
        {"chip.allowed"},
    ),
    "a certificate that expired": (claims(valid_until=NOW - DAY), POLICY, {"endorsement.valid"}),
    "a certificate of tomorrow": (claims(valid_from=NOW + DAY), POLICY, {"endorsement.valid"}),
    "no revocation list": (
        claims(revocation=Revocation(None, "none was found")),
        POLICY,
        {"endorsement.revocation"},
    ),
    "no revocation list, and none demanded": (
        claims(revocation=Revocation(None, "none was found")),
        policy(revocation="if-present"),
        set(),
    ),
    "a stale revocation list": (
        claims(revocation=Revocation(NOW - DAY, None)),
        POLICY,
        {"endorsement.revocation"},
    ),
    "a stale revocation list, even where none is demanded": (
        claims(revocation=Revocation(NOW - DAY, None)),
        policy(revocation="if-present"),
        {"endorsement.revocation"},
    ),
    "a guest that may be debugged": (claims(report(policy=GOOD | 1 << 19)), POLICY, {"policy.allowed"}),
    "a guest that may migrate": (claims(report(policy=GOOD | 1 << 18)), POLICY, {"policy.allowed"}),
    "a policy bit that has no name yet": (claims(report(policy=GOOD | 1 << 40)), POLICY, {"policy.allowed"}),
    "a demanded policy bit that is not set": (
        claims(),
        policy(guest_policy_required=["SINGLE_SOCKET"]),
        {"policy.required"},
    ),
    "a demanded policy bit that is set": (claims(), policy(guest_policy_required=["SMT"]), set()),
    "a platform flag that nobody allowed": (
        claims(report(platform_info=1 << 7)),
        POLICY,
        {"platform.allowed"},
    ),
    "a platform bit that has no name yet": (
        claims(report(platform_info=1 << 33)),
        POLICY,
        {"platform.allowed"},
    ),
    "a platform bit without a name, allowed by its number": (
        claims(report(platform_info=1 << 33)),
        policy(platform_allowed=["bit 33"]),
        set(),
    ),
    "memory whose aliases were not checked": (
        claims(report(platform_info=0)),
        policy(platform_required=["ALIAS_CHECK_COMPLETE"]),
        {"platform.required"},
    ),
    "memory whose aliases were checked": (
        claims(),
        policy(platform_required=["ALIAS_CHECK_COMPLETE"]),
        set(),
    ),
    "a product without a floor": (
        claims(product="Genoa"),
        POLICY,
        {"product.allowed"},
    ),
    **{
        f"an old {part} in {name}": (
            claims(**{name: TCB._replace(**{part: value})}),
            POLICY,
            {f"tcb.{name.removesuffix('_tcb')}"},
        )
        for name in TCBS
        for part, value in (("boot_loader", 3), ("snp", 23), ("microcode", 218))
    },
    "newer microcode does not make up for an older boot loader": (
        claims(current_tcb=TcbVersion(None, 3, 9, 99, 255)),
        POLICY,
        {"tcb.current"},
    ),
    "newer everything": (claims(**dict.fromkeys(TCBS, TcbVersion(None, 5, 1, 25, 220))), POLICY, set()),
    "an old fmc on Turin": (
        claims(product="Turin", **dict.fromkeys(TCBS, TCB._replace(fmc=0))),
        policy(tcb_floors={"Turin": TcbFloor(fmc=1, boot_loader=4, tee=0, snp=24, microcode=219)}),
        {"tcb.reported", "tcb.committed", "tcb.current", "tcb.launch"},
    ),
    "mitigations that were off at launch": (
        claims(report(launch_mit_vector=0b01, current_mit_vector=0b11)),
        policy(launch_mitigations=0b11, current_mitigations=0b11),
        {"mitigation.launch"},
    ),
    "mitigations that were switched off": (
        claims(report(launch_mit_vector=0b11, current_mit_vector=0b10)),
        policy(launch_mitigations=0b11, current_mitigations=0b11),
        {"mitigation.current"},
    ),
    "mitigations that are all on, and more": (
        claims(report(launch_mit_vector=0b111, current_mit_vector=0b111)),
        policy(launch_mitigations=0b11, current_mitigations=0b11),
        set(),
    ),
    "a report too old to tell of mitigations": (
        claims(report(version=4)),
        policy(launch_mitigations=1, current_mitigations=1),
        {"mitigation.launch", "mitigation.current"},
    ),
    "another chip": (claims(report(chip_id=bytes(64))), POLICY, {"chip.allowed"}),
    "any chip": (claims(report(chip_id=bytes(64))), policy(any_chip=True), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_each_rule_fails_alone_and_by_its_name(case: str) -> None:
    """One difference, one named check; the others still hold."""
    snp, wanted, expected = CASES[case]
    assert failed(judged(snp, wanted)) == expected


def test_a_vm_without_chips_runs_on_none() -> None:
    """Empty means no."""
    assert failed(judged(claims(), chips=frozenset())) == {"chip.allowed"}


@pytest.mark.parametrize(
    ("empty", "check"),
    [
        ({"guest_policy_allowed": []}, "policy.allowed"),
        ({"platform_allowed": []}, "platform.allowed"),
        ({"tcb_floors": {}}, "product.allowed"),
        ({"signers": []}, "signer.allowed"),
    ],
)
def test_an_empty_list_allows_nothing(empty: dict[str, Any], check: str) -> None:
    """A list that was forgotten is no list that allows all."""
    assert failed(judged(claims(), policy(**empty))) == {check}


def test_a_signature_by_the_operators_own_root_is_told_in_the_verdict() -> None:
    """Nobody overlooks that a simulated or foreign root vouched."""
    trail = judged(claims(root=Root(bytes(32), "Milan", "simulated")))
    found = next(check.found for check in trail.checks if check.id == "signer.allowed")
    assert "simulated" in found
    assert "no root of AMD" in found


@given(bits=st.integers(min_value=0, max_value=(1 << 48) - 1))
def test_no_guest_policy_passes_with_a_bit_that_was_not_named(bits: int) -> None:
    """Any combination of bits: every one of them has to be allowed by name."""
    snp = claims(report(policy=bits << 16))
    fine = all(
        POLICY_BITS.get(bit + 16) in POLICY.guest_policy_allowed for bit in range(48) if bits >> bit & 1
    )
    assert ("policy.allowed" not in failed(judged(snp))) == fine


def digest(number: int) -> bytes:
    """Make a PCR value."""
    return bytes([number]) * 32


def state(label: str, values: Mapping[int, int]) -> BootState:
    """Make a boot state."""
    return BootState(label, {index: PcrReference(digest(value)) for index, value in values.items()})


OWNED = (8, 9)
PROFILE = {index: 100 + index for index in POLICY.governed_pcrs if index not in OWNED}
VM = {index: 100 + index for index in OWNED}
QUOTED = {index: digest(value) for index, value in (PROFILE | VM).items()} | {15: bytes(32)}


def booted(
    pcrs: Mapping[int, bytes] = QUOTED,
    profile: tuple[BootState, ...] = (state("shared", PROFILE),),
    vm: tuple[BootState, ...] = (state("own", VM),),
    purpose: str = "unlock",
    boot_way: BootWay = "grub",
    events: Mapping[int, tuple[Event, ...]] = MappingProxyType({}),
) -> dict[str, Check]:
    """Apply the rules about a boot; gives the checks by id."""
    trail = Trail()
    references = References(policy(boot_way=boot_way), frozenset(), profile, vm)
    appraise_boot(trail, purpose, pcrs, events, references)
    return {check.id: check for check in trail.checks}


def unmet(checks: Mapping[str, Check]) -> set[str]:
    """Name the checks that do not hold."""
    return {name for name, check in checks.items() if not check.ok}


def test_a_boot_that_both_states_explain_passes() -> None:
    """One check for each governed PCR, and the cap."""
    checks = booted()
    assert unmet(checks) == set()
    assert set(checks) == {f"pcr.{index}" for index in POLICY.governed_pcrs} | {"cap.off"}


@pytest.mark.parametrize("index", POLICY.governed_pcrs)
def test_each_governed_pcr_has_one_value(index: int) -> None:
    """Another value is refused under that PCR's name, and both values are told."""
    checks = booted(QUOTED | {index: digest(255)})
    assert unmet(checks) == {f"pcr.{index}"}
    assert digest(255).hex() in checks[f"pcr.{index}"].found
    assert digest(100 + index).hex() in checks[f"pcr.{index}"].expected


@pytest.mark.parametrize("index", POLICY.governed_pcrs)
def test_a_pcr_that_was_not_quoted_is_no_match(index: int) -> None:
    """Absent means no."""
    assert unmet(booted({name: value for name, value in QUOTED.items() if name != index})) == {f"pcr.{index}"}


def test_without_reference_values_nothing_is_explained() -> None:
    """Empty means no, for every PCR."""
    assert unmet(booted(profile=(), vm=())) == {f"pcr.{index}" for index in POLICY.governed_pcrs}


def test_a_pcr_that_no_state_names_is_refused() -> None:
    """A state of some PCRs does not vouch for the others."""
    partial = {index: value for index, value in PROFILE.items() if index != 4}
    assert unmet(booted(profile=(state("shared", partial),))) == {"pcr.4"}


def test_values_must_have_been_seen_together() -> None:
    """Half of one accepted boot and half of another is a boot that nobody accepted."""
    other = {index: 200 + index for index in PROFILE}
    states = (state("old", PROFILE), state("new", other))
    mixed = QUOTED | {index: digest(other[index]) for index in (0, 1)}
    assert unmet(booted(profile=states)) == set()
    assert unmet(booted(QUOTED | {i: digest(v) for i, v in other.items()}, profile=states)) == set()
    assert unmet(booted(mixed, profile=states)) == {"pcr.0", "pcr.1"}


def test_a_refusal_is_told_against_the_closest_state() -> None:
    """So that it names as little as possible."""
    far = {index: 200 + index for index in PROFILE}
    checks = booted(QUOTED | {4: digest(9)}, profile=(state("far", far), state("near", PROFILE)))
    assert unmet(checks) == {"pcr.4"}
    assert '"near"' in checks["pcr.4"].expected


def test_the_vms_own_value_counts_where_both_know_one() -> None:
    """Its partition table, say."""
    own = state("own", VM | {5: 77})
    assert unmet(booted(vm=(own,))) == {"pcr.5"}
    assert unmet(booted(QUOTED | {5: digest(77)}, vm=(own,))) == set()


@pytest.mark.parametrize(
    ("boot_way", "shared"), [("grub", 8), ("grub", 9), ("uki", 4), ("uki", 11), ("direct", 9)]
)
def test_a_shared_value_never_stands_for_what_belongs_to_one_vm(boot_way: BootWay, shared: int) -> None:
    """A profile that got such a value, by a changed boot way say, would let one VM boot as another."""
    governed = policy(boot_way=boot_way).governed_pcrs
    everything = state("shared", {index: 100 + index for index in governed})
    quoted = {index: digest(100 + index) for index in governed} | {15: bytes(32)}
    assert f"pcr.{shared}" in unmet(booted(quoted, profile=(everything,), vm=(), boot_way=boot_way))
    assert unmet(booted(quoted, profile=(everything,), vm=(everything,), boot_way=boot_way)) == set()


@pytest.mark.parametrize(
    ("purpose", "cap", "holds"),
    [
        ("unlock", bytes(32), True),
        ("unlock", digest(1), False),
        ("unlock", None, False),
        ("dry-run", digest(1), True),
        ("dry-run", None, False),
        ("preflight", digest(1), True),
        ("enrol", digest(1), True),
    ],
)
def test_only_unlock_needs_the_cap_off(purpose: str, cap: bytes | None, holds: bool) -> None:
    """Other purposes report its state; a cap that was not quoted is never off."""
    pcrs = {name: value for name, value in QUOTED.items() if name != 15} | ({} if cap is None else {15: cap})
    assert booted(pcrs, purpose=purpose)["cap.off"].ok == holds


def test_a_pcr_without_events_is_zero_and_its_reference_says_so() -> None:
    """Zero is a value like any other: without a reference it explains nothing."""
    quoted = QUOTED | {14: bytes(32)}
    assert unmet(booted(quoted)) == {"pcr.14"}
    assert unmet(booted(quoted, profile=(state("shared", PROFILE | {14: 0}),))) == set()


def test_what_was_measured_where_nothing_was_is_told() -> None:
    """A credential beside a UKI, say; a reference that holds a value alone knows no events to compare with."""
    name = "Credentials initrd\0".encode("utf-16-le")
    events = {index: (Event(0, index, 0x0D, {"sha256": digest(7)}, name),) for index in (12, 13)}
    governed = {index: index for index in policy(boot_way="uki").governed_pcrs}
    known = state("own", governed | {12: 0})
    quoted = {index: digest(value) for index, value in governed.items()} | {13: digest(1), 15: bytes(32)}
    checks = booted(quoted, vm=(known,), boot_way="uki", events=events)
    assert unmet(checks) == {"pcr.12", "pcr.13"}
    assert "Event 1 is not expected" in checks["pcr.12"].found
    assert "beside the UKI: Credentials initrd" in checks["pcr.12"].found
    assert "Event" not in checks["pcr.13"].found
