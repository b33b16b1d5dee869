"""Reference values: measurements, and boot states of profiles and VMs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

from sqlalchemy import bindparam, delete, insert, select

from kagimori_protocol.errors import OperatorError
from kagimori_protocol.messages import Kind
from kagimori_verifier.store import columns, schema
from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared

MOST_VMS: Final = 5
"""VMs named where a measurement is shared by some."""


@dataclass(frozen=True, slots=True)
class MeasurementRow:
    """A MEASUREMENT that a profile knows."""

    digest: bytes
    profile: str
    kind: Kind
    label: str
    svsm_features: list[str]
    created: int


@dataclass(frozen=True, slots=True)
class BootStateRow:
    """PCR values that belong together.

    ``owner_kind`` is ``profile`` or ``vm``; ``pcrs`` is {"4": {"digest": hex, "events": [[hex, description], ...]}};
    ``id`` is 0 before it is kept.
    """

    owner_kind: str
    owner: str
    label: str
    pcrs: dict[str, dict[str, Any]]
    source: str
    created: int
    id: int = 0


_MEASUREMENT: Final = Prepared(
    select(schema.measurement).where(
        schema.measurement.c.profile == bindparam("of"), schema.measurement.c.digest == bindparam("value")
    )
)
_VMS_OF: Final = Prepared(
    select(schema.vm.c.vm_id)
    .join(schema.measurement, schema.measurement.c.profile == schema.vm.c.profile)
    .where(schema.measurement.c.digest == bindparam("value"))
    .limit(MOST_VMS)
)
_OWNED: Final = (
    schema.boot_state.c.owner_kind == bindparam("kind"),
    schema.boot_state.c.owner == bindparam("of"),
)
_BOOT_STATES: Final = Prepared(select(schema.boot_state).where(*_OWNED).order_by(schema.boot_state.c.id))
_BOOT_VALUES: Final = Prepared(
    select(schema.boot_state.c.label, schema.boot_state.c.pcrs)
    .where(*_OWNED)
    .order_by(schema.boot_state.c.id)
)


def add_measurement(txn: Txn, row: MeasurementRow) -> None:
    """Keep a measurement. Raises OperatorError if another profile knows it as another kind: it has only one."""
    kinds = (
        txn.execute(select(schema.measurement.c.kind).where(schema.measurement.c.digest == row.digest))
        .scalars()
        .all()
    )
    if any(kind != row.kind for kind in kinds):
        raise OperatorError(
            "A measurement cannot be of two kinds.",
            code="reference.kind",
            expected=f"kind {kinds[0]}, as it is known already",
            found=row.kind,
            todo="Remove the wrong one first: `kagimori-verifier reference list`.",
        )
    values = asdict(row) | {"svsm_features": columns.encode(row.svsm_features)}
    txn.execute(insert(schema.measurement).values(values))


def measurement(txn: Txn, profile: str, digest: bytes) -> MeasurementRow | None:
    """Give the measurement of a profile, or None."""
    row = txn.row(_MEASUREMENT, of=profile, value=digest)
    return None if row is None else _measurement(row)


def vms_of(txn: Txn, digest: bytes) -> frozenset[str]:
    """Give the ids of VMs whose profile knows a measurement, a few of them: who asks wants to know of more than one."""
    return frozenset(row["vm_id"] for row in txn.rows(_VMS_OF, value=digest))


def measurements(txn: Txn, profile: str | None = None) -> tuple[MeasurementRow, ...]:
    """Give the measurements of a profile, or of all."""
    statement = select(schema.measurement).order_by(
        schema.measurement.c.profile, schema.measurement.c.created
    )
    if profile is not None:
        statement = statement.where(schema.measurement.c.profile == profile)
    return tuple(_measurement(row) for row in txn.execute(statement).mappings())


def remove_measurement(txn: Txn, profile: str, digest: bytes) -> bool:
    """Forget a measurement of a profile; tells whether there was one."""
    where = (schema.measurement.c.profile == profile, schema.measurement.c.digest == digest)
    return txn.execute(delete(schema.measurement).where(*where)).rowcount > 0


def add_boot_state(txn: Txn, row: BootStateRow) -> int:
    """Keep a boot state; returns its id."""
    values = asdict(row) | {"pcrs": columns.encode(row.pcrs)}
    del values["id"]
    key = txn.execute(insert(schema.boot_state).values(values)).inserted_primary_key
    return int(cast("tuple[int]", key)[0])


def boot_states(txn: Txn, owner_kind: str, owner: str) -> tuple[BootStateRow, ...]:
    """Give the boot states of a profile or a VM, oldest first."""
    return tuple(_boot_state(row) for row in txn.rows(_BOOT_STATES, kind=owner_kind, of=owner))


def boot_values(txn: Txn, owner_kind: str, owner: str) -> tuple[tuple[str, str], ...]:
    """Give label and PCR values, as the database has them (JSON), of the same."""
    rows = txn.rows(_BOOT_VALUES, kind=owner_kind, of=owner)
    return tuple((row["label"], row["pcrs"]) for row in rows)


def remove_boot_state(txn: Txn, state_id: int) -> bool:
    """Forget a boot state; tells whether there was one."""
    return txn.execute(delete(schema.boot_state).where(schema.boot_state.c.id == state_id)).rowcount > 0


def _measurement(row: Mapping[Any, Any]) -> MeasurementRow:
    features = columns.decode(row["svsm_features"], list[str], "measurement.svsm_features")
    return MeasurementRow(**(dict(row) | {"svsm_features": features}))


def _boot_state(row: Mapping[str, Any]) -> BootStateRow:
    pcrs = columns.decode(row["pcrs"], dict[str, dict[str, Any]], "boot_state.pcrs")
    return BootStateRow(**(dict(row) | {"pcrs": pcrs}))
