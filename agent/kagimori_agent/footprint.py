"""What an initramfs must carry for the agent to run in it: the one list that both initramfs systems build from.

Names come from a record of what the agent loads (``footprint_record``) and from what its devices declare
(``footprint_needs``); here they become files of this machine. A name that does not resolve is an error, because an
initramfs without it fails at the next boot, where nobody can repair it.

Import budget: the standard library, the error tree, and ``luks`` for where cryptsetup lies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kagimori_agent import footprint_kernel, footprint_libraries, footprint_modules, footprint_record, luks
from kagimori_agent.footprint_needs import CODECS, PARTS
from kagimori_protocol.errors import ImageError

if TYPE_CHECKING:
    from kagimori_agent.footprint_kernel import Found

LAUNCHER: Final = Path("/usr/bin/kagimori-agent")
"""Where an initramfs has the agent, however it is installed on the machine."""
_UNSAFE: Final = frozenset(" \t\n\r\\\"'")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Files to copy to the same place (links as links), and kernel modules; ``search`` are directories of packages.

    ``sources`` are those of ``files`` that are Python source: an initramfs carries them compiled, since compiling them
    at each boot would take longer than all the rest.
    """

    interpreter: Path
    search: tuple[Path, ...]
    files: tuple[Path, ...]
    sources: frozenset[Path]
    drivers: tuple[Found, ...]

    def lines(self) -> Iterator[str]:
        """Give it as lines of a word and what it is about, for scripts."""
        yield f"python {footprint_record.this_python()} {self.interpreter}"
        yield from (f"file {path}" for path in self.files)
        for found in self.drivers:
            yield from (f"module {name}" for name in found.modules)
            yield from (f"builtin {name}" for name in found.builtin)
            if found.absent:
                driver = found.driver
                yield f"absent {'/'.join(driver.names)} {driver.need}: {driver.purpose}"

    def as_dict(self) -> dict[str, Any]:
        """Give it for ``--json``."""
        drivers = [
            {
                "names": list(found.driver.names),
                "need": found.driver.need,
                "purpose": found.driver.purpose,
                "modules": list(found.modules),
                "builtin": list(found.builtin),
            }
            for found in self.drivers
        ]
        return {
            "python": footprint_record.this_python(),
            "interpreter": str(self.interpreter),
            "search": [str(path) for path in self.search],
            "files": [str(path) for path in self.files],
            "kernel_modules": drivers,
        }


def resolve(release: str, modules: Path = footprint_kernel.MODULES) -> Footprint:
    """Resolve everything on this machine, for the kernel ``release``. Raises ImageError, UsageError."""
    record = footprint_record.load()
    interpreter = Path(sys.executable).resolve()
    packages = footprint_modules.files([*footprint_modules.own(), *record.packages])
    stdlib = footprint_modules.files([*record.stdlib, *CODECS])
    start = [
        interpreter,
        luks.cryptsetup(),
        *stdlib.values(),
        *packages.values(),
        *footprint_modules.data(record.data),
    ]
    by_name = {name: purpose for part in PARTS for name, purpose in part.libraries}
    start += footprint_libraries.opened(by_name, interpreter)
    libraries = footprint_libraries.linked([path.resolve() for path in start])
    files = footprint_libraries.chain([*start, *libraries])
    _require_plain(files)
    return Footprint(
        interpreter,
        tuple(dict.fromkeys(_roots(packages))),
        tuple(sorted(files)),
        frozenset(path for path in files if path.suffix == ".py"),
        tuple(
            footprint_kernel.resolve((driver for part in PARTS for driver in part.drivers), release, modules)
        ),
    )


def _roots(packages: dict[str, Path]) -> Iterator[Path]:
    """Give the directories that packages are found in, in the order of ``sys.path``, links resolved as in ``files``."""
    places = set()
    for name, path in packages.items():
        steps = name.count(".") + (path.stem == "__init__")
        places.add(path.parents[steps].resolve())
    order = [Path(entry).resolve() for entry in sys.path if entry]
    yield from sorted(places, key=lambda place: order.index(place) if place in order else len(order))


def _require_plain(files: Iterable[Path]) -> None:
    """Refuse paths that a script would take apart."""
    strange = sorted(str(path) for path in files if _UNSAFE & set(str(path)))
    if strange:
        raise ImageError(
            "Kagimori lies in a place that scripts cannot name.",
            code="footprint.path",
            expected="paths without blanks, quotes and backslashes",
            found=", ".join(map(ascii, strange[:4])),
            todo="Install Kagimori somewhere else.",
        )
