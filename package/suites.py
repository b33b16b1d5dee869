"""The releases that packages are made for, and what each of them is like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Suite:
    """A release: its name at the mirror, what its packages' versions end in, and its Python."""

    name: str
    ending: str
    python: str
    components: str = "main"

    @property
    def next_python(self) -> str:
        """Give the first version of Python for which compiled modules would have to be made anew."""
        major, minor = self.python.split(".")
        return f"{major}.{int(minor) + 1}"


SUITES: Final = {
    one.name: one
    for one in (
        Suite("bookworm", "deb12u1", "3.11"),
        Suite("trixie", "deb13u1", "3.13"),
        # Written for, and not run: no mirror of Ubuntu was at hand.
        Suite("noble", "ubuntu24.04.1", "3.12", "main universe"),
    )
}
BUILT: Final = ("bookworm", "trixie")
"""What is made without being asked for by name."""

BUILD_DEPENDS: Final = (
    *("python3-minimal", "python3-venv", "python3-dev", "gcc", "libc6-dev", "pkgconf", "libtss2-dev"),
    *("binutils", "dpkg-dev"),
)
