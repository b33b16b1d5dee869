"""Profiles: the policies that VMs share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import bindparam, delete, insert, select, update

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import boot_state, profile, vm


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """A profile; ``policy`` is JSON (appraise.policy)."""

    name: str
    policy: str
    created: int


_OF_VM: Final = Prepared(
    select(profile.c.policy)
    .join(vm, vm.c.profile == profile.c.name)
    .where(vm.c.vm_id == bindparam("of"), vm.c.enabled.is_(True))
)
_GET: Final = Prepared(select(profile).where(profile.c.name == bindparam("of")))


def add(txn: Txn, row: ProfileRow) -> None:
    """Keep a new profile."""
    txn.execute(insert(profile).values(asdict(row)))


def replace(txn: Txn, name: str, policy: str) -> bool:
    """Change a profile's policy; tells whether there was one."""
    return txn.execute(update(profile).where(profile.c.name == name).values(policy=policy)).rowcount > 0


def get(txn: Txn, name: str) -> ProfileRow | None:
    """Give a profile, or None."""
    row = txn.row(_GET, of=name)
    return None if row is None else ProfileRow(**row)


def policy_of(txn: Txn, vm_id: str) -> str | None:
    """Give the policy of a VM's profile, or None if the VM is unknown or disabled."""
    row = txn.row(_OF_VM, of=vm_id)
    return None if row is None else row["policy"]


def all(txn: Txn) -> tuple[ProfileRow, ...]:  # noqa: A001 - read as profiles.all
    """Give all of them, by name."""
    rows = txn.execute(select(profile).order_by(profile.c.name))
    return tuple(ProfileRow(**row._mapping) for row in rows)  # noqa: SLF001 - SQLAlchemy's public name for it


def remove(txn: Txn, name: str) -> bool:
    """Drop a profile with its boot states; tells whether there was one.

    Raises OperatorError while a VM uses it, and Conflict while it has measurements.
    """
    users = txn.execute(select(vm.c.vm_id).where(vm.c.profile == name).order_by(vm.c.vm_id)).scalars().all()
    if users:
        raise OperatorError(
            f"Profile {name} is in use.",
            code="profile.used",
            expected="a profile that no VM has",
            found=f"VMs {', '.join(users)}",
            todo="Give these VMs another profile, or remove them first.",
        )
    txn.execute(delete(boot_state).where(boot_state.c.owner_kind == "profile", boot_state.c.owner == name))
    return txn.execute(delete(profile).where(profile.c.name == name)).rowcount > 0
