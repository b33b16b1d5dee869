"""Reference values from files, event logs and sessions: nothing unproven, nothing shared that belongs to one VM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import NotAuthentic, OperatorError
from kagimori_simulator import measured_boot
from kagimori_verifier import learning
from kagimori_verifier.appraise.policy import BootWay, Policy, TcbFloor
from kagimori_verifier.learning import Pcrs
from kagimori_verifier.store import Store, Txn, observations, profiles, references, vms
from kagimori_verifier.store.observations import Observation

FLOOR = TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219)
GRUB = Policy(boot_way="grub", tcb_floors={"Milan": FLOOR})
VM, SESSION = "web1", "0123456789abcdef"


def values(*changed: int) -> Pcrs:
    """Make values of PCR 0 to 15, some of them changed."""
    return {
        str(index): {
            "digest": bytes([index + 100 * (index in changed)]).hex() * 32,
            "events": [[bytes([index, index in changed]).hex() * 16, f"event of PCR {index}"]],
        }
        for index in range(16)
    }


def add_profile(txn: Txn, name: str, boot_way: BootWay = "grub") -> None:
    """Keep a profile."""
    policy = msgspec.structs.replace(GRUB, boot_way=boot_way)
    profiles.add(txn, profiles.ProfileRow(name, msgspec.json.encode(policy).decode(), 0))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give a database with one VM in one profile."""
    made = Store.create(f"sqlite:///{tmp_path}/verifier.db")
    with made.write() as txn:
        add_profile(txn, "debian")
        vms.add(txn, vms.VmRow(VM, "debian", True, ["unlock"], [], 0))
    yield made
    made.close()


def observe(store: Store, *changed: int, session: str = SESSION, confirmed: bool = True) -> None:
    """Keep what a session showed."""
    with store.write() as txn:
        observations.add(txn, Observation(session, VM, "debian", 1, False, values(*changed)))
        if confirmed:
            observations.confirm(txn, session)


def proposed(store: Store, session: str = SESSION) -> dict[str, tuple[set[int], str]]:
    """Propose what a session showed: by owner's kind its PCRs, and what changes."""
    with store.read() as txn:
        states = learning.proposal(txn, session, "a label", 2).states
    return {row.owner_kind: (set(map(int, row.pcrs)), " ".join(changes)) for row, changes in states}


def accept(store: Store, session: str = SESSION) -> None:
    """Keep what is proposed."""
    with store.write() as txn:
        for row, _ in learning.proposal(txn, session, "accepted", 2).states:
            references.add_boot_state(txn, row)


def refused(store: Store, session: str = SESSION) -> OperatorError:
    """Propose what may not be learned."""
    with pytest.raises(OperatorError) as caught, store.read() as txn:
        learning.proposal(txn, session, "a label", 2)
    return caught.value


@pytest.mark.parametrize("session", [SESSION, "no such session"])
def test_nothing_is_learned_before_a_confirm(store: Store, session: str) -> None:
    """Until then a software key could have quoted anything."""
    observe(store, confirmed=False)
    assert refused(store, session).code == "accept.unconfirmed"


def test_the_first_session_is_split_between_the_vm_and_its_profile(store: Store) -> None:
    """Command line, initramfs and partition table belong to the VM; the rest may be shared."""
    observe(store)
    assert proposed(store) == {
        "vm": ({5, 8, 9}, "nothing was known before"),
        "profile": ({0, 1, 2, 3, 4, 7, 14}, "nothing was known before"),
    }


def test_the_same_boot_of_another_session_proposes_nothing_new_for_the_profile(store: Store) -> None:
    """What all share is kept once."""
    observe(store)
    accept(store)
    observe(store, 9, session="fedcba9876543210")
    assert "profile" not in proposed(store, "fedcba9876543210")


def test_a_proposal_names_what_is_new_against_the_closest_state(store: Store) -> None:
    """An owner says yes to an initramfs, not to a number."""
    observe(store)
    accept(store)
    observe(store, 9, session="fedcba9876543210")
    _, changes = proposed(store, "fedcba9876543210")["vm"]
    assert 'PCR 9 differs from "accepted": event of PCR 9' in changes
    assert "PCR 8" not in changes


def test_a_vm_that_changed_its_profile_teaches_neither(store: Store) -> None:
    """What was seen under one policy is no word about another."""
    observe(store)
    with store.write() as txn:
        add_profile(txn, "other", "uki")
        row = vms.get(txn, VM)
        assert row is not None
        vms.update(txn, replace(row, profile="other"))
    assert refused(store).code == "accept.profile"


def test_a_vm_that_was_removed_teaches_nothing(store: Store) -> None:
    """A later VM of its name does not inherit what it showed."""
    observe(store)
    with store.write() as txn:
        vms.remove(txn, VM)
    assert refused(store).code in {"accept.unconfirmed", "vm.unknown"}


def test_a_policy_that_governs_more_since_cannot_be_answered_from_an_old_session(store: Store) -> None:
    """A value that was not seen is not made up."""
    with store.write() as txn:
        seen = {index: pcr for index, pcr in values().items() if index != "14"}
        observations.add(txn, Observation(SESSION, VM, "debian", 1, False, seen))
        observations.confirm(txn, SESSION)
    assert refused(store).code == "reference.pcrs"


def state(owner_kind: str, chosen: list[int] | None = None, pcrs: Pcrs | None = None) -> set[int]:
    """Make a boot state; gives its PCRs."""
    row = learning.boot_state(GRUB, owner_kind, "x", "label", pcrs or values(), chosen, "file", 0)
    return set(map(int, row.pcrs))


def test_a_file_gives_an_owner_all_that_it_may_have() -> None:
    """A VM every governed PCR, a profile those that belong to nobody; never the cap."""
    assert state("vm") == set(GRUB.governed_pcrs)
    assert state("profile") == set(GRUB.governed_pcrs) - {8, 9}


def test_chosen_pcrs_are_taken_and_no_others() -> None:
    """By their numbers."""
    assert state("vm", [8, 9]) == {8, 9}
    assert state("profile", [7]) == {7}


@pytest.mark.parametrize(
    ("owner_kind", "chosen", "code"),
    [
        pytest.param("profile", [9], "reference.vm-owned", id="an initramfs for all"),
        pytest.param("profile", [7, 8], "reference.vm-owned", id="a command line for all"),
        pytest.param("vm", [15], "reference.pcrs", id="the cap"),
        pytest.param("vm", [10], "reference.pcrs", id="a PCR that nobody governs"),
        pytest.param("vm", [], "reference.pcrs", id="none at all"),
    ],
)
def test_a_boot_state_has_no_pcr_that_its_owner_may_not_have(
    owner_kind: str, chosen: list[int], code: str
) -> None:
    """What is never looked at, or would be shared wrongly, is refused when it is given."""
    with pytest.raises(OperatorError) as caught:
        state(owner_kind, chosen)
    assert caught.value.code == code


def test_a_chosen_pcr_without_a_value_is_named() -> None:
    """Absent is not zero."""
    with pytest.raises(OperatorError) as caught:
        state("vm", [8, 9], {"8": values()["8"]})
    assert caught.value.code == "reference.pcrs"
    assert "9" in (caught.value.found or "")


def test_a_file_without_any_governed_pcr_is_refused() -> None:
    """Empty means no."""
    with pytest.raises(OperatorError):
        state("vm", None, {"10": values()["10"]})


@pytest.mark.parametrize("boot", [measured_boot.grub(), measured_boot.uki(), measured_boot.direct()])
def test_an_event_log_gives_what_a_tpm_would_have_and_why(boot: measured_boot.MeasuredBoot) -> None:
    """Also the zero of a PCR without events."""
    pcrs = learning.from_event_log(boot.event_log())
    assert {index: pcr["digest"] for index, pcr in pcrs.items()} == {
        str(index): boot.pcr(index).hex() for index in range(16)
    }
    assert pcrs["15"] == {"digest": bytes(32).hex(), "events": []}
    assert all(text.isprintable() for pcr in pcrs.values() for _, text in pcr["events"])


@given(raw=st.binary(max_size=200))
def test_garbage_is_no_event_log(raw: bytes) -> None:
    """One named error."""
    with pytest.raises(NotAuthentic):
        learning.from_event_log(raw)


def test_values_are_read_from_json() -> None:
    """Of the one bank that version 1 judges."""
    raw = msgspec.json.encode({"sha256": {"0": "00" * 32, "23": "AB" * 32}})
    assert learning.from_values(raw) == {
        "0": {"digest": "00" * 32, "events": []},
        "23": {"digest": "ab" * 32, "events": []},
    }


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="no bank"),
        pytest.param({"sha1": {"0": "00" * 20}}, id="another bank"),
        pytest.param({"sha256": {}}, id="no PCR"),
        pytest.param({"sha256": {"24": "00" * 32}}, id="no such PCR"),
        pytest.param({"sha256": {"-1": "00" * 32}}, id="a negative PCR"),
        pytest.param({"sha256": {"x": "00" * 32}}, id="a PCR by name"),
        pytest.param({"sha256": {"0": "00" * 32, "00": "11" * 32}}, id="one PCR twice"),
        pytest.param({"sha256": {"0_1": "00" * 32}}, id="a number in disguise"),
        pytest.param({"sha256": {"0": "00" * 31}}, id="a short value"),
        pytest.param({"sha256": {"0": "00" * 20}}, id="a value of SHA-1"),
        pytest.param({"sha256": {"0": "zz" * 32}}, id="no hex"),
        pytest.param({"sha256": {"0": 0}}, id="a number"),
        pytest.param([1], id="a list"),
    ],
)
def test_values_in_another_form_are_refused(content: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Never padded, cut or guessed."""
    with pytest.raises(OperatorError) as caught:
        learning.from_values(msgspec.json.encode(content))
    assert caught.value.code == "reference.pcrs"


@given(raw=st.one_of(st.binary(max_size=100), st.just(b"[" * 100_000)))
def test_garbage_is_no_set_of_values(raw: bytes) -> None:
    """One named error."""
    with pytest.raises(OperatorError):
        learning.from_values(raw)
