"""The package kagimori-agent: what a VM needs, whichever of the two makes its initramfs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from kagimori_agent import cli
from package import manual
from package.deb import Package
from package.payload import PYTHON, ROOT
from package.suites import Suite

NAME: Final = "kagimori-agent"
HOOK: Final = ROOT / "initramfs-tools-hook"
MODULE: Final = ROOT / "dracut-module"
_LAUNCHER: Final = f"""\
#!/usr/bin/python3 -I
import sys
sys.path[:0] = ["/{PYTHON}"]
from kagimori_agent.cli import main
sys.exit(main())
"""


def package(suite: Suite) -> Package:
    """Say what the control file says."""
    return Package(
        NAME,
        "admin",
        (
            f"python3 (>= {suite.python}~)",
            f"python3 (<< {suite.next_python}~)",
            *("cryptsetup-bin (>= 2:2.4.3)", "busybox | busybox-static", "kmod"),
            # Loaded by name, so that dpkg-shlibdeps does not see it.
            "libtss2-tcti-device0 | libtss2-tcti-device0t64",
            "cryptsetup-initramfs | dracut",
        ),
        (),
        "get a confidential VM's disk keys from its owner at boot",
        """\
An agent in the initramfs of an AMD SEV-SNP guest shows what was launched
and booted: the chip's attestation report, the quote and event log of a
COCONUT-SVSM vTPM. A verifier that the VM's owner runs judges that, and
releases the keys of the VM's LUKS2 volumes, at every boot, unattended.

This package has hooks for initramfs-tools and a module for dracut. Without
/etc/kagimori/agent.toml they do nothing.""",
        ROOT / "package/agent",
    )


def place(files: Path) -> None:
    """Put everything but the Python modules where it belongs."""
    _copy(HOOK / "common", files / "usr/lib/kagimori/boot", 0o755)
    _copy(HOOK / "booted/booted", files / "usr/lib/kagimori/booted", 0o755)
    _copy(
        HOOK / "booted/kagimori-confirm.service",
        files / "usr/lib/systemd/system/kagimori-confirm.service",
        0o644,
    )
    _copy(HOOK / "command-line/words", files / "usr/lib/kagimori/command-line", 0o644)
    documents = files / "usr/share/doc" / NAME
    _copy(HOOK / "command-line/kagimori.cfg", documents / "examples/kagimori.cfg", 0o644)
    tools = files / "usr/share/initramfs-tools"
    _copy(HOOK / "hook", tools / "hooks/kagimori", 0o755)
    for stage in ("init-premount", "init-bottom", "panic"):
        _copy(HOOK / "scripts" / stage, tools / "scripts" / stage / "kagimori", 0o755)
    dracut = files / "usr/lib/dracut"
    _copy(MODULE / "50kagimori", dracut / "modules.d/50kagimori", None)
    _copy(MODULE / "kagimori.conf", dracut / "dracut.conf.d/50-kagimori.conf", 0o644)
    program = files / "usr/bin" / NAME
    program.parent.mkdir(parents=True)
    program.write_text(_LAUNCHER, encoding="utf-8")
    program.chmod(0o755)
    parser = cli.parser()
    _write(files / f"usr/share/man/man8/{NAME}.8", manual.page(parser, 8, "kagimori"))
    _write(files / f"usr/share/bash-completion/completions/{NAME}", manual.bash(parser))
    _write(files / f"usr/share/zsh/vendor-completions/_{NAME}", manual.zsh(parser))


def _copy(source: Path, target: Path, mode: int | None) -> None:
    """Copy a file or all files of a directory; None keeps each file's own mode."""
    if source.is_dir():
        for one in sorted(source.iterdir()):
            _copy(one, target / one.name, mode)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(source.stat().st_mode & 0o755 if mode is None else mode)


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
