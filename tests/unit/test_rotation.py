"""One signing key follows another, and no VM is shut out that nobody has named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kagimori_protocol import signature
from kagimori_protocol.errors import OperatorError
from kagimori_protocol.messages import Purpose
from kagimori_verifier import identity, ledger, rotation
from kagimori_verifier.keyring import Keyring
from kagimori_verifier.store import Store, identities, profiles, redemptions, vms
from kagimori_verifier.store.redemptions import Redemption

KEK = b"k" * 32


@dataclass
class House:
    """A verifier's database, and shorthands."""

    store: Store
    boots: int = 0

    def stage(self, at_s: int = 10) -> str:
        """Make a next key; gives its ID."""
        with self.store.write() as txn:
            return rotation.stage(txn, KEK, at_s).key_id

    def activate(self, *without: str) -> str:
        """Activate it."""
        with self.store.write() as txn:
            return rotation.activate(txn, 20, without).key_id

    def retire(self, key_id: str, *without: str) -> None:
        """Retire a key."""
        with self.store.write() as txn:
            rotation.retire(txn, key_id, 30, without)

    def add(self, vm_id: str, at_s: int = 1) -> None:
        """Enrol a VM."""
        with self.store.write() as txn:
            vms.add(txn, vms.VmRow(vm_id, "debian", True, [], [], at_s))

    def opened(
        self, vm_id: str, key_id: str | None, outcome: str = "opened", purpose: Purpose = "unlock"
    ) -> None:
        """Let a VM boot: its volumes are open, by a challenge under this key."""
        self.boots += 1
        token = self.boots.to_bytes(8, "big")
        name = token.hex()
        row = Redemption(
            token, name, b"", vm_id, purpose, "keys", "svsm-vtpm", "VCEK", b"", token, b"", 1, 2, None, None, None, key_id
        )  # fmt: skip
        with self.store.write() as txn:
            redemptions.insert(txn, row)
            ledger.append(
                txn,
                at_s=5,
                event=f"confirmed-{outcome}",
                vm_id=vm_id,
                session=name,
                body={"purpose": purpose},
            )

    def states(self) -> dict[str, str]:
        """Tell each signing key's state, by its ID."""
        with self.store.read() as txn:
            return {row.key_id: row.state for row in identities.all(txn, "signing")}

    def lacking(self, key_id: str) -> list[str]:
        """Name the VMs that are not known to pin a key."""
        with self.store.read() as txn:
            row = next(row for row in identities.all(txn, "signing") if row.key_id == key_id)
            return [vm.vm_id for vm in rotation.lacking(txn, [row])]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Give a verifier with one VM that has booted by the first key."""
    store = Store.create(f"sqlite:///{tmp_path}/verifier.db")
    made = House(store)
    with store.write() as txn:
        first = identity.create(txn, KEK, 0)
        profiles.add(txn, profiles.ProfileRow("debian", "{}", 0))
    made.add("web1")
    made.opened("web1", signature.key_id(first.current))
    yield made
    store.close()


def refusal(house: House, code: str) -> str:
    """Try to activate; gives what was found instead."""
    with pytest.raises(OperatorError) as caught:
        house.activate()
    assert caught.value.code == code
    return caught.value.found or ""


def test_a_whole_rotation_and_the_ledger_tells_each_step(house: House) -> None:
    """Staged, pinned by each VM, activated, the old one retired."""
    (first,) = house.states()
    second = house.stage()
    assert house.states() == {first: "current", second: "next"}
    house.opened("web1", second)
    assert house.activate() == second
    assert house.states() == {first: "previous", second: "current"}
    house.retire(first)
    assert house.states() == {first: "retired", second: "current"}
    with house.store.read() as txn:
        ledger.verify(txn)
        told = [
            (one.event, one.body["key_id"]) for one in ledger.read(txn, limit=50)[::-1] if one.vm_id is None
        ]
    assert told == [("identity-staged", second), ("identity-activated", second), ("identity-retired", first)]


def test_a_key_is_not_activated_while_a_vm_boots_by_the_old_one(house: House) -> None:
    """The error names the VM, and by which key it last booted."""
    (first,) = house.states()
    house.stage()
    assert refusal(house, "identity.lacking") == f"web1 (last opened by {first})"


def test_the_newest_boot_counts_also_when_it_is_of_an_old_image(house: House) -> None:
    """Who boots yesterday's kernel has yesterday's agent.toml."""
    (first,) = house.states()
    second = house.stage()
    house.opened("web1", second)
    assert house.lacking(second) == []
    house.opened("web1", first)
    assert house.lacking(second) == ["web1"]


def test_a_boot_that_has_not_confirmed_that_it_opened_shows_nothing(house: House) -> None:
    """Until then nobody knows whether an agent of ours believed that key."""
    second = house.stage()
    house.opened("web1", second, "received")
    house.opened("web1", second, "failed")
    assert house.lacking(second) == ["web1"]


def test_an_enrolment_shows_nothing_of_what_the_initramfs_pins(house: House) -> None:
    """It runs in the booted system, by its agent.toml; the initramfs with yesterday's may still be what boots next."""
    (first,) = house.states()
    second = house.stage()
    house.opened("web1", second, purpose="enrol")
    assert refusal(house, "identity.lacking") == f"web1 (last opened by {first})"
    house.add("web2", at_s=9)
    house.opened("web2", second, purpose="enrol")
    house.opened("web1", second)
    assert refusal(house, "identity.lacking") == "web2 (has not opened its volumes yet)"


def test_a_session_of_a_time_when_keys_were_not_written_down_shows_nothing(house: House) -> None:
    """Unknown means no."""
    house.stage()
    house.opened("web1", None)
    assert refusal(house, "identity.lacking") == "web1 (last opened by a key that was not written down)"


def test_a_vm_that_never_booted_counts_unless_it_came_after_the_key(house: House) -> None:
    """An older one has an agent.toml of before in somebody's drawer; a newer one cannot have."""
    house.add("older", at_s=9)
    second = house.stage(at_s=10)
    house.add("newer", at_s=10)
    house.opened("web1", second)
    assert refusal(house, "identity.lacking") == "older (has not opened its volumes yet)"
    assert house.activate("older") == second


def test_a_vm_that_was_added_again_inherits_no_boot(house: House) -> None:
    """The boots of another VM of its name say nothing of it."""
    second = house.stage()
    house.opened("web1", second)
    with house.store.write() as txn:
        vms.remove(txn, "web1")
        vms.add(txn, vms.VmRow("web1", "debian", True, [], [], 9))
    assert house.lacking(second) == ["web1"]


def test_a_vm_is_shut_out_by_its_name_only(house: House) -> None:
    """And the ledger keeps who was named; a name that is nobody's is a typo."""
    second = house.stage()
    with pytest.raises(OperatorError) as caught:
        house.activate("web1", "wbe2")
    assert (caught.value.code, caught.value.found) == ("vm.unknown", "wbe2")
    assert house.activate("web1") == second
    with house.store.read() as txn:
        assert ledger.read(txn, limit=1)[0].body == {"key_id": second, "without": ["web1"]}


def test_the_old_key_is_not_retired_while_a_vm_may_pin_no_other(house: House) -> None:
    """Naming a VM at one step does not name it at the next."""
    (first,) = house.states()
    house.stage()
    house.activate("web1")
    with pytest.raises(OperatorError) as caught:
        house.retire(first)
    assert caught.value.code == "identity.lacking"
    house.retire(first, "web1")
    assert house.states()[first] == "retired"


def test_the_current_key_is_never_retired_and_a_staged_one_can_be_given_up(house: House) -> None:
    """There is always one that signs."""
    (first,) = house.states()
    second = house.stage()
    for key_id in (first, "0" * 16):
        with pytest.raises(OperatorError) as caught:
            house.retire(key_id)
        assert caught.value.code == "identity.state"
    house.retire(second)
    assert house.states() == {first: "current", second: "retired"}
    assert refusal(house, "identity.state") == "none"


def test_there_is_one_next_key_at_a_time_and_four_in_all(house: House) -> None:
    """As many as an agent can pin."""
    house.stage()
    with pytest.raises(OperatorError, match="which is staged"):
        house.stage()
    for _ in range(2):
        house.activate("web1")
        house.stage()
    house.activate("web1")
    with pytest.raises(OperatorError, match="4 keys"):
        house.stage()


def test_an_agent_is_answered_by_the_newest_key_that_it_pins(house: House) -> None:
    """What it does not name, or names in another form, leaves it with the current one."""
    (first,) = house.states()
    ring = Keyring(house.store, KEK)
    second = house.stage()
    keys = ring.keys()

    def signer(header: str) -> str:
        found = keys.signer(signature.read_key_ids(header))
        return signature.key_id(found.public_key().public_bytes_raw())

    assert signer(f"{first}, {second}") == signer(second) == second
    for header in (
        first,
        "",
        "0" * 16,
        f"{second},{first}",
        f"{second}, ",
        ", ".join([second] * 5),
        second + "\n",
    ):
        assert signer(header) == first
    house.activate("web1")
    keys = ring.keys()
    assert signer(first) == first
    assert signer("") == second
    house.retire(first, "web1")
    keys = ring.keys()
    assert signer(first) == second


def test_a_program_that_serves_sees_a_change_at_its_next_request(house: House) -> None:
    """Another one may have signed by that key already."""
    ring = Keyring(house.store, KEK)
    before = ring.keys()
    assert ring.keys() is before
    second = house.stage()
    assert second in ring.keys().signers
    assert "signers" not in repr(ring.keys())


def test_sessions_end_with_their_token_key(house: House) -> None:
    """A new one is current at once, and the only one."""
    ring = Keyring(house.store, KEK)
    before = ring.keys().token
    with house.store.write() as txn:
        identity.make_token_key(txn, KEK, 1)
    assert ring.keys().token != before
    with house.store.read() as txn:
        assert [row.state for row in identities.all(txn, "token")] == ["retired", "current"]
