"""Put files together as one .deb, the same bytes each time: order, owners and times come from the checkout alone."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from package.chroot import Chroot, run
from package.payload import ROOT

MAINTAINER: Final = "The Kagimori developers <developers@kagimori.invalid>"
_COMPRESSED: Final = ("usr/share/man/*/*", "usr/share/doc/*/changelog*")


@dataclass(frozen=True)
class Package:
    """What a control file says. ``scripts`` is the directory of the maintainer scripts; ``conffiles`` are absolute paths."""

    name: str
    section: str
    depends: Sequence[str]
    recommends: Sequence[str]
    summary: str
    description: str
    scripts: Path
    conffiles: Sequence[str] = ()


def version() -> str:
    """Give the version of this checkout as Debian writes it: what comes before a release sorts before it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return re.sub(r"\.?(dev|a|b|rc)(\d+)$", r"~\1\2", str(project["version"]))


def epoch() -> str:
    """Give the time of the newest commit, in seconds. Raises BuildError."""
    return run(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]).strip()


def assemble(package: Package, chroot: Chroot, files: Path, to: Path) -> Path:
    """Make the .deb of ``files``, which lie in the chroot; gives its path in ``to``. Raises BuildError."""
    full = f"{version()}-1~{chroot.suite.ending}"
    _documents(package, files, full)
    for path in sorted(files.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
        elif not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    control = files / "DEBIAN"
    control.mkdir()
    sums = "".join(
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(files)}\n"
        for path in sorted(files.rglob("*"))
        if path.is_file() and control not in path.parents
    )
    (control / "md5sums").write_text(sums, encoding="utf-8")
    (control / "control").write_text(_control(package, chroot, files, full), encoding="utf-8")
    for script in sorted(package.scripts.iterdir()):
        shutil.copy(script, control / script.name)
        (control / script.name).chmod(0o644 if script.name == "triggers" else 0o755)
    if package.conffiles:
        (control / "conffiles").write_text(
            "".join(f"{path}\n" for path in package.conffiles), encoding="utf-8"
        )
    name = f"{package.name}_{full}_amd64.deb"
    inside = f"/{files.relative_to(chroot.path)}"
    settled = {"SOURCE_DATE_EPOCH": epoch()}
    words = ("dpkg-deb", "--root-owner-group", "-Zxz", "--threads-max=1", "--build", inside, f"/build/{name}")
    chroot.run(*words, **settled)
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(chroot.path / "build" / name, to / name)
    return to / name


def _documents(package: Package, files: Path, full: str) -> None:
    place = files / "usr/share/doc" / package.name
    place.mkdir(parents=True, exist_ok=True)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    place.joinpath("copyright").write_text(_copyright(place, licence), encoding="utf-8")
    date = run(["date", "-u", "-R", "-d", f"@{epoch()}"]).strip()
    entry = f"{package.name} ({full}) unstable; urgency=medium\n\n  * See the project's CHANGELOG.md.\n\n -- {MAINTAINER}  {date}\n"
    place.joinpath("changelog.Debian").write_text(entry, encoding="utf-8")
    shutil.copy(ROOT / "CHANGELOG.md", place / "changelog")
    for pattern in _COMPRESSED:
        for path in sorted(files.glob(pattern)):
            with gzip.GzipFile(f"{path}.gz", "wb", compresslevel=9, mtime=0) as packed:
                packed.write(path.read_bytes())
            path.unlink()


def _copyright(place: Path, licence: str) -> str:
    """Name what is in the package; every library's own licence lies beside this file."""
    names = sorted(path.parent.name for path in place.glob("licenses/*/*"))
    beside = "".join(f"  {name}\n" for name in dict.fromkeys(names))
    return (
        "Kagimori, Copyright 2026 the Kagimori developers, is under Apache-2.0, of which\n"
        "/usr/share/common-licenses/Apache-2.0 is a copy.\n\n"
        "With it come these libraries from the Python Package Index, unchanged but for what was left out;\n"
        f"the licence of each is in licenses/ beside this file:\n{beside}\n"
        f"{licence.strip().splitlines()[0].strip()}\n"
    )


def _control(package: Package, chroot: Chroot, files: Path, full: str) -> str:
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file()) // 1024
    depends = [*package.depends, *_libraries(chroot, files)]
    description = "".join(f" {line or '.'}\n" for line in package.description.strip().splitlines())
    fields = {
        "Package": package.name,
        "Version": full,
        "Architecture": "amd64",
        "Maintainer": MAINTAINER,
        "Installed-Size": str(size),
        "Depends": ", ".join(depends),
        "Recommends": ", ".join(package.recommends),
        "Section": package.section,
        "Priority": "optional",
        "Description": package.summary,
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items() if value) + description


def _libraries(chroot: Chroot, files: Path) -> list[str]:
    """Ask dpkg-shlibdeps what the compiled modules are linked to. Raises BuildError."""
    found = sorted(f"/{path.relative_to(chroot.path)}" for path in files.rglob("*.so"))
    if not found:
        return []
    work = chroot.path / "build/shlibs"
    (work / "debian").mkdir(parents=True)
    (work / "debian/control").write_text("Source: kagimori\n\nPackage: kagimori\nArchitecture: any\n")
    script = 'cd /build/shlibs && exec dpkg-shlibdeps -O "$@"'
    told = chroot.run("sh", "-c", script, "sh", *found)
    for line in told.splitlines():
        if line.startswith("shlibs:Depends="):
            return line.removeprefix("shlibs:Depends=").split(", ")
    return []
