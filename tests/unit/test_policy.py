"""Appraisal policies as data: what makes no sense is refused before it can allow anything."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.appraise.policy import (
    GOVERNED_PCRS,
    VM_OWNED_PCRS,
    BootWay,
    Policy,
    TcbFloor,
    check_policy,
    parse_policy,
)

FLOOR = {"boot_loader": 4, "tee": 0, "snp": 24, "microcode": 219}
LEAST = {"boot_way": "grub", "tcb_floors": {"Milan": FLOOR}}
BOOT_WAYS: tuple[BootWay, ...] = ("grub", "uki", "direct")


def parsed(**changes: object) -> Policy:
    """Parse the least policy with these changes."""
    return parse_policy(msgspec.json.encode(LEAST | changes))


@pytest.mark.parametrize("boot_way", BOOT_WAYS)
def test_each_boot_way_governs_its_least_pcrs_and_quotes_the_cap_too(boot_way: BootWay) -> None:
    """0 to 5 and 7 always, then what the boot way measures into (docs/policy.md)."""
    policy = parsed(boot_way=boot_way)
    more = {"grub": {8, 9, 14}, "uki": {9, 11, 12, 13}, "direct": {9}}[boot_way]
    assert set(policy.governed_pcrs) == {0, 1, 2, 3, 4, 5, 7} | more
    assert policy.quoted_pcrs == (*policy.governed_pcrs, 15)


@pytest.mark.parametrize("boot_way", BOOT_WAYS)
def test_what_belongs_to_one_vm_is_governed(boot_way: BootWay) -> None:
    """A value that nobody looks at could not tell two VMs apart."""
    assert VM_OWNED_PCRS[boot_way] <= GOVERNED_PCRS[boot_way]


def test_a_policy_may_govern_more_and_never_less() -> None:
    """Only additions have a field."""
    assert set(parsed(extra_pcrs=[10, 0]).governed_pcrs) == GOVERNED_PCRS["grub"] | {10}


def test_defaults_are_the_narrow_ones() -> None:
    """One signer, listed chips, revocation required, no debugging, migration or unknown bit."""
    policy = parsed()
    assert policy.signers == ["vcek"]
    assert not policy.any_chip
    assert policy.revocation == "required"
    assert policy.cap_pcr == 15
    assert not {"DEBUG", "MIGRATE_MA", "CXL_ALLOW"} & set(policy.guest_policy_allowed)
    assert not any(flag.startswith("bit ") for flag in policy.guest_policy_allowed + policy.platform_allowed)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        pytest.param({"tcb_floors": {}}, "none", id="no product at all"),
        pytest.param({"tcb_floors": {"Naples": FLOOR}}, "Naples", id="a product without SNP"),
        pytest.param({"tcb_floors": {"milan": FLOOR}}, "milan", id="a product in another spelling"),
        pytest.param({"tcb_floors": {"Turin": FLOOR}}, "Turin", id="Turin without fmc"),
        pytest.param({"tcb_floors": {"Milan": FLOOR | {"fmc": 1}}}, "Milan", id="fmc on Milan"),
        pytest.param({"guest_policy_allowed": ["DEBUG"]}, "DEBUG", id="debugging allowed"),
        pytest.param({"guest_policy_required": ["DEBUG"]}, "DEBUG", id="debugging required"),
        pytest.param({"signers": ["vlek"]}, "none", id="a VLEK of any provider"),
        pytest.param({"extra_pcrs": [15]}, "PCR 15", id="the cap as a governed PCR"),
        pytest.param({"cap_pcr": 14}, "PCR 14", id="a cap that GRUB measures into"),
        pytest.param({"cap_pcr": 7}, "cap_pcr", id="a cap that the firmware measures into"),
        pytest.param({"cap_pcr": 16}, "cap_pcr", id="a cap that a guest can reset"),
        pytest.param({"cap_pcr": 23}, "cap_pcr", id="another cap that a guest can reset"),
        pytest.param({"extra_pcrs": [24]}, "extra_pcrs", id="a PCR that no TPM has"),
        pytest.param({"signers": []}, "signers", id="no signer"),
        pytest.param({"signers": ["asvk"]}, "signers", id="an unknown signer"),
        pytest.param({"revocation": "never"}, "revocation", id="no revocation"),
        pytest.param({"boot_way": "legacy"}, "boot_way", id="an unknown boot way"),
        pytest.param({"launch_mitigations": -1}, "launch_mitigations", id="negative bits"),
        pytest.param({"tcb_floors": {"Milan": FLOOR | {"snp": 256}}}, "snp", id="a floor out of range"),
        pytest.param({"tcb_floors": {"Milan": {"snp": 1}}}, "boot_loader", id="half a floor"),
        pytest.param({"anychip": True}, "anychip", id="an unknown field"),
        pytest.param({"any_chip": "true"}, "any_chip", id="a truth in quotes"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(changes: dict[str, object], found: str) -> None:
    """The error tells what, so that the owner can correct it."""
    with pytest.raises(OperatorError) as caught:
        parsed(**changes)
    assert caught.value.code == "policy.invalid"
    assert found in (caught.value.found or "")


def test_every_allowed_cap_closes_what_the_boot_leaves_open() -> None:
    """Of 8 to 15, a policy takes exactly those that its boot way does not measure into."""
    for boot_way in BOOT_WAYS:
        for cap in range(8, 16):
            taken = cap in GOVERNED_PCRS[boot_way]
            if taken:
                with pytest.raises(OperatorError):
                    parsed(boot_way=boot_way, cap_pcr=cap)
            else:
                assert parsed(boot_way=boot_way, cap_pcr=cap).cap_pcr == cap


def test_turin_has_its_fifth_part() -> None:
    """And only Turin."""
    floor = TcbFloor(**FLOOR, fmc=1)
    assert parsed(tcb_floors={"Turin": FLOOR | {"fmc": 1}}).tcb_floors["Turin"] == floor


def test_a_policy_survives_being_written_and_read() -> None:
    """What `profile show` prints, `profile edit` takes."""
    policy = check_policy(parsed(extra_pcrs=[10], signers=["vlek"], csp_ids=["a provider"], any_chip=True))
    assert parse_policy(msgspec.json.encode(policy)) == policy


@given(text=st.one_of(st.binary(max_size=100), st.text(max_size=100).map(str.encode)))
def test_garbage_is_an_invalid_policy_and_never_a_stray_error(text: bytes) -> None:
    """Whatever is handed to profile edit, or stands in a tampered database."""
    with pytest.raises(OperatorError):
        parse_policy(text)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"boot_way":' + b"[" * 100_000, b"{}", b"null", b"\xff"])
def test_deep_and_empty_json_is_refused_too(text: bytes) -> None:
    """Empty means no."""
    with pytest.raises(OperatorError):
        parse_policy(text)
