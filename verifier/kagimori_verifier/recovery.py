"""A recovery key comes back from paper: a verifier keeps it as a volume's unlock key, and releases it to an attested VM.

It is never typed where the host reads along: not at the VM's console, which is the host's, but at a verifier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import ledger
from kagimori_verifier.enrolment import FIRST_VERSION, require_place
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.states import ACTIVE
from kagimori_verifier.store import enrolments, vms
from kagimori_verifier.store.enrolments import EnrolledRow
from kagimori_verifier.store.vms import VolumeRow

if TYPE_CHECKING:
    from kagimori_verifier.store import Txn

ORIGIN: Final = "recovery"
LEAST_EPOCH: Final = 0
"""Nobody here knows the header's epoch: the VM takes any header that this key authenticates, an older one, too."""


def import_key(  # noqa: PLR0913 - what a volume consists of, by name only
    txn: Txn, kek: bytes, *, vm_id: str, uuid: str, label: str, key: bytes, at_s: int
) -> VolumeRow:
    """Keep a recovery key, wrapped, as the unlock key of a volume that this verifier has no key of.

    Raises OperatorError: for a volume that is known here, a name that is taken, a VM that has too many.
    """
    others = vms.volumes(txn, vm_id, state=None)
    if known := [one for one in others if one.uuid == uuid]:
        raise OperatorError(
            f"This verifier has a key of volume {uuid} already.",
            code="volume.exists",
            expected="a volume without an unlock key here",
            found=f"version {known[0].version}, {known[0].state}",
            todo="If it does not open the volume, `kagimori-verifier volume remove` forgets it first.",
        )
    require_place(others, vm_id, label)
    wrapped = UnlockKeys(kek).wrap(key, vm_id, uuid, FIRST_VERSION)
    row = VolumeRow(vm_id, uuid, ACTIVE, wrapped, FIRST_VERSION, LEAST_EPOCH, label, at_s, ORIGIN)
    vms.add_volume(txn, row)
    enrolments.add(txn, EnrolledRow(vm_id, uuid, FIRST_VERSION, "unknown", None, explained=True))
    body = {"uuid": uuid, "name": label, "version": FIRST_VERSION}
    ledger.append(txn, at_s=at_s, event="recovery-imported", vm_id=vm_id, session=None, body=body)
    return row
