"""Whose word counts: AMD's root keys, pinned by the SHA-256 of their SubjectPublicKeyInfo.

Certificates are not shipped (ADR 0003): AMD re-issues them, hosts and caches carry them, and a pin is what
decides. The values were computed from certificates found byte-identical in seven or more independent public
repositories, and are tested against `vectors/amd-ca` where those are present.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_verifier.claims import Root

if TYPE_CHECKING:
    from collections.abc import Iterable

AMD_ROOTS: Final = (
    Root(bytes.fromhex("9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9"), "Milan"),
    Root(bytes.fromhex("429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831"), "Genoa"),
    Root(bytes.fromhex("4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08"), "Turin"),
)

PRODUCTS: Final = tuple(root.product for root in AMD_ROOTS)


class TrustedRoots:
    """AMD's roots and those that an operator added by name."""

    def __init__(self, added: Iterable[Root] = ()) -> None:
        """Index by pin; AMD's own cannot be overridden."""
        self._by_pin = {root.spki_sha256: root for root in (*added, *AMD_ROOTS)}

    def get(self, spki_sha256: bytes) -> Root | None:
        """Give the root with this pin, if it is trusted."""
        return self._by_pin.get(spki_sha256)

    def __str__(self) -> str:
        """Name them all, in one line."""
        return ", ".join(str(root) for root in self._by_pin.values())
