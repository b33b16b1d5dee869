"""From names of Python modules to their files on this machine, without importing any of them.

Import budget: ``importlib.machinery``, ``sys``, the error tree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from typing import Final

from kagimori_protocol.errors import ImageError

OWN_PACKAGES: Final = ("kagimori_agent", "kagimori_protocol")
_PARTS_OF_PYTHON: Final = frozenset(
    {"builtins", "sys", "_frozen_importlib", "_frozen_importlib_external", "collections.abc"}
)
"""What needs no file. ``collections`` is its own ``abc`` in newer Pythons 3.13; in those before, there is a file, and it is found."""

_INSIDE: Final = frozenset({"importlib._bootstrap", "importlib._bootstrap_external"})
"""What ``importlib`` takes out of the interpreter, under other names; the files are for a Python without them."""
_LANDMARK: Final = "os"
"""The interpreter finds its directory by this file (Modules/getpath.py), though it has the module inside."""


def find(name: str) -> ModuleSpec | None:
    """Find a module by its full name; None where an import would find nothing.

    Parents are looked up, not imported, so that a package which starts something when it is imported stays quiet.
    """
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        whole = ".".join(parts[:count])
        spec = PathFinder.find_spec(whole, places)
        if spec is None and count == 1:
            spec = BuiltinImporter.find_spec(whole) or FrozenImporter.find_spec(whole)
        if spec is None:
            return None
        places = spec.submodule_search_locations or []
    return spec


def own() -> list[str]:
    """Name all of our own modules, since a rare error must be told in an initramfs, too.

    All but what builds an initramfs: nobody does that in one.
    """
    names: list[str] = []
    for package in OWN_PACKAGES:
        spec = find(package)
        root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not parts[-1].startswith("footprint"):
                names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


def files(names: Iterable[str]) -> dict[str, Path]:
    """Give the file of each module that has one: the others are part of the interpreter.

    Raises ImageError, naming all that are not there: an initramfs without them would fail at its next boot.
    """
    found: dict[str, Path] = {}
    missing: list[str] = []
    for name in names:
        if _is_inside(name):
            continue
        spec = find(name)
        if spec is not None and spec.has_location and spec.origin:
            found[name] = Path(spec.origin)
        elif spec is None and name not in _PARTS_OF_PYTHON:
            missing.append(name)
    if missing:
        raise ImageError(
            "Python modules that the agent loads are not on this machine.",
            code="footprint.module",
            expected=f"each of them in {', '.join(one for one in sys.path if one)}",
            found=f"not {', '.join(missing)}",
            todo="Install Kagimori again, with what it depends on.",
        )
    return found


def _is_inside(name: str) -> bool:
    """Tell whether the interpreter has a module frozen into it, so that no import looks at its file."""
    return name != _LANDMARK and (name in _INSIDE or FrozenImporter.find_spec(name) is not None)


def data(names: Iterable[str]) -> list[Path]:
    """Give the files that lie in packages beside modules, from names such as ``certifi:cacert.pem``. Raises ImageError."""
    found: list[Path] = []
    for name in names:
        package, _, rest = name.partition(":")
        spec = find(package)
        path = Path(spec.origin).parent / rest if spec is not None and spec.origin else Path()
        if not path.is_file():
            raise ImageError(
                "A file that the agent reads is not on this machine.",
                code="footprint.data",
                expected=f"{rest} in the package {package}",
                found="no such file",
                todo="Install Kagimori again, with what it depends on.",
            )
        found.append(path)
    return found
