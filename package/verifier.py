"""The package kagimori-verifier: what a VM's owner runs, as a service of systemd."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kagimori_verifier.cli.main import parser
from package.deb import Package
from package.payload import ROOT
from package.program import Program, copy, place_commands
from package.suites import Suite

PROGRAM: Final = Program(
    "kagimori-verifier", "kagimori-verifier", "verifier", ("kagimori_verifier", "kagimori_protocol")
)
SYSTEMD: Final = ROOT / "verifier/systemd"
UNITS: Final = (
    "kagimori-verifier.service",
    "kagimori-verifier-backup.service",
    "kagimori-verifier-backup.timer",
)
_BY_HAND: Final = """\
import os
if os.geteuid() == 0:
    # Where systemd takes the key-encryption key from, and only root may read it.
    os.environ.setdefault("CREDENTIALS_DIRECTORY", "/etc/credstore")
"""


def package(suite: Suite) -> Package:
    """Say what the control file says."""
    return Package(
        PROGRAM.name,
        "admin",
        (
            f"python3 (>= {suite.python}~)",
            f"python3 (<< {suite.next_python}~)",
            "cryptsetup-bin (>= 2:2.4.3)",
            "systemd",
        ),
        (),
        "release confidential VMs' disk keys under their owner's policy",
        """\
Judges what AMD SEV-SNP guests show at boot (the chip's attestation report,
the quote and event log of a COCONUT-SVSM vTPM), and releases the keys of
their LUKS2 volumes if their owner's policy holds. Runs on a machine that
the owner trusts; the guests have kagimori-agent.

The service is off until its operator has made a verifier.""",
        ROOT / "package/verifier",
    )


def place(files: Path) -> None:
    """Put everything but the Python modules where it belongs."""
    for unit in UNITS:
        copy(SYSTEMD / unit, files / "usr/lib/systemd/system" / unit, 0o644)
    copy(SYSTEMD / "sysusers.conf", files / "usr/lib/sysusers.d/kagimori-verifier.conf", 0o644)
    copy(SYSTEMD / "tmpfiles.conf", files / "usr/lib/tmpfiles.d/kagimori-verifier.conf", 0o644)
    documents = files / "usr/share/doc" / PROGRAM.name
    copy(SYSTEMD / "README.Debian", documents / "README.Debian", 0o644)
    copy(SYSTEMD / "encrypted-kek.conf", documents / "examples/encrypted-kek.conf", 0o644)
    place_commands(PROGRAM, "kagimori_verifier.cli", parser(), files, _BY_HAND)
