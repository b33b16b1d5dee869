"""From one signing key to the next, without shutting out a VM that nobody meant to shut out.

::

    stage      a next key: `vm config` has it from now on
               ... each VM gets that agent.toml into its initramfs, and boots ...
    activate   next becomes current; current becomes previous, and still answers agents that pin nothing newer
    retire     previous (or a next that was given up) answers nobody any more

What a VM pins, its verifier does not know. What it can know is by which of its keys the challenge of a confirmed unlock
was signed: the agent verified it with a key of its measured agent.toml, and the tie holds it to that key. An agent says
which keys it pins, and gets a signature by the newest of them (``identity.Keys.signer``), so the first boot with a new
agent.toml shows by itself (docs/adr/0008-identity-rotation.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import identity, ledger
from kagimori_verifier.store import identities, redemptions, vms

if TYPE_CHECKING:
    from collections.abc import Collection

    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.identities import Identity

MOST: Final = 4
"""Keys that an agent can pin of one verifier (PROTOCOL.md section 1)."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """What is known of a VM's pins: the key (ID) of its newest boot that confirmed `opened`; None where unknown."""

    vm_id: str
    created: int
    opened: bool
    verifier_key: str | None


def pinned(txn: Txn) -> tuple[Pinned, ...]:
    """Give what is known of each VM, by its id."""
    last = redemptions.last_opened(txn)
    return tuple(
        Pinned(row.vm_id, row.created, row.vm_id in last, last.get(row.vm_id)) for row in vms.all(txn)
    )


def stage(txn: Txn, kek: bytes, at_s: int) -> Identity:
    """Make the next key. Raises OperatorError if there is one already, or no room for it in an agent.toml."""
    live = _live(txn)
    if waiting := [row for row in live if row.state == "next"]:
        raise _not_now("a verifier without a next key", f"{waiting[0].key_id}, which is staged", _ACTIVATE)
    if len(live) >= MOST:
        raise _not_now(
            f"fewer than {MOST} keys, as an agent can pin {MOST} of them", f"{len(live)} keys", _RETIRE
        )
    made = identity.make_signing_key(txn, kek, at_s, "next")
    _record(txn, at_s, "identity-staged", made.key_id)
    return made


def activate(txn: Txn, at_s: int, without: Collection[str] = ()) -> Identity:
    """Make the next key the current one. Raises OperatorError while a VM is not known to pin it that ``without`` lacks."""
    live = _live(txn)
    staged = next((row for row in live if row.state == "next"), None)
    if staged is None:
        raise _not_now("a next key", "none", "`kagimori-verifier identity rotate` makes one.")
    _require_pinned(txn, [staged], without)
    for row in live:
        if row.state == "current":
            identities.set_state(txn, row.key_id, "previous")
    identities.set_state(txn, staged.key_id, "current")
    _record(txn, at_s, "identity-activated", staged.key_id, without)
    return staged


def retire(txn: Txn, key_id: str, at_s: int, without: Collection[str] = ()) -> None:
    """Answer by a key no more. Raises OperatorError for the current one, and while a VM may pin no other.

    Its secret stays, wrapped, so that a backup of the database can undo a mistake.
    """
    live = _live(txn)
    row = next((row for row in live if row.key_id == key_id), None)
    if row is None:
        raise _not_now("a key that is previous or next", key_id, _SHOW)
    if row.state == "current":
        raise _not_now("a key that is previous or next", f"{key_id}, which is current", _ACTIVATE)
    _require_pinned(txn, [one for one in live if one != row], without)
    identities.set_state(txn, key_id, "retired")
    _record(txn, at_s, "identity-retired", key_id, without)


def lacking(txn: Txn, keys: Collection[Identity]) -> tuple[Pinned, ...]:
    """Give the VMs that are not known to pin any of ``keys``.

    One that never booted, and was added when the newest of them was in `vm config` already, can have no older agent.toml.
    """
    key_ids = {row.key_id for row in keys}
    since = max(row.created for row in keys)
    return tuple(
        vm for vm in pinned(txn) if (vm.verifier_key not in key_ids if vm.opened else vm.created < since)
    )


_SHOW: Final = "`kagimori-verifier identity show` shows the keys."
_ACTIVATE: Final = "`kagimori-verifier identity activate` makes the next key the current one."
_RETIRE: Final = "`kagimori-verifier identity retire KEY_ID` retires a previous one."


def _live(txn: Txn) -> list[Identity]:
    return [row for row in identities.all(txn, "signing") if row.state != "retired"]


def _require_pinned(txn: Txn, keys: Collection[Identity], without: Collection[str]) -> None:
    known = {row.vm_id for row in vms.all(txn)}
    if strangers := sorted(set(without) - known):
        raise OperatorError(
            "A VM that is named is not enrolled here.",
            code="vm.unknown",
            expected="names of VMs",
            found=", ".join(strangers),
            todo="`kagimori-verifier vm list` shows the VMs.",
        )
    missing = [vm for vm in lacking(txn, keys) if vm.vm_id not in set(without)]
    if missing:
        raise OperatorError(
            "A VM would not believe this verifier any more.",
            code="identity.lacking",
            expected=f"each VM's newest boot to have used {' or '.join(row.key_id for row in keys)}",
            found=", ".join(f"{vm.vm_id} ({told(vm)})" for vm in missing),
            todo="Give each the agent.toml of `kagimori-verifier vm config`, rebuild its initramfs and boot it; or name those"
            " that shall be shut out, each by --without.",
        )


def told(vm: Pinned) -> str:
    """Say what is known of a VM's pins."""
    if not vm.opened:
        return "has not opened its volumes yet"
    return f"last opened by {vm.verifier_key or 'a key that was not written down'}"


def _record(txn: Txn, at_s: int, event: str, key_id: str, without: Collection[str] = ()) -> None:
    body: dict[str, object] = {"key_id": key_id} | ({"without": sorted(without)} if without else {})
    ledger.append(txn, at_s=at_s, event=event, vm_id=None, session=None, body=body)


def _not_now(expected: str, found: str, todo: str) -> OperatorError:
    return OperatorError(
        "The verifier's keys are in another state.",
        code="identity.state",
        expected=expected,
        found=found,
        todo=todo,
    )
