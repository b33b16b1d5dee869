"""States of a volume's key. ``unlock`` gives active ones, and no other."""

from __future__ import annotations

from typing import Final

ADDING: Final = "adding"
"""The owner's machine adds its keyslot, or was interrupted (enrolment)."""
STAGED: Final = "staged"
"""Made for an enrolment that nobody has confirmed yet (enrolling)."""
WAITING: Final = "waiting"
"""Enrolled by a boot that no reference value explains: its owner has to accept that."""
ACTIVE: Final = "active"
"""There is a keyslot for it, and it may be released."""
