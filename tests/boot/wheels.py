"""The agent's locked packages as wheels, for the Python of the Debian that they go into.

tpm2-pytss alone comes as source. It is compiled once, here: its one library keeps to Python's stable ABI, and to names that
tpm2-tss has under the same soname in Debian 12 and 13.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path
from typing import Final

from tests.boot.archive import run
from tests.boot.variants import ROOT

LOCKED: Final = ROOT / "requirements/agent.txt"
HERE: Final = f"{sys.version_info.major}.{sys.version_info.minor}"

_GLIBCS: Final = range(17, 37)
"""Minor versions of glibc that a wheel may ask for: the newest is Debian 12's."""
_PIP: Final = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def build(to: Path) -> None:
    """Make the wheels for the Python that runs this."""
    locked = ["--require-hashes", "--only-binary", ":all:", "--no-binary", "tpm2-pytss", "-r", str(LOCKED)]
    flags = ["env", "CFLAGS=-O0 -g0"]
    run(*flags, *_PIP, "wheel", "--no-deps", "--no-build-isolation", *locked, "-w", str(to), cwd=to)


def build_for(python: str, to: Path, built_here: Path) -> None:
    """Fetch the wheels for another Python, and take the compiled one from those that were made here."""
    others = to / "requirements.txt"
    others.write_text(without("tpm2-pytss", LOCKED.read_text(encoding="utf-8")), encoding="utf-8")
    wanted = ["--require-hashes", "--no-deps", *target(python), "-r", str(others), "-d", str(to)]
    run(*_PIP, "download", *wanted, cwd=to)
    others.unlink()
    (own,) = built_here.glob("tpm2_pytss-*.whl")
    libraries = [name for name in zipfile.ZipFile(own).namelist() if name.endswith(".so")]
    assert libraries, f"{own.name} has nothing compiled"
    assert all(name.endswith(".abi3.so") for name in libraries), f"{own.name} keeps to no stable ABI"
    name, version, _, _, place = own.stem.split("-")
    shutil.copy(own, to / f"{name}-{version}-cp311-abi3-{place}.whl")


def target(python: str) -> list[str]:
    """Give pip's words for packages of a machine that is not this one."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBCS]
    platforms += ["manylinux2014_x86_64", "linux_x86_64"]
    words = [word for name in platforms for word in ("--platform", name)]
    return ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, *words]


def without(package: str, requirements: str) -> str:
    """Leave a package and its hashes out of a locked list."""
    return _parted(package, requirements)[1]


def only(package: str, requirements: str) -> str:
    """Leave nothing but a package and its hashes in a locked list."""
    return _parted(package, requirements)[0]


def _parted(package: str, requirements: str) -> tuple[str, str]:
    parts = {True: "", False: ""}
    of_it = False
    for line in requirements.splitlines(keepends=True):
        if not line.startswith((" ", "#")):
            of_it = line.startswith(f"{package}==")
        parts[of_it] += line
    return parts[True], parts[False]
