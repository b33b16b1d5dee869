"""What the owner knows, read from the database and given to the pipeline as frozen values."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from kagimori_verifier.appraise.policy import parse_policy
from kagimori_verifier.appraise.reference import BootState, PcrReference, References
from kagimori_verifier.claims import Measurement, Root
from kagimori_verifier.pipeline import Vm
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.store import columns, enrolments, profiles, references, roots, vms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kagimori_verifier.appraise.policy import Policy
    from kagimori_verifier.store import Store

REMEMBERED: Final = 256
"""Policies, and boot states, that are kept as they were read."""


class StoredFacts:
    """Implements the pipeline's Facts over the store."""

    def __init__(self, store: Store) -> None:
        """Keep the store."""
        self._store = store

    def policy(self, vm_id: str) -> Policy | None:
        """Give the policy that a VM is judged by, or None if it is unknown or disabled."""
        with self._store.read() as txn:
            text = profiles.policy_of(txn, vm_id)
        return None if text is None else _policy(text)

    def vm(self, vm_id: str) -> Vm | None:
        """Give a VM with everything that it is judged by, or None."""
        with self._store.read() as txn:
            row = vms.get(txn, vm_id)
            profile = None if row is None else profiles.get(txn, row.profile)
            if row is None or profile is None:
                return None
            volumes = vms.volumes(txn, vm_id, state=None)
            active = frozenset(volume.uuid for volume in volumes if volume.state == "active")
            return Vm(
                vm_id=row.vm_id,
                enabled=row.enabled,
                purposes=frozenset(row.purposes),
                volumes=active,
                others={one.uuid: one.state for one in volumes if one.uuid not in active},
                provenance={one.uuid: one.provenance for one in enrolments.of_vm(txn, vm_id)},
                profile=row.profile,
                references=References(
                    policy=_policy(profile.policy),
                    chips=frozenset(bytes.fromhex(chip) for chip in row.chips),
                    profile_states=_states(references.boot_values(txn, "profile", row.profile)),
                    vm_states=_states(references.boot_values(txn, "vm", vm_id)),
                ),
            )

    def measurement(self, profile: str, digest: bytes) -> Measurement | None:
        """Give the reference value that this MEASUREMENT matches in a profile, or None."""
        with self._store.read() as txn:
            row = references.measurement(txn, profile, digest)
            if row is None:
                return None
            known_by = references.vms_of(txn, digest) if row.kind == "snp-direct" else frozenset()
        return Measurement(
            digest=row.digest,
            kind=row.kind,
            label=row.label,
            svsm_features=tuple(row.svsm_features),
            vms=known_by,
        )

    def roots(self) -> TrustedRoots:
        """Give AMD's roots and those that the operator added."""
        with self._store.read() as txn:
            return TrustedRoots(Root(row.spki_sha256, row.product, row.label) for row in roots.all(txn))


@functools.lru_cache(maxsize=REMEMBERED)
def _policy(text: str) -> Policy:
    """Read a policy. It depends on its text alone, which comes from the database each time."""
    return parse_policy(text)


def _states(rows: Iterable[tuple[str, str]]) -> tuple[BootState, ...]:
    return tuple(BootState(label, _pcrs(text)) for label, text in rows)


@functools.lru_cache(maxsize=REMEMBERED)
def _pcrs(text: str) -> Mapping[int, PcrReference]:
    """Read the PCR values of a boot state, from its text alone as above."""
    return MappingProxyType(
        {
            int(index): PcrReference(
                digest=bytes.fromhex(pcr["digest"]),
                events=tuple((bytes.fromhex(digest), told) for digest, told in pcr["events"]),
            )
            for index, pcr in columns.decode(text, dict[str, dict[str, Any]], "boot_state.pcrs").items()
        }
    )
