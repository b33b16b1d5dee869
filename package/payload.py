"""A program's files: its own code and the locked packages, compiled in the chroot of the release that they are for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from tests.boot import wheels

from package.chroot import Chroot, run
from package.program import Program

ROOT: Final = Path(__file__).parent.parent
REQUIREMENTS: Final = ROOT / "requirements"
_PIP: Final = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
_COMPILED: Final = "tpm2-pytss"
"""The one package that comes as source."""
_WITHOUT_FAPI: Final = ("tss2-esys", "tss2-mu", "tss2-rc", "tss2-sys", "tss2-tctildr", "tss2-tcti-device")
"""What of tpm2-tss the bindings may find. Not tss2-fapi: it brings curl, and with it LDAP and Kerberos, into an initramfs."""


def fetch(program: Program, python: str, to: Path) -> None:
    """Download what is locked: wheels for this Python, and the source of what is compiled. Raises BuildError."""
    to.mkdir()
    for name in ("build", program.lock):
        rest = to / f"{name}.txt"
        rest.write_text(wheels.without(_COMPILED, (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")))
        run(
            [
                *_PIP,
                "download",
                "--require-hashes",
                "--no-deps",
                *wheels.target(python),
                "-r",
                str(rest),
                "-d",
                str(to),
            ]
        )
    only = to / "source.txt"
    only.write_text(
        wheels.only(_COMPILED, (REQUIREMENTS / f"{program.lock}.txt").read_text(encoding="utf-8"))
    )
    words = [
        "--require-hashes",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        _COMPILED,
        "-r",
        str(only),
    ]
    run([*_PIP, "download", *words, "-d", str(to)])


def install(program: Program, chroot: Chroot, fetched: Path, epoch: str) -> Path:
    """Build and install all of it in the chroot, below /build/files; gives that directory. Raises BuildError."""
    build = chroot.path / "build"
    shutil.copytree(fetched, build / "fetched")
    source = build / "source"
    source.mkdir()
    for name in ("agent", "protocol", "verifier", "simulator"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _hide_fapi(chroot)
    offline = (
        "--no-index",
        "--find-links",
        "/build/fetched",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
    )
    pip = ("/build/venv/bin/python", "-m", "pip")
    chroot.run("python3", "-m", "venv", "/build/venv")
    chroot.run(*pip, "install", *offline, "--require-hashes", "-r", "/build/fetched/build.txt")
    settled = {
        "SOURCE_DATE_EPOCH": epoch,
        "PKG_CONFIG_LIBDIR": "/build/pkgconfig",
        "CFLAGS": "-O2 -g0 -ffile-prefix-map=/build=.",
        "PATH": "/build/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": "/build/tmp",
    }
    (build / "tmp").mkdir()
    (compiled,) = (path.name for path in (build / "fetched").glob("tpm2*pytss*.tar.gz"))
    made = ("wheel", *offline, "--no-build-isolation", "--wheel-dir", "/build/made")
    chroot.run(*pip, *made, f"/build/fetched/{compiled}", "/build/source", **settled)
    everything = sorted(f"/build/made/{path.name}" for path in (build / "made").iterdir())
    into = ("install", *offline, "--no-compile", "--target", f"/build/files/{program.python}")
    chroot.run(*pip, *into, "--require-hashes", "-r", f"/build/fetched/{program.lock}.txt")
    chroot.run(*pip, *into, *everything)
    return build / "files"


def trim(program: Program, chroot: Chroot, files: Path) -> None:
    """Take away what no run needs: other rooms, metadata but for licences, tests, symbols. Raises BuildError."""
    top = files / program.python
    _keep_licences(top, files / program.licences)
    for entry in sorted(top.iterdir()):
        own = entry.name.startswith("kagimori_") and entry.name not in program.rooms
        if own or entry.name in {"bin", "include"} or entry.name.endswith(".dist-info"):
            shutil.rmtree(entry)
    for name in ("tests", "test", "__pycache__"):
        for found in sorted(top.rglob(name)):
            if found.is_dir():
                shutil.rmtree(found)
    for kind in ("*.pyi", "py.typed", "*.c", "*.h", "*.pxd", "*.pyx"):
        for found in top.rglob(kind):
            found.unlink()
    _lighten(chroot, top)


def _lighten(chroot: Chroot, top: Path) -> None:
    """Take symbols from libraries, and from modules the line by which nobody starts them."""
    for module in sorted(top.rglob("*.py")):
        code = module.read_bytes()
        if code.startswith(b"#!"):
            module.write_bytes(code.partition(b"\n")[2])
    for library in sorted(top.rglob("*.so*")):
        chroot.run("strip", "--strip-unneeded", "/" + str(library.relative_to(chroot.path)))
        library.chmod(0o644)


def _keep_licences(top: Path, to: Path) -> None:
    """Copy the licences that packages bring in their metadata."""
    for licence in sorted(top.glob("*.dist-info/licenses/**/*")):
        if licence.is_file():
            name = licence.relative_to(top).parts[0].partition("-")[0]
            (to / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(licence, to / name / licence.name)


def _hide_fapi(chroot: Chroot) -> None:
    (known,) = chroot.path.glob("usr/lib/*/pkgconfig/tss2-esys.pc")
    to = chroot.path / "build/pkgconfig"
    to.mkdir()
    for name in known.parent.glob("*.pc"):
        if not name.name.startswith("tss2-") or name.stem in _WITHOUT_FAPI:
            shutil.copy(name, to)
    for name in (chroot.path / "usr/share/pkgconfig").glob("*.pc"):
        shutil.copy(name, to)
