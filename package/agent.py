"""The package kagimori-agent: what a VM needs, whichever of the two makes its initramfs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kagimori_agent import cli
from package.deb import Package
from package.payload import ROOT
from package.program import Program, copy, place_commands
from package.suites import Suite

PROGRAM: Final = Program("kagimori-agent", "kagimori", "agent", ("kagimori_agent", "kagimori_protocol"))
HOOK: Final = ROOT / "initramfs-tools-hook"
MODULE: Final = ROOT / "dracut-module"


def package(suite: Suite) -> Package:
    """Say what the control file says."""
    return Package(
        PROGRAM.name,
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
    copy(HOOK / "common", files / "usr/lib/kagimori/boot", 0o755)
    copy(HOOK / "booted/booted", files / "usr/lib/kagimori/booted", 0o755)
    copy(
        HOOK / "booted/kagimori-confirm.service",
        files / "usr/lib/systemd/system/kagimori-confirm.service",
        0o644,
    )
    copy(HOOK / "command-line/words", files / "usr/lib/kagimori/command-line", 0o644)
    documents = files / "usr/share/doc" / PROGRAM.name
    copy(HOOK / "command-line/kagimori.cfg", documents / "examples/kagimori.cfg", 0o644)
    tools = files / "usr/share/initramfs-tools"
    copy(HOOK / "hook", tools / "hooks/kagimori", 0o755)
    for stage in ("init-premount", "init-bottom", "panic"):
        copy(HOOK / "scripts" / stage, tools / "scripts" / stage / "kagimori", 0o755)
    dracut = files / "usr/lib/dracut"
    copy(MODULE / "50kagimori", dracut / "modules.d/50kagimori", None)
    copy(MODULE / "kagimori.conf", dracut / "dracut.conf.d/50-kagimori.conf", 0o644)
    place_commands(PROGRAM, "kagimori_agent.cli", cli.parser(), files)
