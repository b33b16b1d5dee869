"""The fixtures of a whole exchange."""

from __future__ import annotations

from tests.desks import desk, furnished, logs_of_its_own, new_desk
from tests.installed import installed
from tests.worlds import amd, enrolled, enrolled_direct, new_verifier, office, owner, volume

__all__ = [
    "amd",
    "desk",
    "enrolled",
    "enrolled_direct",
    "furnished",
    "installed",
    "logs_of_its_own",
    "new_desk",
    "new_verifier",
    "office",
    "owner",
    "volume",
]
