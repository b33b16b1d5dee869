"""VMs and their volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import bindparam, delete, insert, select

from kagimori_protocol.messages import Purpose
from kagimori_verifier.store import columns, schema
from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared


@dataclass(frozen=True, slots=True)
class VmRow:
    """A VM: its profile, what it may ask for, and the CHIP_IDs (hex) that it may run on."""

    vm_id: str
    profile: str
    enabled: bool
    purposes: list[Purpose]
    chips: list[str]
    created: int


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """A volume and its wrapped unlock key; ``state`` is adding, staged, waiting, active or removed.

    ``origin`` is made (here), or recovery: the key of a recovery code, which lies on paper, too. A header must be of
    ``header_epoch`` at least; ``epoch_given`` is the newest that one may have been sealed with, and is written down before.
    """

    vm_id: str
    uuid: str
    state: str
    wrapped: bytes = field(repr=False)
    version: int
    header_epoch: int
    label: str
    created: int
    origin: str = "made"
    epoch_given: int = 0


_GET: Final = Prepared(select(schema.vm).where(schema.vm.c.vm_id == bindparam("of")))
_ALL: Final = (
    select(schema.volume).where(schema.volume.c.vm_id == bindparam("of")).order_by(schema.volume.c.created)
)
_VOLUMES: Final = Prepared(_ALL)
_IN_STATE: Final = Prepared(_ALL.where(schema.volume.c.state == bindparam("in_state")))


def add(txn: Txn, row: VmRow) -> None:
    """Keep a new VM."""
    txn.execute(insert(schema.vm).values(_values(row)))


def get(txn: Txn, vm_id: str) -> VmRow | None:
    """Give a VM, or None."""
    row = txn.row(_GET, of=vm_id)
    return None if row is None else _vm(row)


def all(txn: Txn) -> tuple[VmRow, ...]:  # noqa: A001 - read as vms.all
    """Give all VMs, by id."""
    return tuple(_vm(row) for row in txn.execute(select(schema.vm).order_by(schema.vm.c.vm_id)).mappings())


def update(txn: Txn, row: VmRow) -> None:
    """Change a VM to what ``row`` says; its id stays."""
    txn.execute(sa.update(schema.vm).where(schema.vm.c.vm_id == row.vm_id).values(_values(row)))


def remove(txn: Txn, vm_id: str) -> bool:
    """Forget a VM with its volumes' keys, its boot states and what was seen of it; tells whether there was one.

    A later VM of the same id inherits nothing. The ledger keeps its lines.
    """
    txn.execute(delete(schema.volume).where(schema.volume.c.vm_id == vm_id))
    states = schema.boot_state.c
    txn.execute(delete(schema.boot_state).where(states.owner_kind == "vm", states.owner == vm_id))
    txn.execute(delete(schema.observation).where(schema.observation.c.vm_id == vm_id))
    return txn.execute(delete(schema.vm).where(schema.vm.c.vm_id == vm_id)).rowcount > 0


def add_volume(txn: Txn, row: VolumeRow) -> None:
    """Keep a volume's key."""
    txn.execute(insert(schema.volume).values(asdict(row)))


def volumes(txn: Txn, vm_id: str, *, state: str | None = "active") -> tuple[VolumeRow, ...]:
    """Give a VM's volumes in one state, or in any (None), oldest first."""
    found = txn.rows(_VOLUMES, of=vm_id) if state is None else txn.rows(_IN_STATE, of=vm_id, in_state=state)
    return tuple(VolumeRow(**row) for row in found)


def set_volume_state(txn: Txn, vm_id: str, uuid: str, version: int, state: str) -> None:
    """Change the state of one version of a volume's key."""
    key = schema.volume.c
    where = (key.vm_id == vm_id, key.uuid == uuid, key.version == version)
    txn.execute(sa.update(schema.volume).where(*where).values(state=state))


def set_header_epoch(txn: Txn, vm_id: str, uuid: str, version: int, epoch: int) -> None:
    """Change the least epoch that a volume's header must have."""
    key = schema.volume.c
    where = (key.vm_id == vm_id, key.uuid == uuid, key.version == version)
    txn.execute(sa.update(schema.volume).where(*where).values(header_epoch=epoch))


def set_epoch_given(txn: Txn, vm_id: str, uuid: str, version: int, epoch: int) -> None:
    """Write down with which epoch a volume's header is about to be sealed."""
    key = schema.volume.c
    where = (key.vm_id == vm_id, key.uuid == uuid, key.version == version)
    txn.execute(sa.update(schema.volume).where(*where).values(epoch_given=epoch))


def remove_volume(txn: Txn, vm_id: str, uuid: str, version: int) -> bool:
    """Forget one version of a volume's key; tells whether there was one."""
    key = schema.volume.c
    where = (key.vm_id == vm_id, key.uuid == uuid, key.version == version)
    return txn.execute(delete(schema.volume).where(*where)).rowcount > 0


def _values(row: VmRow) -> dict[str, Any]:
    lists = {name: columns.encode(getattr(row, name)) for name in ("purposes", "chips")}
    return asdict(row) | lists


def _vm(row: Mapping[Any, Any]) -> VmRow:
    lists = {
        "purposes": columns.decode(row["purposes"], list[Purpose], "vm.purposes"),
        "chips": columns.decode(row["chips"], list[str], "vm.chips"),
    }
    return VmRow(**(dict(row) | lists))
