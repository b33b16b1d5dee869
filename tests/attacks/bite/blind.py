"""A verifier that has gone blind to named checks, for the length of a ``with``; the product has no such switch.

Most checks are a ``require`` or a ``note`` on the trail: made blind, they write down that they hold. Some checks are the
reading itself (a ``step`` around a strict parser, a look into the database): of those the blind verifier has a careless
twin, which takes what the strict one refuses. Twins do nothing else: whatever is well formed they read as the strict one
does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import pytest

from kagimori_protocol.messages import Check
from kagimori_verifier import decision, enrolling, release
from kagimori_verifier.trail import Trail

Twin = Callable[[pytest.MonkeyPatch], None]
"""Puts a careless reader in the place of a strict one."""


@contextlib.contextmanager
def blind(names: Collection[str], twins: dict[str, Twin]) -> Iterator[None]:
    """Remove checks by their names."""
    with pytest.MonkeyPatch.context() as patch:
        _mute(patch, frozenset(names))
        for name in names:
            twins.get(name, _nothing)(patch)
        yield


def _nothing(_: pytest.MonkeyPatch) -> None:
    """Leave everything as it is: the trail alone makes this check."""


def _mute(patch: pytest.MonkeyPatch, names: frozenset[str]) -> None:
    """Let the seams that all checks go through find that these hold."""
    note, require = Trail.note, Trail.require

    def blind_note(self: Trail, check: str, holds: bool, **texts: str) -> None:
        note(self, check, holds or check in names, **texts)

    def blind_require(self: Trail, check: str, holds: bool, **texts: str) -> None:
        require(self, check, holds or check in names, **texts)

    def blind_check(*, id: str, ok: bool, **texts: str) -> Check:
        return Check(id=id, ok=ok or id in names, **texts)

    patch.setattr(Trail, "note", blind_note)
    patch.setattr(Trail, "require", blind_require)
    patch.setattr(release, "Check", blind_check)
    patch.setattr(enrolling, "Check", blind_check)
    mandatory = {
        kind: tuple(check for check in checks if check not in names)
        for kind, checks in decision.MANDATORY.items()
    }
    patch.setattr(decision, "MANDATORY", mandatory)
