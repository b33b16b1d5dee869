"""Where Debian comes from: the mirrors of this machine's own apt, also for a release that is not this machine's."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LISTS: Final = Path("/var/lib/apt/lists")
_FRESH_S: Final = 86400
"""Seconds for which what was last heard of another release's archive is believed."""
_TIMEOUT_S: Final = 300


@dataclass(frozen=True)
class Archive:
    """The packages of one Debian release. ``sources`` name its mirrors; ``options`` make apt's programs use them."""

    suite: str
    sources: tuple[Path, ...]
    lists: Path
    options: tuple[str, ...]

    def state(self) -> list[Path]:
        """Give what apt has last seen of the archive: whatever is made from it is another thing after a change."""
        return sorted(self.lists.glob(f"*_dists_{self.suite}*_InRelease"))

    def unpack(self, package: str, into: Path) -> None:
        """Download a package and unpack it into a directory."""
        down = into / "download"
        down.mkdir()
        run("apt-get", "-qq", *self.options, "download", package, cwd=down)
        (file,) = down.iterdir()
        run("dpkg-deb", "--extract", str(file), str(into), cwd=into)
        shutil.rmtree(down)

    def names(self, prefix: str) -> list[str]:
        """Name the packages that there are, by how their names begin."""
        return run("apt-cache", *self.options, "pkgnames", prefix, cwd=self.lists).split()


def archive(suite: str, root: Path) -> Archive:
    """Give a release's archive; ``root`` keeps what apt knows of one that is not this machine's."""
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in places
        if path.suffix in {".list", ".sources"} and path.is_file()
    }
    own = [path for path, text in texts.items() if suite in text]
    if own:
        found = Archive(suite, tuple(own), _LISTS, ())
        if not found.state():
            run("apt-get", "update", "-qq", cwd=_LISTS)
        return found
    here = platform.freedesktop_os_release()
    release = here.get("VERSION_CODENAME", "")
    named = {path: text for path, text in texts.items() if here.get("ID") == "debian" and release in text}
    assert named, f"this machine's apt has no source of {suite}: boot tests take their Debian from there"
    return _another(suite, {path.name: text.replace(release, suite) for path, text in named.items()}, root)


def _another(suite: str, sources: dict[str, str], root: Path) -> Archive:
    """Give the archive of a release that this machine's mirrors have beside its own."""
    parts, lists = root / f"apt-{suite}/sources", root / f"apt-{suite}/lists"
    parts.mkdir(parents=True, exist_ok=True)
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (parts / name).write_text(text, encoding="utf-8")
    options = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": parts.resolve(),
        "Dir::State::Lists": lists.resolve(),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
    }
    words = tuple(word for name, value in options.items() for word in ("-o", f"{name}={value}"))
    found = Archive(suite, tuple(parts / name for name in sources), lists, words)
    asked = root / f"apt-{suite}/asked"
    if not asked.exists() or time.time() - asked.stat().st_mtime > _FRESH_S:
        run("apt-get", "-qq", *words, "update", cwd=lists)
        asked.touch()
    assert found.state(), f"the mirrors of this machine's apt have no {suite}"
    return found


def run(*command: str, cwd: Path) -> str:
    """Run a program that must work; gives what it prints."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
    )
    assert done.returncode == 0, (
        f"{' '.join(command[:6])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
    return done.stdout
