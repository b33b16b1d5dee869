"""An owner with a real verifier, and a VM whose image boots: what the tests of this directory act on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.boot import images, machine
from tests.boot.cache import Cache
from tests.boot.images import MEASUREMENT, PASSPHRASE, Images
from tests.boot.variants import ROOT, Variant

from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.commands import Commands, Done, ServedVerifier

VM: Final = "web1"
PROFILE: Final = "debian"
FLOOR: Final = "Milan:boot_loader=4,tee=0,snp=24,microcode=219"

LIMITS: Final = """
[limits]
boot_budget_s = 600
backoff_max_s = 3
"""
"""Test machines are slow, and their verifier is never far."""

BOOT_S: Final = 300
"""Seconds that a boot may take: ten times what it takes when nothing else runs."""


@dataclass(frozen=True)
class Estate:
    """Everything built: images, the initramfs, the volume with the verifier's keyslot, and a verifier to be copied."""

    images: Images
    initramfs: Path
    volume: Path
    verifier: Path
    agent_toml: str


def build(cache: Cache, variant: Variant, kind: str = "svsm-vtpm", measurement: str = MEASUREMENT) -> Estate:
    """Build it, or find it in the cache; the owner knows ``measurement`` as that of a VM of this ``kind``."""
    return of(cache, images.build(cache, variant), kind, measurement)


def of(
    cache: Cache, built: Images, kind: str = "svsm-vtpm", measurement: str = MEASUREMENT, limits: str = LIMITS
) -> Estate:
    """Give the estate of these images, as ``build`` does; ``limits`` end its agent.toml."""
    rooms = [ROOT / name for name in ("verifier", "protocol", "pyproject.toml")]
    made_from = [built.volume.parent.name, built.amd_root.parent.name, *rooms, Path(__file__)]
    owner = cache.get(
        f"owner-{kind}",
        [*made_from, measurement, built.variant.cmdline],
        lambda to: _build_owner(to, built, kind, measurement),
    )
    agent_toml = (owner / "agent.toml").read_text(encoding="utf-8") + limits
    initramfs = images.build_initramfs(cache, built, agent_toml)
    return Estate(built, initramfs, owner / "disk.img", owner / "verifier", agent_toml)


def _build_owner(to: Path, built: Images, kind: str, measurement: str) -> None:
    """Enrol, as README.md does by hand: root, profile, measurement, VM, and a keyslot in the volume."""
    owner = make_owner(to, built, kind, measurement)
    shutil.copy(built.volume, to / "disk.img")
    owner(
        *("volume", "add", "--vm", VM, "--device", str(to / "disk.img"), "--passphrase-fd", "0"),
        stdin=PASSPHRASE.decode(),
    )
    (to / "agent.toml").write_text(config_of(owner), encoding="utf-8")


def make_owner(
    to: Path, built: Images, kind: str = "svsm-vtpm", measurement: str = MEASUREMENT
) -> Callable[..., Done]:
    """Make a verifier in ``to`` that knows a VM of these images, and no volume of it; gives its command line."""
    owner = Commands(to).verifier
    owner(
        "init",
        "--dir",
        str(to / "verifier"),
        "--listen",
        "127.0.0.1:0",
        "--public-url",
        f"http://{machine.VERIFIER_AT}",
    )
    root = AmdRoot.load(built.amd_root)
    ders = {name: to / f"{name}.der" for name in ("ark", "ask", "crl")}
    for path, content in zip(ders.values(), (root.ark_der, root.ask_der, root.crl()), strict=True):
        path.write_bytes(content)
    owner("endorsements", "root", "add", "--certificate", str(ders["ark"]), "--label", "simulated")
    owner("endorsements", "import", *map(str, ders.values()))
    line = built.variant.cmdline
    owner("profile", "add", PROFILE, "--boot-way", "direct", "--tcb-floor", FLOOR, "--command-line", line)
    owner(
        *("reference", "measurement", "add", measurement, "--profile", PROFILE, "--kind", kind),
        *("--label", "known", *(("--svsm-feature", "vtpm") if kind == "svsm-vtpm" else ())),
    )
    owner("vm", "add", VM, "--profile", PROFILE, "--chip", built.chip_id)
    return owner


def config_of(owner: Callable[..., Done]) -> str:
    """Give the VM's agent.toml: the TPM that QEMU gives it stands for the SVSM's, whose driver Debian's kernels do not have."""
    return owner("vm", "config", VM).stdout.replace('driver = "tpm_svsm"', 'driver = "tpm_crb"')


@dataclass
class Site:
    """One test's copy of the verifier, and the VM that it starts; ``world`` is a disk that says how its hardware behaves."""

    estate: Estate
    directory: Path
    world: Path | None = None
    processors: int = 1

    @property
    def commands(self) -> Commands:
        """The owner's command line."""
        return Commands(self.directory)

    def verifier(self, *words: str) -> Done:
        """Run a verb of the owner's that must work."""
        return self.commands.verifier(*words)

    @contextmanager
    def serving(self) -> Iterator[ServedVerifier]:
        """Run the verifier."""
        with self.commands.serving() as served:
            yield served

    @contextmanager
    def booted(self, verifier: str | None, more: str = "") -> Iterator[machine.Machine]:
        """Switch the VM on, with its variant's command line and ``more`` words on it."""
        with machine.start(
            self.directory / "vm",
            kernel=self.estate.images.kernel,
            initramfs=self.estate.initramfs,
            cmdline=f"{self.estate.images.variant.cmdline} {more}".rstrip(),
            disks=[
                machine.Disk(self.estate.volume, "root"),
                machine.Disk(self.estate.images.hardware, "snp"),
                *([machine.Disk(self.world, "world")] if self.world else []),
            ],
            verifier=verifier,
            processors=self.processors,
        ) as running:
            yield running

    def explained(self, session: str) -> list[dict[str, Any]]:
        """Give the checks of a session, as the owner sees them."""
        return self.commands.explain(session)

    def events(self) -> list[str]:
        """Name what the ledger tells of, newest first, having verified its chain."""
        self.verifier("ledger", "verify")
        return [line["event"] for line in self.verifier("ledger", "list", "--json").json()]


def session_in(lines: list[str]) -> str:
    """Find the session that a refusal on the console names."""
    found = [
        match[1] for line in lines if (match := re.search(r"kagimori-verifier explain ([0-9a-f]{16})", line))
    ]
    assert found, "\n".join(["no session in", *lines[-40:]])
    return str(found[-1])
