"""Rules about the volumes themselves: whether their owner stands by how they were enrolled, and who may know their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_verifier.states import WAITING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kagimori_verifier.trail import Trail

_MADE: Final = {
    "owner-machine": "its volume key was made on the owner's machine",
    "attested-vm": "its volume key was made in this VM",
}
HOST_MAY_KNOW: Final = "the host may know its volume key (until `kagimori-agent enrol --reencrypt` has run)"


def appraise_volumes(
    trail: Trail, volumes: Sequence[str], states: Mapping[str, str], provenance: Mapping[str, str]
) -> None:
    """Note both rules for the volumes that are asked for, by their UUIDs.

    The second never decides, it tells: an owner who cannot reencrypt yet would only lose the rest as well.
    """
    waiting = [uuid for uuid in volumes if states.get(uuid) == WAITING]
    trail.note(
        "volume.accepted",
        not waiting,
        expected="volumes enrolled by a boot that is explained, or accepted by their owner since",
        found=", ".join(waiting) + ": enrolled by a boot that nothing explains" if waiting else "no others",
    )
    told = [f"{uuid}: {_MADE.get(provenance.get(uuid, ''), HOST_MAY_KNOW)}" for uuid in volumes]
    trail.note(
        "volume.provenance",
        True,  # noqa: FBT003 - it is told, whatever it is
        expected="volumes whose volume keys the host has never known (this is told, and decides nothing)",
        found="; ".join(told) or "no volume is asked for",
    )
