"""The fixtures of a whole exchange, for what is proved over HTTP."""

from __future__ import annotations

from tests.worlds import amd, enrolled, enrolled_direct, new_verifier, office, owner, volume

__all__ = ["amd", "enrolled", "enrolled_direct", "new_verifier", "office", "owner", "volume"]
