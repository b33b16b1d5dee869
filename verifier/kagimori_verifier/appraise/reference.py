"""Reference values: what an owner knows to be good, as ``appraise`` wants it (frozen, no database behind it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kagimori_verifier.appraise.policy import Policy


@dataclass(frozen=True, slots=True)
class PcrReference:
    """The exact value of one PCR, and the events (SHA-256 digest, description) that led to it where they are known."""

    digest: bytes
    events: tuple[tuple[bytes, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BootState:
    """A set of PCR values that were seen or computed together, under the label that the owner gave them."""

    label: str
    pcrs: Mapping[int, PcrReference]


@dataclass(frozen=True, slots=True)
class References:
    """Everything that one VM is judged by."""

    policy: Policy
    chips: frozenset[bytes]
    """CHIP_IDs that this VM may run on, 64 bytes each."""
    profile_states: tuple[BootState, ...]
    vm_states: tuple[BootState, ...]
