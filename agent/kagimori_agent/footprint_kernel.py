"""Kernel modules: which of those that a boot needs are modules of this kernel, built into it, or not there.

Source: Linux Documentation/kbuild/kbuild.rst (modules.builtin) and modules.dep(5). Import budget: the error tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kagimori_agent.footprint_needs import Driver
from kagimori_protocol.errors import ImageError, UsageError

MODULES: Final = Path("/lib/modules")


@dataclass(frozen=True, slots=True)
class Found:
    """A driver in one kernel: the names that are ``modules`` to be copied, and those ``builtin``; neither: absent."""

    driver: Driver
    modules: tuple[str, ...]
    builtin: tuple[str, ...]

    @property
    def absent(self) -> bool:
        """Tell whether this kernel has the driver in no form."""
        return not self.modules and not self.builtin


def resolve(drivers: Iterable[Driver], release: str, root: Path = MODULES) -> list[Found]:
    """Look for drivers in the kernel ``release``. Raises ImageError: a required one is absent; UsageError: no such kernel."""
    directory = root / release
    try:
        modules = _names((directory / "modules.dep").read_text(encoding="utf-8"))
        builtin = _names((directory / "modules.builtin").read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            "There is no such kernel on this machine.",
            code="footprint.kernel",
            expected=f"{directory} with modules.dep and modules.builtin",
            found=str(error.strerror),
            todo="Name an installed kernel with --kernel, or run `depmod` for it.",
        ) from error
    found = [
        Found(
            driver,
            tuple(name for name in driver.names if name in modules),
            tuple(name for name in driver.names if name in builtin),
        )
        for driver in dict.fromkeys(drivers)
    ]
    missing = [one.driver for one in found if one.absent and one.driver.need == "required"]
    if missing:
        raise ImageError(
            f"Linux {release} lacks what every unlock needs.",
            code="footprint.driver",
            expected="; ".join(f"{' or '.join(one.names)}: {one.purpose}" for one in missing),
            found="neither as a module nor built in",
            todo="Boot a kernel that has them.",
        )
    return found


def _names(listing: str) -> frozenset[str]:
    """Give the names in a list of paths, spelt as the kernel does: with underscores, without .ko and compression."""
    paths = (line.partition(":")[0].strip() for line in listing.splitlines())
    return frozenset(path.rpartition("/")[2].partition(".")[0].replace("-", "_") for path in paths if path)
