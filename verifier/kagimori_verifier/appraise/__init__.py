"""Is authentic evidence acceptable to its owner?

PROTOCOL.md section 6, step 9. Rules over claims and reference values. No I/O, no clock of its own; empty
means no. Nothing here raises for evidence that displeases: every rule notes what it expected and found, and
the decision is taken from the notes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kagimori_verifier.appraise.boot import appraise_boot
from kagimori_verifier.appraise.command_line import appraise_command_line
from kagimori_verifier.appraise.endorsement import appraise_endorsement
from kagimori_verifier.appraise.snp import appraise_snp

if TYPE_CHECKING:
    from datetime import datetime

    from kagimori_verifier.appraise.reference import References
    from kagimori_verifier.claims import Claims
    from kagimori_verifier.trail import Trail


def appraise(trail: Trail, claims: Claims, references: References, now: datetime) -> bool:
    """Note every rule of the VM's policy on the trail, those that hold and those that do not.

    Tells whether what was booted is explained by reference values and closes its doors; only ``enrol`` may do without.
    """
    appraise_endorsement(trail, claims.snp, references.policy, now)
    appraise_snp(trail, claims.snp, references)
    if claims.vtpm is None:
        return True
    purpose, events = claims.hello.purpose, claims.vtpm.logged.events
    explained = appraise_boot(trail, purpose, claims.vtpm.pcrs, events, references)
    return appraise_command_line(trail, purpose, events, references.policy) and explained
